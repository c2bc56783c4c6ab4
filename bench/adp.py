"""ADP on FedAvg and SCAFFOLD: what dynamic pruning costs in accuracy and saves in bytes, MACs and seconds.

    python -m bench.adp --data-dir data                          # the budget below: half a day on 2 cores, resumable
    python -m bench.adp --data-dir data --rounds 100 --images 0 --device cuda     # the papers' budget, on a GPU
    python -m bench.adp --base fedavg --partition dirichlet:0.1 --density 0.5 --seeds 1
    python -m bench.adp --data-dir data --task cifar10-small-resnet32        # a budget for two cores
    python -m bench.adp --quick                                  # digits and a small net, one seed, in a minute

CIFAR-10, ResNet-32, 10 clients; 4,000 training images of all clients together and 40 rounds of one local epoch by
default, of 50,000 and 100 in the papers; ``cifar10-small-resnet32``: averaged to 16 x 16 pixels, 2,000 of them, 30
rounds, batches of 16. Every run is kept in results/bench/adp; a run that is there is not repeated, and the tables are
made of what there is.

``plain``: the base algorithm on the model without gates. ``d=1``: with gates and nothing pruned. Savings are counted
against the unpruned run of *the same architecture*: ``d=1`` for what has gates (and for ``plain``, whose row says what
gates cost), ``plain`` for what has none. ``--controls`` adds, at density .5: ``client`` (gates, a sub-model per
client), ``all uploads`` (not the most salient filters alone) and, without gates, ``static`` (the same units for
everybody and every input) and ``magnitude`` (what one published snapshot does). ``--upload-density U`` adds ``d=D u=U``
for every density D: fewer filters are sent than are computed; and ``--upload changed`` ``d=D u=U changed``, in which
what is not sent waits for its turn.

Bytes to a target are counted in three ways. *Authors'*: rounds to the target, times the bytes of a whole model for
every client and direction. *Salient*: the uploads that were really sent. *Wire*: all tensors, both ways. A target
counts as reached at its first hit, or where the mean of five rounds is there. Targets are 60, 70, 75 and 80 %, those of
them that the run with nothing pruned gets to with every seed, and shares of what the unpruned run of the same seed had
at best. Accuracy is the better of BatchNorm's statistics as merged and re-estimated, for every variant alike. Seconds
are compared round by round, and the median is shown: a run takes many minutes, in which a machine has other work too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.common import add_device, finish, print_table, seeds_of
from bench.common import options as common_options
from bench.gates import macs_share
from bench.runs import Job, Keys, Task, add_store, complete, has_cifar, load, over_seeds, read, store_of
from pruning.gates import gates_of
from strategies.adp import ADPConfig
from zoo import get_model

PARTITIONS = ("dirichlet:0.1", "dirichlet:0.5", "iid")
DENSITIES = (1.0, 0.7, 0.5, 0.3)
BASES = ("fedavg", "scaffold")
CONTROLS: dict[str, Keys] = {
    "client": {"adp.share": "client"},
    "all uploads": {"adp.upload": "all"},
    "static": {"adp.mode": "static", "model.gates": False},
    "magnitude": {"adp.mode": "magnitude", "model.gates": False},
}
UNPRUNED, PLAIN = "d=1", "plain"
GATELESS = ("static", "magnitude")
"""Controls on the model without gates, compared with ``plain``."""

TARGETS = (0.6, 0.7, 0.75, 0.8)
SHARES = (0.9, 1.0)
CLAIMED = {"communication": -0.57, "inference MACs": -0.50}
WINDOW = 5


CIFAR = Task(
    "cifar10-resnet32",
    {
        "data.name": "cifar10",
        "data.max-test": 2000,
        "model.name": "resnet32",
        "num-clients": 10,
        "fleet.name": "uniform",
        "train.augment": "flip-shift",
        "train.learning-rate": 0.02,
        "train.schedule": "constant",
    },
    40,
    4000,
)
SMALL = Task(
    "cifar10-small-resnet32",
    {
        **CIFAR.keys,
        "data.name": "cifar10@16",
        "data.max-test": 1000,
        "train.batch-size": 16,
        # FedAvg without gates, seed 0, Dirichlet .5: .36 at .005, .37 at .01, .31 at .02, .28 at .05
        "train.learning-rate": 0.01,
    },
    30,
    2000,
)
QUICK = Task(
    "digits-cnn",
    {
        "data.name": "digits",
        "model.name": "cnn",
        "model.width": 0.5,
        "num-clients": 4,
        "fleet.name": "uniform",
        "adp.warmup-rounds": 1,
        "adp.ramp-rounds": 1,
    },
    5,
    400,
)
TASKS = {task.name: task for task in (CIFAR, SMALL)}
IMAGES = {CIFAR.name: (3, 32), SMALL.name: (3, 16), QUICK.name: (1, 8)}
"""Task -> channels of its images, and their size in pixels."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run what is missing, print the tables."""
    options = read_options(arguments)
    task = task_of(options)
    if task is not QUICK and not options.kept and not has_cifar(options.data_dir):
        print(f"no CIFAR-10 in {options.data_dir}: give --data-dir with cifar10.npz or torchvision's files, or --quick")
        return None
    names = variants(options)
    cases = [(base, part, seed) for base in options.base for part in options.partition for seed in seeds_of(options)]
    jobs = [job_of(task, *case, name, options) for case in cases for name in names]
    complete(jobs, options)
    budget = {"rounds": options.rounds, "images": options.images or "all"}
    tables = []
    for base in options.base:
        for partition in options.partition:
            runs = kept_runs(task, base, partition, names, options)
            if UNPRUNED in runs:
                rows = tabulate(runs)
                tables.append({"task": task.name, "base": base, "partition": partition, **budget, "rows": rows})
                print_table(f"{task.name} · {base} · {partition} · {options.rounds} rounds", rows)
    claims = judge(tables, lambda density: inference_share(task, options.width, density))
    print_table("claims beside what was found", claims)
    return finish("adp", options, {"tables": tables, "claims": claims}, seeds=seeds_of(options))


