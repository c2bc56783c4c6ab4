"""What dynamic pruning is worth in seconds: training steps and inference, whole, masked and compact, on one thread.

    python -m bench.gates                     # ResNet-32, one four times wider, VGG-16; about twelve minutes
    python -m bench.gates --nets resnet32 --density 0.3
    python -m bench.gates --vectors avx2      # on a machine with wider ones: what one without them would find
    python -m bench.gates --quick

All variants of a comparison take turns in one process, so that a busy machine disturbs them alike, and the fastest half
of each one's CPU times counts. The dense net runs in both memory formats: ``speed_up`` is against the dense net in the
same format (channels last, the format that compact convolutions want, and in which colour images come to every client),
``over_plain`` against it in PyTorch's default format. Inference: normalisations are folded into convolutions on both
sides. *Planned*: layers in which gating was measured not to pay are left dense. Seconds alone are compared: a plan has
to be in force while the net is trained, for without a layer's gate it is another function. A batch of one is trained
with winners per sample. How wide the machine's vectors are matters: half of sixteen channels fill one of 256 bits, but
only half of one of 512.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.common import finish, options, print_table
from bench.turns import Step, take_turns, typical_s
from pruning.gates import executed_ratios, fold_norms, for_inference, gates_of, measure_plan
from pruning.ops import trace_ops
from zoo import get_model

NETS: dict[str, tuple[str, float]] = {
    "resnet32": ("resnet32", 1.0),
    "resnet32 x4": ("resnet32", 4.0),
    "vgg16": ("vgg16", 1.0),
}
QUICK: dict[str, tuple[str, float]] = {"resnet8": ("resnet8", 1.0), "vgg11 x0.25": ("vgg11", 0.25)}
TARGETS = {
    ("resnet32", "training", 64): 1.5,
    ("resnet32 x4", "training", 64): 1.7,
    ("resnet32 x4", "inference", 64): 1.7,
}
SIZE = 32
"""Pixels; with fewer, VGG's last normalisation would have one value per channel in a batch of one."""
SHARED = {
    "training": (("batch", "group 2", "group 4"), ("batch", "group 2")),
    "inference": (("batch", "group 4", "sample"), ("batch", "sample")),
}
"""Task -> who shares winners in compact execution, and with a plan; a batch of one shares with nobody."""
FLOOR = 0.95
"""A planned net is never slower than this share of the dense one."""


def main() -> dict[str, Any]:
    """Run the benchmark."""
    parser = options("gates", __doc__)
    parser.add_argument("--nets", nargs="+", help=f"of {', '.join(NETS)}")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--turns", type=int, default=7, help="of each comparison, at least (default 7)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each comparison, at least (default 8)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="(default 1 64)")
    parser.add_argument("--vectors", choices=("avx2",), help="the widest to compute with (default: the machine's)")
    arguments = parser.parse_args()
    vectors = limit_vectors(arguments.vectors)
    known = QUICK if arguments.quick else NETS
    if arguments.quick:
        arguments.turns, arguments.seconds, arguments.batches = 2, 0.0, [1, 8]
    names = arguments.nets or list(known)
    torch.set_num_threads(1)
    rows = []
    for name in names:
        for what, batch in [(what, batch) for what in SHARED for batch in arguments.batches]:
            found = compare(name, known[name], what, batch, SIZE, arguments)
            print_table(f"{name}, {what}, batch {batch}, density {arguments.density:g}", found)
            rows += found
    targets = judge(rows)
    print_table(f"targets ({vectors})", targets)
    found_with = {"density": arguments.density, "vectors": vectors}
    return finish("gates", arguments, {"rows": rows, "targets": targets, **found_with})


def limit_vectors(wanted: str | None) -> str:
    """Compute with no wider vectors than ``wanted``; returns which PyTorch uses. Before the first product.

    Raises
    ------
    SystemExit
        If the machine has not got them.
    """
    if wanted is not None:
        os.environ["ATEN_CPU_CAPABILITY"] = wanted
        os.environ["ONEDNN_MAX_CPU_ISA"] = wanted.upper()
    found = torch.backends.cpu.get_cpu_capability()
    if wanted not in (None, found.lower()):
        raise SystemExit(f"bench.gates: --vectors {wanted}: PyTorch computes with {found} here; leave the option out")
    return found


