"""AdaptCL against FedAvg, smallest-everywhere, only-capable, HeteroFL and its own ablations: real data, virtual clock.

    python -m bench.adaptcl                   # everything; hours on 2 cores, resumable
    python -m bench.adaptcl --task digits --sigma 5
    python -m bench.adaptcl --kept --task cifar10-small-resnet8 --store bench/outcomes/adaptcl  # what is there, at once
    python -m bench.adaptcl --quick           # one small comparison, about a minute

Every run is kept in results/bench/adaptcl; a run that is there is not repeated. What is compared: total virtual time
for the same rounds, time to equal accuracy, accuracy of the base model and of the best member of the family, bytes and
MACs, and accuracy at equal virtual time: *smallest-everywhere* (the straggler's final width on all clients) runs as
many rounds as fit into AdaptCL's total time, with its learning rate annealed over them, and so do the variants of
AdaptCL whose rounds take as long. ``cifar10-small-resnet8`` is CIFAR-10 averaged to 16 x 16 pixels, 20,000 images of
it; the others train on 4,000, which is what two cores bear. The CIFAR-10 tasks need ``--data-dir`` with cifar10.npz or
torchvision's files; without them they are left out, and the output says so.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import add_device, finish, print_table, seeds_of
from bench.common import options as common_options
from bench.runs import STORES, Job, Keys, carry_out, has_cifar, load, over_seeds, read
from server_app.processes import count_cores


@dataclass(frozen=True)
class Task:
    """A learning problem with the budget that it gets.

    Attributes
    ----------
    keys : of the run config.
    num_rounds : of FedAvg and of every other method.
    floor : AdaptCL's least retention ratio here.
    target : accuracy of "time to equal accuracy"; None: what FedAvg has after 60 % of its rounds.
    """

    keys: Keys
    num_rounds: int
    floor: float
    target: float | None = None


CIFAR: Keys = {
    "data.name": "cifar10",
    "data.max-train": 4000,
    "data.max-test": 2000,
    "train.augment": "flip-shift",
    "train.schedule": "cosine",
    "evaluation.every": 3,
    "evaluation.family-every": 6,
}
TASKS: dict[str, Task] = {
    "digits": Task({"evaluation.family-every": 1}, 40, 0.2, target=0.95),
    "cifar10-small-resnet8": Task(
        {**CIFAR, "data.name": "cifar10@16", "data.max-train": 20000, "model.name": "resnet8"}, 30, 0.3
    ),
    "cifar10-resnet8": Task({**CIFAR, "model.name": "resnet8"}, 30, 0.3),
    "cifar10-vgg11": Task({**CIFAR, "model.name": "vgg11", "model.width": 0.25}, 30, 0.2),
}

ADAPTCL: Keys = {"strategy": "adaptcl"}
METHODS: dict[str, Keys] = {
    "fedavg": {"strategy": "fedavg"},
    "heterofl": {"strategy": "heterofl"},
    "adaptcl": ADAPTCL,
    "adaptcl plain objective": {**ADAPTCL, "adaptcl.local-objective": "plain"},
    "adaptcl grow": {**ADAPTCL, "adaptcl.rates.direction": "grow"},
    "adaptcl grow, spare time works": {
        **ADAPTCL,
        "adaptcl.rates.direction": "grow",
        "adaptcl.rates.spare-time": "work",
    },
    "adaptcl floor, spare time works": {
        **ADAPTCL,
        "adaptcl.rates.direction": "hold",
        "adaptcl.rates.spare-time": "work",
    },
    "adaptcl by-worker": {**ADAPTCL, "adaptcl.aggregation": "by-worker"},
    "adaptcl by-unit": {**ADAPTCL, "adaptcl.aggregation": "by-unit"},
    "adaptcl by-worker-residual": {**ADAPTCL, "adaptcl.aggregation": "by-worker-residual"},
    "adaptcl global order": {**ADAPTCL, "adaptcl.scope": "global"},
    "adaptcl refreshed order": {**ADAPTCL, "adaptcl.order": "refreshed"},
    "adaptcl own orders": {**ADAPTCL, "adaptcl.identical": False},
    "adaptcl L1 1e-4": {**ADAPTCL, "train.sparsity": 1e-4},
    "smallest-everywhere": {"strategy": "fedavg"},
    "only-capable": {"strategy": "only-capable"},
}
FOLLOWERS = ("adaptcl grow", "adaptcl grow, spare time works", "adaptcl floor, spare time works", "smallest-everywhere")
"""Methods whose every round takes as long as the straggler's smallest model: they run for AdaptCL's total time."""
CORE = ("fedavg", "heterofl", "adaptcl", "adaptcl plain objective", *FOLLOWERS, "only-capable")
RIVAL = "smallest-everywhere"
"""Whom a method for unequal devices has to beat: rows say by how much it does, seed by seed, at AdaptCL's time."""