def task_of(options: argparse.Namespace) -> Task:
    """What the options ask for."""
    return QUICK if options.quick else TASKS[options.task]


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what was not given takes the task's budget."""
    parser = common_options("adp", __doc__)
    parser.add_argument("--task", choices=TASKS, default=CIFAR.name)
    parser.add_argument("--base", action="append", choices=("fedavg", "fedprox", "scaffold", "fednova"))
    parser.add_argument("--partition", action="append")
    parser.add_argument("--density", action="append", type=float)
    parser.add_argument("--upload-density", action="append", type=float, default=[], help="also send so few filters")
    parser.add_argument("--upload", action="append", choices=("salient", "changed"), help="which (default salient)")
    parser.add_argument("--controls", action="store_true", help="also client, all uploads, static and magnitude")
    parser.add_argument("--share", default="group", help="who shares winners (default group)")
    parser.add_argument("--width", type=float, default=1.0, help="of the model, e.g. 4 (default 1)")
    parser.add_argument("--rounds", type=int, default=0, help="default: the task's")
    parser.add_argument("--images", type=int, help="of all clients; 0 for all (default: the task's)")
    parser.add_argument("--seeds", type=int, default=0, help="how many (default 3, quick 1)")
    add_device(parser)
    parser.add_argument("--data-dir", default="data")
    add_store(parser, "adp")
    options = parser.parse_args(arguments)
    task = task_of(options)
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.base = options.base or (["fedavg"] if options.quick else list(BASES))
    options.partition = options.partition or (["dirichlet:0.5"] if options.quick else list(PARTITIONS))
    options.density = options.density or ([1.0, 0.5] if options.quick else list(DENSITIES))
    if options.upload and not options.upload_density:
        parser.error("--upload says which filters --upload-density sends; give that too")
    options.upload = options.upload or [ADPConfig.upload]
    options.rounds = options.rounds or task.num_rounds
    options.images = task.num_images if options.images is None else options.images
    options.store = store_of(options, "adp")
    options.data_dir = str(Path(options.data_dir).absolute())
    return options


def variants(options: argparse.Namespace) -> dict[str, Keys]:
    """What is compared on one base: its plain form, ADP at every density, the controls. The unpruned run always."""
    densities = sorted({1.0, *options.density}, reverse=True)
    found: dict[str, Keys] = {PLAIN: {}}
    found |= {f"d={density:g}": {"adp.density": density, "adp.share": options.share} for density in densities}
    for density, sent, which in product(densities[1:], options.upload_density, options.upload):
        name = f"d={density:g} u={sent:g}" + (f" {which}" if which != ADPConfig.upload else "")
        found[name] = {**found[f"d={density:g}"], "adp.upload-density": sent, "adp.upload": which}
    return found | (CONTROLS if options.controls else {})


