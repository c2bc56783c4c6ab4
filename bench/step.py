"""What a training step of a resized model costs: as much as one of a net that was written with those widths.

ResNet-18 and VGG-16 are compared with nets written by hand (``bench/handmade.py``), every other zoo model with the same
model built with its ``width`` option. Both take turns within one process, so that a busy machine is busy for both; the
fastest half of each one's steps counts; where the bound is missed, of twice as many. Batch 32, one thread, SGD with
momentum.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.common import finish, options, print_table
from bench.handmade import narrow_vgg16, resnet18, train_step
from bench.turns import Step, take_turns, typical_s
from pruning.cost import measure_costs
from pruning.extract import resize
from pruning.select import equal_widths, select_prefix
from zoo import get_model, model_names

BATCH = 32
WIDTHS: tuple[float, ...] = (0.75, 0.5, 0.25)
HANDMADE: dict[str, Callable[[float], nn.Module]] = {"resnet18": resnet18, "vgg16": narrow_vgg16}
RATIO_BOUND = 1.05


def stepper(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    """One training step on one batch, again and again."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
    return lambda: train_step(model, optimizer, x, y)


def measure(name: str, widths: tuple[float, ...], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model: the resized model at each width, its rival, and the speed-up over the full model."""
    size = arguments.image_size
    model, layout = get_model(name, image_size=size)
    generator = torch.Generator().manual_seed(arguments.seed)
    x, y = torch.randn(BATCH, 3, size, size, generator=generator), torch.arange(BATCH) % 10
    budget = (arguments.least, arguments.budget_s)
    full = take_turns({"full": stepper(model, x, y)}, *budget)["full"]
    by_hand = name in HANDMADE and size == 32
    rows: list[dict[str, Any]] = []
    for width in widths:
        rival, narrow = get_model(name, image_size=size, width=width)
        small = resize(model, layout, select_prefix(layout, {group.name: group.size for group in narrow.prunable}))
        if by_hand:
            rival = HANDMADE[name](width)
        num_parameters = [sum(p.numel() for p in net.parameters()) for net in (small, rival)]
        assert num_parameters[0] == num_parameters[1]
        steps = {"ours": stepper(small, x, y), "theirs": stepper(rival, x, y)}
        times = take_turns(steps, *budget)
        if typical_s(times["ours"]) > RATIO_BOUND * typical_s(times["theirs"]):  # in case something else was going on
            times = {who: times[who] + more for who, more in take_turns(steps, *budget).items()}
        ours, theirs = typical_s(times["ours"]), typical_s(times["theirs"])
        rows.append(
            {
                "model": name,
                "width": width,
                "against": "by hand" if by_hand else "width option",
                "parameters": num_parameters[0],
                "resized_ms": 1e3 * ours,
                "rival_ms": 1e3 * theirs,
                "ratio": ours / theirs,
                "speed_up": typical_s(full) / ours,
                "steps": len(times["ours"]),
            }
        )
    return rows


def rounding(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What odd widths cost: ResNet-18 at odd shares, as they are and rounded up to multiples of 8."""
    model, layout = get_model("resnet18", image_size=arguments.image_size)
    x = torch.randn(BATCH, 3, arguments.image_size, arguments.image_size)
    y = torch.arange(BATCH) % 10
    cost = measure_costs(model, layout, x[:1])
    rows = []
    for width in (0.65, 0.42, 0.3):
        specs = [select_prefix(layout, equal_widths(layout, cost, width, round_to=r)) for r in (1, 8)]
        plain, rounded = (stepper(resize(model, layout, spec), x, y) for spec in specs)
        times = take_turns({"plain": plain, "rounded": rounded}, arguments.least, arguments.budget_s)
        plain_s, rounded_s = typical_s(times["plain"]), typical_s(times["rounded"])
        macs = [cost.of(spec).train_macs for spec in specs]
        rows.append(
            {
                "width": width,
                "plain_ms": 1e3 * plain_s,
                "rounded_ms": 1e3 * rounded_s,
                "time_ratio": rounded_s / plain_s,
                "macs_ratio": macs[1] / macs[0],
            }
        )
    return rows


def main() -> dict[str, Any]:
    """Run the benchmark."""
    parser = options("step", __doc__)
    parser.add_argument("--models", nargs="+", choices=model_names(), help="only these")
    parser.add_argument("--budget-s", type=float, default=6.0, help="seconds per comparison (default 6)")
    arguments = parser.parse_args()
    names, widths = arguments.models or list(model_names()), WIDTHS
    arguments.image_size, arguments.least = 32, 6
    if arguments.quick:
        names, widths = arguments.models or ["cnn", "resnet8"], (0.5,)
        arguments.image_size, arguments.least, arguments.budget_s = 16, 3, 0.2
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += measure(name, widths, arguments)
        print_table(f"{name}: one training step, batch {BATCH}, one thread", [r for r in rows if r["model"] == name])
    rounded = [] if arguments.quick else rounding(arguments)
    print_table("ResNet-18 with widths rounded up to multiples of 8", rounded)
    worst = max(row["ratio"] for row in rows)
    above = [f"{row['model']} at {row['width']:g}" for row in rows if row["ratio"] > RATIO_BOUND]
    print(f"\nslowest against its rival: {worst:.3f}" + (f"; above {RATIO_BOUND}: {', '.join(above)}" if above else ""))
    return finish("step", arguments, {"rows": rows, "round_to_8": rounded, "worst_ratio": worst})


if __name__ == "__main__":
    # Denormal numbers cost either rival at random. A setting of the whole process, therefore not in main().
    torch.set_flush_denormal(True)
    main()