@dataclass(frozen=True)
class Case:
    """One run."""

    task: str
    sigma: float
    seed: int
    method: str

    @property
    def name(self) -> str:
        """Of the file that keeps its outcome: another budget is another file."""
        task, method = TASKS[self.task], self.method.replace(",", "").replace(" ", "-")
        budget = f"{task.num_rounds}x{task.keys.get('data.max-train', 'all')}"
        return f"{self.task}_{budget}_sigma{self.sigma:g}_seed{self.seed}_{method}"

    def path(self, store: Path) -> Path:
        """Where its outcome is kept."""
        return store / f"{self.name}.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the tables."""
    parser = common_options("adaptcl", __doc__)
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--sigma", action="append", type=float)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only these; repeatable")
    parser.add_argument("--ablations", action="store_true", help="all ablations, not only the core methods")
    parser.add_argument("--data-dir", default="data")
    add_device(parser)
    parser.add_argument("--workers", type=int, default=count_cores(), help="runs at once")
    parser.add_argument("--store", type=Path, default=STORES / "adaptcl")
    parser.add_argument("--kept", action="store_true", help="run nothing: the tables of what the store has")
    options = parser.parse_args(arguments)
    if options.quick:
        options.task, options.sigma, options.seeds = ["digits"], [5.0], 1
        options.store = options.store.with_name("adaptcl-quick")
    cases = plan(options)
    if not options.kept:
        run_missing(cases, options)
    tables = [summarise(task, sigma, options) for task, sigma in dict.fromkeys((c.task, c.sigma) for c in cases)]
    for table in tables:
        print_table(f"{table['task']}, slowest/fastest = {table['sigma']:g}", table["rows"])
    finish("adaptcl", options, {"tables": tables}, seeds=seeds_of(options))


def plan(options: argparse.Namespace) -> list[Case]:
    """The runs asked for."""
    methods = options.method or [m for m in METHODS if options.ablations or m in CORE]
    has_images = options.kept or has_cifar(options.data_dir)
    tasks = [task for task in options.task or list(TASKS) if task == "digits" or has_images]
    for task in options.task or list(TASKS):
        if task not in tasks:
            print(f"left out: {task} (no CIFAR-10 in {options.data_dir}; see the README on data)")
    sigmas = options.sigma or [5.0, 2.0, 10.0]
    return [
        Case(task, sigma, seed, method)
        for task in tasks
        for sigma in sigmas
        for seed in seeds_of(options)
        for method in methods
    ]


def run_missing(cases: Sequence[Case], options: argparse.Namespace) -> None:
    """Run every case whose outcome is not kept yet; followers after the run that they follow."""
    missing = [case for case in cases if not case.path(options.store).exists()]
    for (task, sigma, seed), group in itertools.groupby(missing, key=lambda case: (case.task, case.sigma, case.seed)):
        together = list(group)
        for is_follower in (False, True):
            batch = [case for case in together if (case.method in FOLLOWERS) == is_follower]
            if is_follower and not Case(task, sigma, seed, "adaptcl").path(options.store).exists():
                print(f"left out: {', '.join(case.name for case in batch)}: there is no run of adaptcl to follow")
                continue
            jobs = [Job(case.name, keys_of(case, options), options.store, outcome) for case in batch]
            for name, reason in carry_out(jobs, options.workers).items():
                print(f"left out: {name}: {reason}")


def keys_of(case: Case, options: argparse.Namespace) -> Keys:
    """The run config of a case."""
    task = TASKS[case.task]
    num_rounds = 8 if options.quick else task.num_rounds
    keys: Keys = {
        **task.keys,
        "data.dir": str(Path(options.data_dir).absolute()),
        "train.device": options.device,
        "fleet.name": f"linear:{case.sigma:g}",
        "seed": case.seed,
        "data.seed": case.seed,
        "num-rounds": num_rounds,
        "adaptcl.rates.min-retention-ratio": task.floor,
        **METHODS[case.method],
    }
    if case.method in FOLLOWERS:
        adaptcl = load(Case(case.task, case.sigma, case.seed, "adaptcl").path(options.store))
        keys["num-rounds"] = max(1, int(adaptcl["time_s"] / adaptcl["least_round_s"]))
        if case.method == "smallest-everywhere":
            keys["fedavg.retention-ratio"] = min(1.0, adaptcl["least_ratio"] + 1e-6)
            keys["fedavg.round-to"] = 1  # rounded down it would not use the time it is given
    return keys