def job_of(task: Task, base: str, partition: str, seed: int, name: str, options: argparse.Namespace) -> Job:
    """One run."""
    method: Keys = {"strategy": "adp", "adp.base": base, "model.gates": True, **variants(options)[name]}
    keys: Keys = {
        **task.keys,
        **({"strategy": base} if name == PLAIN else method),
        "model.width": task.keys.get("model.width", 1.0) if options.width == 1 else options.width,
        "data.partition": partition,
        "data.dir": options.data_dir,
        "data.max-train": options.images,
        "train.device": options.device,
        "seed": seed,
        "data.seed": seed,
        "num-rounds": options.rounds,
    }
    what = name if name == PLAIN else f"{name.replace(' ', '-')}-{options.share}"
    budget = f"rounds{options.rounds}_images{options.images}_width{options.width:g}"
    where = partition.replace(":", "")  # no colons in names of files
    return Job(f"{task.name}_{budget}_{base}_{where}_seed{seed}_{what}", keys, options.store, outcome)


def outcome(log: Path) -> dict[str, Any]:
    """What the tables need of an event log: per round accuracies, bytes, MACs and seconds; gates at the end."""
    rounds: dict[int, dict[str, float]] = {}
    gates: dict[str, Any] = {}
    for row in read(log):
        number = row.get("server_round", 0)
        spent = rounds.setdefault(number, {"up": 0.0, "down": 0.0, "macs": 0.0, "seconds": 0.0, "clients": 0.0})
        if row["event"] == "arrival" and row["status"] == "merged":
            spent["up"] += row["upload_bytes"]
            spent["down"] += row["download_bytes"]
            spent["macs"] += row["train_macs"]
            spent["seconds"] += row["measured_compute_s"]
            spent["clients"] += 1
            spent["train"] = spent.get("train", 0.0) + row["accuracy"]
        elif row["event"] == "evaluation" and row["where"] == "central":
            spent["test"] = max(row["accuracy"], row["accuracy_reestimated"])
        elif row["event"] == "gates" and row["layers"]:
            gates = {"layers": row["layers"], "density": row["density"]}
    curve = [
        {"round": number, **values} for number, values in sorted(rounds.items()) if number > 0 and "test" in values
    ]
    return {"curve": curve, "gates": gates}


def kept_runs(
    task: Task, base: str, partition: str, names: Mapping[str, Keys], options: argparse.Namespace
) -> dict[str, dict[int, dict[str, Any]]]:
    """Variant -> seed -> outcome, of the runs that there are."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in names:
        for seed in seeds_of(options):
            path = job_of(task, base, partition, seed, name, options).path
            if path.exists():
                found.setdefault(name, {})[seed] = load(path)
    return found


def tabulate(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row per variant: means over the seeds that the unpruned run of its architecture has too."""
    best = min(best_of(run["curve"]) for run in runs[UNPRUNED].values())
    targets = [target for target in TARGETS if target <= best]
    rows = []
    for name, by_seed in runs.items():
        unpruned = runs.get(PLAIN if name in GATELESS else UNPRUNED, {})
        seeds = [seed for seed in by_seed if seed in unpruned]
        if seeds:
            columns = over_seeds(compare(by_seed[seed], unpruned[seed], targets) for seed in seeds)
            rows.append({"variant": name, "seeds": len(seeds), **columns})
    return rows