def compare(
    name: str, net: tuple[str, float], what: str, batch: int, size: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All variants of one net at one task."""
    generator = torch.Generator().manual_seed(arguments.seed)
    plain = torch.randn(batch, 3, size, size, generator=generator)
    x, y = plain.contiguous(memory_format=torch.channels_last), torch.arange(batch) % 10
    is_training = what == "training"
    make = step_of if is_training else pass_of
    dense = build(net, arguments, gates=False)
    gated = build(net, arguments)
    variants: dict[str, tuple[nn.Module, Tensor]] = {"dense, plain": (dense, plain), "dense": (copy.deepcopy(dense), x)}
    variants["masked"] = (configured(gated, "batch", compact=False), x)
    compact, plans = SHARED[what] if batch > 1 else (("sample",), ("sample",))
    for share in compact:
        variants[f"compact, {share}"] = (configured(gated, share), x)
    for share in plans:
        variants[f"planned, {share}"] = (planned(gated, share, x, is_training), x)
    macs = {label: macs_share(model, images) for label, (model, images) in variants.items() if "dense" not in label}
    layers = {
        label: sum(gate.k > 0 for _, gate in gates_of(model).pairs())
        for label, (model, _) in variants.items()
        if "dense" not in label
    }
    if not is_training:
        for label, (model, images) in variants.items():
            share = label.partition(", ")[2]
            variants[label] = (ready(model, label, share, size), images)
    runs = {label: make(model, images, y) for label, (model, images) in variants.items()}
    times = take_turns(runs, arguments.turns, arguments.seconds)  # of a small step a few turns are mostly noise
    seconds = {label: typical_s(spent) for label, spent in times.items()}
    return [
        {
            "net": name,
            "task": what,
            "batch": batch,
            "variant": label,
            "ms": 1e3 * spent_s,
            "speed_up": seconds["dense"] / spent_s,
            "over_plain": seconds["dense, plain"] / spent_s,
            "macs_ratio": macs.get(label, 1.0),
            "gated_layers": layers.get(label, 0),
        }
        for label, spent_s in seconds.items()
    ]


def build(net: tuple[str, float], arguments: argparse.Namespace, gates: bool = True) -> nn.Module:
    """One net, with gates at the density of this benchmark; the same weights in every variant."""
    torch.manual_seed(arguments.seed)
    model, _ = get_model(net[0], width=net[1], **({"gates": True} if gates else {}))
    if gates:
        gates_of(model).set_density(arguments.density)
    return model


def configured(model: nn.Module, share: str, compact: bool = True) -> nn.Module:
    """A copy that shares winners as asked; ``group 2``: two groups."""
    twin = copy.deepcopy(model)
    kind, _, number = share.partition(" ")
    gates_of(twin).configure(kind, compact, int(number or 4))
    return twin


def planned(model: nn.Module, share: str, images: Tensor, training: bool) -> nn.Module:
    """A copy in which layers that do not pay are left dense."""
    twin = configured(model, share)
    plan = measure_plan(twin, images, training=training)
    gates_of(twin).leave_dense(layer.group for layer in plan if not layer.is_gated)
    return twin


def ready(model: nn.Module, label: str, share: str, size: int) -> nn.Module:
    """A variant made ready for inference."""
    shape = (3, size, size)
    if label.startswith(("compact", "planned")):
        kind, _, number = share.partition(" ")
        return for_inference(model, shape, kind, int(number or 4))
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    if label.startswith("dense"):
        fold_norms(twin, shape)
    return twin


def macs_share(model: nn.Module, images: Tensor) -> float:
    """Multiply-accumulates that one pass executes, gates included, as a share of the dense net's."""
    twin = copy.deepcopy(model).eval()
    with gates_of(twin).whole():  # products are recognised by the weights that they are made with
        products = trace_ops(twin, images[:1]).products
    with torch.no_grad():
        twin(images)
    ratios = executed_ratios(twin)
    whole = sum(product.macs for product in products if not (product.key or "").startswith("gates."))
    return sum(product.macs * ratios.get(product.key or "", 1.0) for product in products) / whole


def step_of(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """One training step."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def pass_of(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """One pass of inference; small batches several times, so that the clock can see them."""
    repeats = max(1, 16 // len(x))

    @torch.inference_mode()
    def run() -> None:
        for _ in range(repeats):
            model(x)

    model.eval()
    return run


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every target with what was found."""
    found = []
    for (net, task, batch), target in TARGETS.items():
        mine = [r for r in rows if (r["net"], r["task"], r["batch"]) == (net, task, batch)]
        gated = [r for r in mine if r["variant"].startswith(("compact", "planned"))]
        if gated:
            best = max(gated, key=lambda r: r["speed_up"])
            what = f"{net}, {task}, batch {batch}: at least {target:g}x"
            found.append(
                {"target": what, "found": best["speed_up"], "by": best["variant"], "met": best["speed_up"] >= target}
            )
    slowest = min((r for r in rows if r["variant"].startswith("planned")), key=lambda r: r["speed_up"], default=None)
    if slowest is not None:
        where = f"{slowest['net']}, {slowest['task']}, batch {slowest['batch']}, {slowest['variant']}"
        is_met = slowest["speed_up"] >= FLOOR
        found.append(
            {"target": f"planned never below {FLOOR}", "found": slowest["speed_up"], "by": where, "met": is_met}
        )
    return found


if __name__ == "__main__":
    # Denormal numbers cost either side at random. A setting of the whole process, therefore not in main().
    torch.set_flush_denormal(True)
    main()
