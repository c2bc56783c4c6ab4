"""Every method side by side: accuracy at equal rounds, at equal virtual time and at equal bytes; waiting, coverage.

    python -m bench.baselines --data-dir data          # all methods, three seeds: hours on 2 cores, resumable
    python -m bench.baselines --rounds 20 --images 4000 --seeds 1 --method heterofl --method fedbuff
    python -m bench.baselines --data-dir data --task cifar10-small-resnet8    # a budget for two cores
    python -m bench.baselines --quick                  # digits, one seed, under three minutes

CIFAR-10, ResNet-8, 20 clients, dirichlet:0.3, the slowest device five times slower than the fastest; 8,000 images and
50 rounds, or with ``cifar10-small-resnet8`` 2,000, averaged to 16 x 16 pixels, and 20. Every run is kept in
results/bench/baselines; a run that is there is not repeated, and the table is made of what there is. FedAvg comes
first: its rounds set the virtual time T that all others get as well. A method runs for as many rounds as FedAvg, and
then on until T has passed, so that its curve can be read at equal rounds, at T, and at the fewest bytes that any method
has sent by then. *over RIVAL* is the difference at T, seed by seed, to the two baselines that a method for unequal
devices has to beat. The learning rate is constant, for a schedule would favour whoever is read at its end. A round of
an asynchronous method is as many answers as there are clients. Accuracies are those of the best model that the server
has (the global one or a member of the family, BatchNorm statistics as merged or re-estimated).

Targets are 60, 65 and 70 % where FedAvg gets to 60 % within its rounds, and else 80, 90 and 100 % of FedAvg's best; the
table says which.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import add_device, finish, print_table, seeds_of
from bench.common import options as common_options
from bench.runs import (
    NUM_POINTS,
    Job,
    Keys,
    Task,
    add_store,
    best_of,
    complete,
    first_reaching,
    has_cifar,
    last_within,
    load,
    merges_a_round,
    over_seeds,
    read,
    store_of,
)
from reporting.log import read_events
from reporting.summary import summarise as summarise_log
from strategies import STRATEGIES

FIRST = "fedavg"
TARGETS = (0.6, 0.65, 0.7)
SHARES = (0.8, 0.9, 1.0)
"""Of FedAvg's best accuracy, where it does not get to the first target."""

SETTINGS: dict[str, Keys] = {
    "adp": {"model.gates": True},
    "depthfl": {"model.exits": True},
    "scalefl": {"model.exits": True},
    "adaptcl": {"adaptcl.rates.min-retention-ratio": 0.3},
}
"""What a method needs beyond its defaults."""

COMBINED: dict[str, Keys] = {
    "heterofl + semi-async": {"strategy": "heterofl", "loop.preset": "semi-async"},
    "heterofl + fedbuff": {"strategy": "heterofl", "loop.preset": "fedbuff"},
    "adaptcl + semi-async": {"strategy": "adaptcl", "loop.preset": "semi-async", **SETTINGS["adaptcl"]},
    "adaptcl floor, spare time works": {
        "strategy": "adaptcl",
        "adaptcl.rates.direction": "hold",
        "adaptcl.rates.spare-time": "work",
        **SETTINGS["adaptcl"],
    },
}
"""Sub-models and asynchrony at once, and AdaptCL with its spare time spent on work."""

RIVALS = ("smallest-everywhere", "only-capable")
"""Whom a method for unequal devices has to beat at equal time."""

METHODS: dict[str, Keys] = {
    **{
        name: {"strategy": name, **SETTINGS.get(name, {})} for name, kind in STRATEGIES.items() if kind.has_global_model
    },
    **COMBINED,
}
"""Every method of the registry that trains one global model, by the name that the table shows."""

NO_MARKS = str.maketrans("", "", " ,")
"""What the name of a file does not take over from a method's."""