def compare(
    run: Mapping[str, Any], unpruned: Mapping[str, Any], targets: Sequence[float] = ()
) -> dict[str, float | None]:
    """One run beside the unpruned one of the same seed; savings as shares, negative where less is spent.

    Parameters
    ----------
    targets : accuracies to which rounds and bytes are counted, beside the ``SHARES``.
    """
    curve, whole = run["curve"], unpruned["curve"]
    row: dict[str, float | None] = {
        "accuracy": last_mean(curve, "test"),
        "lost points": 100 * (last_mean(whole, "test") - last_mean(curve, "test")),
        "train - test": statistics.fmean(p["train"] / p["clients"] - p["test"] for p in curve[-WINDOW:]),
        "upload": total(curve, "up") / total(whole, "up") - 1,
        "last upload": curve[-1]["up"] / whole[-1]["up"] - 1,
        "wire": (total(curve, "up") + total(curve, "down")) / (total(whole, "up") + total(whole, "down")) - 1,
        "MACs": total(curve, "macs") / total(whole, "macs") - 1,
        "seconds": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(curve, whole, strict=True)) - 1,
    }
    first, *others = SHARES
    goals = [(f"{target:.0%}", target, f"{target:.0%}") for target in targets]
    goals.append((f"{first:.0%} of best", first * best_of(whole), "it"))
    goals += [(f"{share:.0%} of best", share * best_of(whole), "") for share in others]
    for label, target, bytes_to in goals:
        for how, window in (("first hit", 1), ("5-round mean", WINDOW)):
            mine, theirs = (rounds_to(points, target, window) for points in (curve, whole))
            row[f"rounds to {label}, {how}"] = mine
            if bytes_to:
                found = savings(curve, whole, mine, theirs)
                row |= {f"{way} bytes to {bytes_to}, {how}": saving for way, saving in found.items()}
    return row


def best_of(curve: Sequence[Mapping[str, float]]) -> float:
    """Best test accuracy of a run."""
    return max(point["test"] for point in curve)


def savings(
    curve: Sequence[Mapping[str, float]], whole: Sequence[Mapping[str, float]], mine: int | None, theirs: int | None
) -> dict[str, float | None]:
    """Bytes to a target against the unpruned run, in the three countings."""
    if mine is None or theirs is None:
        return dict.fromkeys(("authors'", "salient", "wire"))
    up, down = (
        [sum(p[key] for p in points[:n]) for points, n in ((curve, mine), (whole, theirs))] for key in ("up", "down")
    )
    return {
        "authors'": mine / theirs - 1,
        "salient": up[0] / up[1] - 1,
        "wire": (up[0] + down[0]) / (up[1] + down[1]) - 1,
    }


def rounds_to(curve: Sequence[Mapping[str, float]], target: float, window: int) -> int | None:
    """Rounds until the mean test accuracy of the last ``window`` rounds is at ``target``; None if it never is."""
    for number in range(window, len(curve) + 1):
        if statistics.fmean(point["test"] for point in curve[number - window : number]) >= target:
            return number
    return None


def last_mean(curve: Sequence[Mapping[str, float]], key: str) -> float:
    """Mean over the last five rounds."""
    return statistics.fmean(point[key] for point in curve[-WINDOW:])


def total(curve: Sequence[Mapping[str, float]], key: str) -> float:
    """Sum over all rounds."""
    return sum(point[key] for point in curve)


def inference_share(task: Task, width: float, density: float) -> float:
    """Multiply-accumulates of one image's inference, predictors included, as a share of the net's without gates.

    It depends on shapes alone: how many units win is given, whichever they are.
    """
    channels, size = IMAGES[task.name]
    own_width = float(task.keys.get("model.width", 1.0)) if width == 1 else width
    model, _ = get_model(str(task.keys["model.name"]), 10, channels, size, width=own_width, gates=True)
    gates_of(model).configure("sample", compact=True).set_density(density)
    return macs_share(model, torch.zeros(1, channels, size, size))


def judge(tables: Sequence[Mapping[str, Any]], share_of: Callable[[float], float]) -> list[dict[str, Any]]:
    """The paper's claims beside every pruned variant that was run; communication in all three countings.

    Parameters
    ----------
    share_of : density -> inference MACs of the net with gates, as a share of the dense net's.
    """
    found = []
    for table in tables:
        for row in table["rows"]:
            name = row["variant"]
            if name in (PLAIN, UNPRUNED):
                continue
            density = float(name.split()[0].removeprefix("d=")) if name.startswith("d=") else ADPConfig().density
            ways = {way: row[f"{way} bytes to it, first hit"] for way in ("authors'", "salient", "wire")}
            found.append(
                {
                    "where": f"{table['base']}, {table['partition']}, {name}",
                    "claimed communication": CLAIMED["communication"],
                    **ways,
                    "last upload": row["last upload"],
                    "lost points": row["lost points"],
                    "claimed inference MACs": CLAIMED["inference MACs"],
                    "inference MACs": None if name in GATELESS else share_of(density) - 1,
                }
            )
    return found


if __name__ == "__main__":
    main()