def outcome(log: Path) -> dict[str, Any]:
    """What the tables need of an event log: curves, totals, the least retention ratio."""
    rows = read(log)
    arrivals = [row for row in rows if row["event"] == "arrival"]
    evaluations = [row for row in rows if row["event"] == "evaluation"]
    with_family = [row for row in evaluations if "family" in row]
    curve = [
        {
            "round": row["server_round"],
            "time_s": row["time_s"],
            "base": row["accuracy"],
            "base_reestimated": row["accuracy_reestimated"],
            "best": max(max(m["accuracy"], m["accuracy_reestimated"]) for m in row.get("family", [row])),
        }
        for row in with_family or evaluations
    ]
    least_ratio = min(row["retention_ratio"] for row in arrivals)
    least_times: dict[int, list[float]] = {}
    for row in arrivals:
        if row["retention_ratio"] == least_ratio:
            least_times.setdefault(row["partition_id"], []).append(row["update_time_s"])
    return {
        "curve": curve,
        "time_s": curve[-1]["time_s"],
        "upload_bytes": sum(row["upload_bytes"] for row in arrivals),
        "download_bytes": sum(row["download_bytes"] for row in arrivals),
        "train_macs": sum(row.get("train_macs", 0) for row in arrivals),
        "least_ratio": least_ratio,
        "least_round_s": max(statistics.median(times) for times in least_times.values()),
    }


def summarise(task: str, sigma: float, options: argparse.Namespace) -> dict[str, Any]:
    """One table: every method against FedAvg, as means over seeds of ratios taken seed by seed."""
    seeds = seeds_of(options)
    asked = options.method or list(METHODS)
    methods = [m for m in asked if any(Case(task, sigma, seed, m).path(options.store).exists() for seed in seeds)]
    rows = []
    for method in methods:
        by_seed = []
        for seed in seeds:
            cases = {m: Case(task, sigma, seed, m) for m in (method, "fedavg", "adaptcl")}
            if not all(case.path(options.store).exists() for case in cases.values()):
                continue
            runs = {m: load(case.path(options.store)) for m, case in cases.items()}
            row = compare(runs[method], runs["fedavg"], runs["adaptcl"], TASKS[task].target)
            rival = Case(task, sigma, seed, RIVAL).path(options.store)
            if rival.exists():
                time_s = runs["adaptcl"]["time_s"]
                row[f"over {RIVAL}"] = best_within(runs[method], time_s) - best_within(load(rival), time_s)
            by_seed.append(row)
        rows.append({"method": method, "seeds": len(by_seed), **over_seeds(by_seed)})
    return {"task": task, "sigma": sigma, "rows": rows}


def compare(
    run: Mapping[str, Any], fedavg: Mapping[str, Any], adaptcl: Mapping[str, Any], target: float | None
) -> dict[str, float]:
    """One run against FedAvg's and AdaptCL's of the same seed; times as ratios to FedAvg's."""
    reference = fedavg["curve"]
    num_rounds = reference[-1]["round"]
    if target is None:
        target = max(p["best"] for p in reference if p["round"] <= 0.6 * num_rounds)
    reached, needed = first_reaching(run["curve"], target), first_reaching(reference, target)
    last = run["curve"][-1]
    return {
        "rounds": last["round"],
        "total time": last["time_s"] / fedavg["time_s"],
        "target": target,
        "time to target": reached / needed if needed else float("nan"),
        "base": last["base"],
        "base re-est.": last["base_reestimated"],
        "best of family": last["best"],
        "best at AdaptCL's time": best_within(run, adaptcl["time_s"]),
        "upload": run["upload_bytes"] / fedavg["upload_bytes"],
        "MACs": run["train_macs"] / fedavg["train_macs"],
    }


def best_within(run: Mapping[str, Any], time_s: float) -> float:
    """Accuracy of the best member at the last evaluation up to a virtual time, give or take a hundredth."""
    return float([point["best"] for point in run["curve"] if point["time_s"] <= time_s * 1.01][-1])


def first_reaching(curve: Sequence[Mapping[str, float]], target: float) -> float:
    """Virtual time at which the best member first has ``target``; infinite if never."""
    return next((point["time_s"] for point in curve if point["best"] >= target), float("inf"))


if __name__ == "__main__":
    main()