CIFAR = Task(
    "cifar10-resnet8",
    {
        "data.name": "cifar10",
        "data.max-test": 2000,
        "data.partition": "dirichlet:0.3",
        "model.name": "resnet8",
        "num-clients": 20,
        "fleet.name": "linear:5",
        "train.augment": "flip-shift",
        "train.schedule": "constant",
    },
    50,
    8000,
)
SMALL = Task("cifar10-small-resnet8", {**CIFAR.keys, "data.name": "cifar10@16"}, 20, 2000)
QUICK = Task(
    "digits-mlp",
    {
        "data.name": "digits",
        "data.partition": "dirichlet:0.3",
        "model.name": "mlp",
        "num-clients": 8,
        "fleet.name": "linear:5",
        "train.schedule": "constant",
        "fedbuff.buffer": 4,
    },
    6,
    400,
)
TASKS = {task.name: task for task in (CIFAR, SMALL)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run what is missing, print the table."""
    options = read_options(arguments)
    task = QUICK if options.quick else TASKS[options.task]
    if task is not QUICK and not options.kept and not has_cifar(options.data_dir):
        print(f"no CIFAR-10 in {options.data_dir}: give --data-dir with cifar10.npz or torchvision's files, or --quick")
        return None
    num_rounds, num_images = options.rounds or task.num_rounds, options.images or task.num_images
    keys: Keys = {**task.keys, "data.dir": options.data_dir, "train.device": options.device}
    task = Task(task.name, keys, num_rounds, num_images)
    methods = list(dict.fromkeys([FIRST, *(options.method or METHODS)]))
    seeds = seeds_of(options)
    failed = complete([job_of(task, FIRST, seed, options.store) for seed in seeds], options)
    others = []
    for seed in seeds:
        first = job_of(task, FIRST, seed, options.store)
        if first.path.exists():
            until_s = load(first.path)["time_s"]
            others += [job_of(task, name, seed, options.store, until_s) for name in methods if name != FIRST]
    failed |= complete(others, options)
    runs = {
        name: {seed: load(path) for seed in seeds if (path := job_of(task, name, seed, options.store).path).exists()}
        for name in methods
    }
    table = tabulate(task, runs)
    print_table(" · ".join(f"{key} {value}" for key, value in table.items() if key != "rows"), table["rows"])
    results = {"tables": [table], "failed": [{"run": name, "reason": reason} for name, reason in failed.items()]}
    return finish("baselines", options, results, seeds=seeds)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common_options("baselines", __doc__)
    parser.add_argument("--task", choices=TASKS, default=CIFAR.name)
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only these; repeatable")
    parser.add_argument("--rounds", type=int, default=0, help="of FedAvg (default: the task's)")
    parser.add_argument("--images", type=int, default=0, help="to train on (default: the task's)")
    parser.add_argument("--seeds", type=int, default=0, help="how many (default 3, quick 1)")
    parser.add_argument("--data-dir", default="data")
    add_device(parser)
    add_store(parser, "baselines")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.store = store_of(options, "baselines")
    options.data_dir = str(Path(options.data_dir).absolute())
    return options


def job_of(task: Task, method: str, seed: int, store: Path, until_s: float = 0.0) -> Job:
    """One method's run."""
    keys: Keys = {
        **task.keys,
        "seed": seed,
        "data.seed": seed,
        "data.max-train": task.num_images,
        "num-rounds": task.num_rounds,
        **METHODS[method],
    }
    num_rounds = task.num_rounds * merges_a_round(keys)
    every = max(1, num_rounds // NUM_POINTS)
    keys |= {"num-rounds": num_rounds, "evaluation.every": every, "evaluation.family-every": every}
    name = f"{task.name}_rounds{task.num_rounds}_images{task.num_images}_seed{seed}_{method.translate(NO_MARKS)}"
    return Job(name, keys, store, outcome, until_s)


def outcome(log: Path) -> dict[str, Any]:
    """What the table needs of an event log: a curve over rounds, time and bytes, and how the fleet was used."""
    curve: list[dict[str, float]] = []
    num_bytes = num_macs = num_merged = 0.0
    for row in read(log):
        if row["event"] == "arrival":
            num_bytes += row["download_bytes"] + row["upload_bytes"]
            num_macs += row.get("train_macs", 0)
            num_merged += row["status"] == "merged"
        elif row["event"] == "evaluation" and row["where"] == "central":
            curve.append(
                {
                    "round": row["server_round"],
                    "merged": num_merged,
                    "time_s": row["time_s"],
                    "bytes": num_bytes,
                    "macs": num_macs,
                    "accuracy": best_of([row, *row.get("family", [])]),
                    "base": row["accuracy"],
                }
            )
    summary = summarise_log(read_events(log))
    kept = ("utilisation_ratio", "straggler_wait_ratio", "n_star_min", "n_star_median", "uncovered_ratio_max")
    return {"curve": curve, "time_s": curve[-1]["time_s"], **{name: summary[name] for name in kept}}


def tabulate(task: Task, runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """The table: means over seeds of what ``compare`` finds, seed by seed, against FedAvg and the fewest bytes."""
    seeds = sorted(runs[FIRST])
    limits = {}
    for seed in seeds:
        time_s = runs[FIRST][seed]["time_s"]
        spent = [last_within(run[seed]["curve"], "time_s", time_s)["bytes"] for run in runs.values() if seed in run]
        limits[seed] = {"time_s": time_s, "bytes": min(spent)}
    at_time = {
        name: {
            seed: last_within(run["curve"], "time_s", limits[seed]["time_s"])["accuracy"]
            for seed, run in by_seed.items()
            if seed in limits
        }
        for name, by_seed in runs.items()
    }
    best = [max(point["accuracy"] for point in runs[FIRST][seed]["curve"]) for seed in seeds]
    is_relative = min(best, default=0.0) < TARGETS[0]
    rows = []
    for name, by_seed in runs.items():
        found = []
        for seed, run in by_seed.items():
            if seed not in limits:
                continue
            targets = [share * best[seeds.index(seed)] for share in SHARES] if is_relative else list(TARGETS)
            num_rounds = task.num_rounds * merges_a_round({**task.keys, **METHODS[name]})
            row = compare(run, num_rounds, limits[seed], targets, is_relative)
            for rival in RIVALS:
                if seed in at_time.get(rival, {}):
                    row[f"over {rival}"] = at_time[name][seed] - at_time[rival][seed]
            found.append(row)
        if found:
            rows.append({"method": name, "seeds": len(by_seed), **over_seeds(found)})
    return {
        "task": task.name,
        "clients": task.keys["num-clients"],
        "partition": task.keys["data.partition"],
        "fleet": task.keys["fleet.name"],
        "rounds": task.num_rounds,
        "images": task.num_images or "all",
        "targets": "shares of FedAvg's best" if is_relative else "accuracies",
        "rows": rows,
    }


def compare(
    run: Mapping[str, Any],
    num_rounds: int,
    limits: Mapping[str, float],
    targets: Sequence[float],
    is_relative: bool,
) -> dict[str, float]:
    """One run's row: accuracies read at the three limits, times in units of FedAvg's total time."""
    curve, time_s = run["curve"], limits["time_s"]
    row: dict[str, float] = {
        "= rounds": last_within(curve, "round", num_rounds)["accuracy"],
        "= time": last_within(curve, "time_s", time_s)["accuracy"],
        "= bytes": last_within(curve, "bytes", limits["bytes"])["accuracy"],
    }
    for target, share in zip(targets, SHARES, strict=True):
        reached = first_reaching(curve, target, "accuracy")
        row[f"time to {share:.0%} of FedAvg" if is_relative else f"time to {target:.0%}"] = reached / time_s
    return row | {
        "time for the rounds": last_within(curve, "round", num_rounds)["time_s"] / time_s,
        "utilisation": run["utilisation_ratio"],
        "straggler wait": run["straggler_wait_ratio"],
        "N*": run["n_star_min"],
    }


if __name__ == "__main__":
    main()
