"""What a step of Co-S2P's client costs: the mask phase and the weight phase beside a plain ViT step of the same MACs.

Weight phase: the resized sub-model with its exits and the distillation, against a plain ViT with one head that was
built with those widths and that depth. Mask phase: gated forward, backward to the activations, both optimisers,
against a plain step, time scaled to the MACs. All take turns within one process, and the fastest half of each one's
steps counts, in CPU seconds. One thread, SGD with momentum.

Freezing weights saves products and nothing else. Where a step is more than products, in narrow nets, its time does not
follow its MACs, gates or none; ``over_frozen`` is the mask phase against the same plain ViT with the same weights
frozen: what the gates themselves cost.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import finish, options, print_table, within
from bench.step import stepper
from bench.turns import Step, take_turns, typical_s
from client_app.data import Examples
from client_app.objectives import Task, make_objective
from client_app.objectives.masks import MaskPhase, freeze, learnable_groups, mask_macs
from pruning.capability import inner_groups, solve_rate, sub_model_at
from pruning.cost import measure_costs
from pruning.extract import resize
from pruning.groups import Layout
from pruning.spec import FULL, SubModelSpec
from wire.message import TrainConfig
from zoo.vit import vit

RATIO_BOUND = 1.15
SIZES: dict[str, dict[str, Any]] = {
    "vit_small": {"dim": 384, "num_heads": 6, "num_blocks": 8},
    "vit_tiny": {"dim": 192, "num_heads": 3, "num_blocks": 8},
    "vit_micro": {"dim": 64, "num_heads": 4, "num_blocks": 8, "grid": 4},
}


def weight_step(task: Task) -> Step:
    """One step of the weight phase."""
    assert task.examples is not None
    objective = make_objective("deepest-teaches+exit-choice", task)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.01, momentum=0.9)
    x, y = task.examples.batch(slice(None))

    def step() -> None:
        loss, _ = objective.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def mask_step(task: Task) -> Step:
    """One step of the mask phase."""
    assert task.examples is not None
    phase = MaskPhase(task, learnable_groups(task))
    x, y = task.examples.batch(slice(None))
    return lambda: phase.step(x, y)


def plain(size: dict[str, Any], depth: int, rate: float, image_size: int) -> nn.Module:
    """A ViT with one head, written with these widths."""
    return vit(10, 3, image_size, **{**size, "num_blocks": depth}, width=rate)[0]


def frozen(model: nn.Module) -> nn.Module:
    """The model with as much of it frozen as in the mask phase."""
    freeze(model)
    return model


def macs_of(model: nn.Module, x: Tensor) -> int:
    """Training MACs per example."""
    return measure_costs(model, Layout(()), x[:2]).of(FULL).train_macs


def measure(name: str, rate: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both phases of one model at one rate."""
    size, image_size = SIZES[name], arguments.image_size
    network, layout = vit(10, 3, image_size, **size, exits=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    x = torch.randn(arguments.batch, 3, image_size, image_size, generator=generator)
    y = torch.arange(arguments.batch) % 10
    one = torch.ones(1, 1, 1, 1)
    examples = Examples(x, y, torch.zeros_like(one), one)
    cost = measure_costs(network, layout, x[:2])
    groups = inner_groups(layout, cost.shapes)
    depth = solve_rate(layout, rate).depth
    small, whole = sub_model_at(layout, groups, depth, rate), sub_model_at(layout, groups, depth, 1.0)
    settings = {"width-rate": rate, "distillation-weight": 0.5}
    task = Task(network, layout, TrainConfig(), settings, torch.ones(10), FULL, network, examples=examples)

    def part(spec: SubModelSpec) -> Task:
        return replace(task, model=resize(network, layout, spec).train(), spec=spec, learning_rate=0.01)

    with torch.device("meta"):
        blank, _ = vit(10, 3, image_size, **size, exits=True)
    phase_macs = mask_macs(blank, layout, whole, tuple(x.shape[1:]))
    rows = []
    for phase, mine, rival, macs in (
        ("weights", weight_step(part(small)), plain(size, depth, rate, image_size), float(cost.of(small).train_macs)),
        ("masks", mask_step(part(whole)), plain(size, depth, 1.0, image_size), float(phase_macs)),
    ):
        rival_macs = macs_of(rival, x)
        steps = {"ours": mine, "theirs": stepper(rival, x, y)}
        if phase == "masks":
            steps["frozen"] = stepper(frozen(plain(size, depth, 1.0, image_size)), x, y)
        times = take_turns(steps, arguments.least, arguments.budget_s)
        scale = macs / rival_macs
        ours, theirs = typical_s(times["ours"]), typical_s(times["theirs"]) * scale
        row = {
            "model": name,
            "rate": rate,
            "phase": phase,
            "ms_per_sample": 1e3 * ours / arguments.batch,
            "plain_ms_per_sample": 1e3 * theirs / arguments.batch,
            "macs_ratio": scale,
            "ratio": ours / theirs,
            "over_frozen": ours / typical_s(times["frozen"]) if "frozen" in times else None,
            "steps": len(times["ours"]),
        }
        rows.append(row | {"bound": within(row["ratio"], RATIO_BOUND)})
    return rows


def main() -> dict[str, Any]:
    """Run the benchmark."""
    parser = options("cos2p_speed", __doc__)
    parser.add_argument("--budget-s", type=float, default=10.0, help="seconds per comparison (default 10)")
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    names: list[str] = list(SIZES)
    rates: tuple[float, ...] = (0.75, 0.5, 0.25)
    arguments.image_size, arguments.least = 32, 5
    if arguments.quick:
        names, rates = ["vit_micro"], (0.5,)
        arguments.budget_s, arguments.least, arguments.batch = 0.2, 3, 8
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rows: list[dict[str, Any]] = []
    for name in names:
        for rate in rates:
            rows += measure(name, rate, arguments)
    print_table(f"one step of batch {arguments.batch}, one thread, against a plain ViT step of the same MACs", rows)
    return finish("cos2p_speed", arguments, {"rows": rows, "worst_ratio": max(row["ratio"] for row in rows)})


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # as in bench.step: a setting of the whole process, therefore not in main()
    main()
