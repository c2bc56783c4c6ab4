"""What a training step of a resized model costs: as much as one of a net that was written with those widths.

ResNet-18 and VGG-16 are compared with nets written by hand (``bench/handmade.py``), every other zoo model with the same
model built with its ``width`` option. Both take turns within one process, so that a busy machine is busy for both;
the ratio is the median over all turns. Batch 32, one thread, SGD with momentum.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.common import finish, options, print_table, settle
from bench.handmade import narrow_vgg16, resnet18, train_step
from pruning.cost import measure_costs
from pruning.extract import resize
from pruning.select import equal_widths, select_prefix
from zoo import get_model, model_names

BATCH = 32
WIDTHS: tuple[float, ...] = (0.75, 0.5, 0.25)
HANDMADE: dict[str, Callable[[float], nn.Module]] = {"resnet18": resnet18, "vgg16": narrow_vgg16}
RATIO_BOUND = 1.05


def stepper(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    """One training step that returns its CPU seconds."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        began = time.process_time()
        train_step(model, optimizer, x, y)
        return time.process_time() - began

    step()  # allocates gradients and momentum
    return step


def take_turns(steps: list[Callable[[], float]], budget_s: float, least: int) -> list[list[float]]:
    """Times of each stepper, in turn, until the budget is spent; at least ``least`` each."""
    settle()
    times: list[list[float]] = [[] for _ in steps]
    began = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - began < budget_s:
        order = range(len(steps)) if len(times[0]) % 2 else reversed(range(len(steps)))
        for index in order:
            times[index].append(steps[index]())
    return times


def measure(name: str, widths: tuple[float, ...], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model: the resized model at each width, its rival, and the speed-up over the full model."""
    size = arguments.image_size
    model, layout = get_model(name, image_size=size)
    generator = torch.Generator().manual_seed(arguments.seed)
    x, y = torch.randn(BATCH, 3, size, size, generator=generator), torch.arange(BATCH) % 10
    budget = (arguments.budget_s, arguments.least)
    (full,) = take_turns([stepper(model, x, y)], *budget)
    by_hand = name in HANDMADE and size == 32
    rows: list[dict[str, Any]] = []
    for width in widths:
        rival, narrow = get_model(name, image_size=size, width=width)
        small = resize(model, layout, select_prefix(layout, {group.name: group.size for group in narrow.prunable}))
        if by_hand:
            rival = HANDMADE[name](width)
        num_parameters = [sum(p.numel() for p in net.parameters()) for net in (small, rival)]
        assert num_parameters[0] == num_parameters[1]
        ours, theirs = take_turns([stepper(small, x, y), stepper(rival, x, y)], *budget)
        rows.append(
            {
                "model": name,
                "width": width,
                "against": "by hand" if by_hand else "width option",
                "parameters": num_parameters[0],
                "resized_ms": 1e3 * statistics.median(ours),
                "rival_ms": 1e3 * statistics.median(theirs),
                "ratio": statistics.median(mine / its for mine, its in zip(ours, theirs, strict=True)),
                "speed_up": statistics.median(full) / statistics.median(ours),
                "steps": len(ours),
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
        steps = [stepper(resize(model, layout, spec), x, y) for spec in specs]
        plain, rounded = map(statistics.median, take_turns(steps, arguments.budget_s, arguments.least))
        macs = [cost.of(spec).train_macs for spec in specs]
        rows.append(
            {
                "width": width,
                "plain_ms": 1e3 * plain,
                "rounded_ms": 1e3 * rounded,
                "time_ratio": rounded / plain,
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
    arguments.image_size, arguments.least = 32, 4
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
