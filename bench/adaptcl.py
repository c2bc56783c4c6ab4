"""AdaptCL against FedAvg, smallest-everywhere, only-capable, HeteroFL and its own ablations: real data, virtual clock.

    python -m bench.adaptcl                   # everything; hours on 2 cores, resumable
    python -m bench.adaptcl --task digits --sigma 5
    python -m bench.adaptcl --kept --task cifar10-small-resnet8 --store bench/outcomes/adaptcl  # what is there, at once
    python -m bench.adaptcl --task cifar10-vgg11 --asynchronous --sparsity 1e-4    # the paper's rivals, one regulariser
    python -m bench.adaptcl --quick           # one small comparison, about a minute

Every run is kept in results/bench/adaptcl; a run that is there is not repeated. What is compared: total virtual time
for the same rounds, time to equal accuracy, accuracy of the base model and of the best member of the family, bytes and
MACs, and accuracy at equal virtual time: *smallest-everywhere* (the straggler's final width on all clients) runs as
many rounds as fit into AdaptCL's total time, with its learning rate annealed over them, and so do the variants of
AdaptCL whose rounds take as long. A round of an asynchronous method is as many answers as there are clients.
``digits-vit-scales`` is the ViT with a learnable scale for every head and neuron under an L1 penalty, whatever the
method: without them AdaptCL ranks a ViT's units by their L2 norm. ``cifar10-small-resnet8`` is CIFAR-10 averaged to
16 x 16 pixels, 20,000 images of it; the other CIFAR-10 tasks train on 4,000, which is what two cores bear. They need
``--data-dir`` with cifar10.npz or torchvision's files; without them they are left out, and the output says so.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.common import add_device, finish, print_table, seeds_of
from bench.common import options as common_options
from bench.runs import (
    Job,
    Keys,
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
VIT: Keys = {
    "model.name": "vit_micro",
    "train.optimizer": "adam",
    "train.learning-rate": 0.002,
    "evaluation.family-every": 5,
}
TASKS: dict[str, Task] = {
    "digits": Task({"evaluation.family-every": 1}, 40, 0.2, target=0.95),
    "digits-vit": Task(VIT, 40, 0.3),
    "digits-vit-scales": Task({**VIT, "model.scales": True, "train.sparsity": 1e-3}, 40, 0.3),
    "cifar10-small-resnet8": Task(
        {**CIFAR, "data.name": "cifar10@16", "data.max-train": 20000, "model.name": "resnet8"}, 30, 0.3
    ),
    "cifar10-resnet8": Task({**CIFAR, "model.name": "resnet8"}, 30, 0.3),
    "cifar10-vgg11": Task({**CIFAR, "model.name": "vgg11", "model.width": 0.25}, 30, 0.2),
}

PERIODS = ("evaluation.every", "evaluation.family-every")
"""Keys that count in rounds of the loop."""
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
    "adaptcl per-layer order": {**ADAPTCL, "adaptcl.scope": "per-layer"},
    "adaptcl per-layer order, any width": {**ADAPTCL, "adaptcl.scope": "per-layer", "adaptcl.round-to": 1},
    "adaptcl refreshed order": {**ADAPTCL, "adaptcl.order": "refreshed"},
    "adaptcl own orders": {**ADAPTCL, "adaptcl.identical": False},
    "adaptcl order by L1": {**ADAPTCL, "adaptcl.importance": "l1"},
    "adaptcl L1 1e-4": {**ADAPTCL, "train.sparsity": 1e-4},
    "adaptcl group lasso 1e-4": {**ADAPTCL, "train.sparsity": 1e-4, "train.sparsity-norm": "group-lasso"},
    "adaptcl DGC .1": {**ADAPTCL, "compression.kind": "dgc", "compression.density": 0.1},
    "smallest-everywhere": {"strategy": "fedavg"},
    "only-capable": {"strategy": "only-capable"},
    "fedasync": {"strategy": "fedasync"},
    "ssp": {"strategy": "ssp"},
    "dc-asgd": {"strategy": "dc-asgd"},
}
FOLLOWERS = ("adaptcl grow", "adaptcl grow, spare time works", "adaptcl floor, spare time works", "smallest-everywhere")
"""Methods whose every round takes as long as the straggler's smallest model: they run for AdaptCL's total time."""
CORE = ("fedavg", "heterofl", "adaptcl", "adaptcl plain objective", *FOLLOWERS, "only-capable")
ASYNCHRONOUS = ("fedasync", "ssp", "dc-asgd")
"""The paper's rivals that wait for nobody, or not for all."""
RIVAL = "smallest-everywhere"
"""Whom a method for unequal devices has to beat: rows say by how much it does, seed by seed, at AdaptCL's time."""
SLACK = 0.01
"""Of AdaptCL's total time: a follower's rounds are counted with the median of the straggler's times."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes
    ----------
    task, method : names in ``TASKS`` and ``METHODS``.
    sigma : the slowest device's time over the fastest's.
    seed : of the run and its data.
    sparsity : factor of the sparsity term (``train.sparsity``) that the run trains with, whatever its method.
    """

    task: str
    sigma: float
    seed: int
    method: str
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        """Of the file that keeps its outcome: another budget, or another regulariser, is another file."""
        task, method = TASKS[self.task], self.method.replace(",", "").replace(" ", "-")
        budget = f"{task.num_rounds}x{task.keys.get('data.max-train', 'all')}"
        sparsity = f"_sparsity{self.sparsity:g}" if self.sparsity else ""
        return f"{self.task}_{budget}_sigma{self.sigma:g}{sparsity}_seed{self.seed}_{method}"

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
    parser.add_argument("--ablations", action="store_true", help="AdaptCL's ablations beside the core methods")
    parser.add_argument("--asynchronous", action="store_true", help=f"{', '.join(ASYNCHRONOUS)} as well")
    parser.add_argument("--sparsity", type=float, default=0.0, help="train.sparsity of every method (default 0)")
    parser.add_argument("--data-dir", default="data")
    add_device(parser)
    add_store(parser, "adaptcl")
    options = parser.parse_args(arguments)
    options.store = store_of(options, "adaptcl")
    if options.quick:
        options.task, options.sigma, options.seeds = ["digits"], [5.0], 1
    cases = plan(options)
    if not options.kept:
        run_missing(cases, options)
    tables = [summarise(task, sigma, options) for task, sigma in dict.fromkeys((c.task, c.sigma) for c in cases)]
    for table in tables:
        regulariser = f", every method with train.sparsity={options.sparsity:g}" if options.sparsity else ""
        print_table(f"{table['task']}, slowest/fastest = {table['sigma']:g}{regulariser}", table["rows"])
    finish("adaptcl", options, {"tables": tables}, seeds=seeds_of(options))


def plan(options: argparse.Namespace) -> list[Case]:
    """The runs asked for."""
    is_asked = {m: options.asynchronous if m in ASYNCHRONOUS else options.ablations or m in CORE for m in METHODS}
    methods = options.method or [m for m in METHODS if is_asked[m]]
    has_images = options.kept or has_cifar(options.data_dir)
    tasks = [task for task in options.task or list(TASKS) if not task.startswith("cifar10") or has_images]
    for task in options.task or list(TASKS):
        if task not in tasks:
            print(f"left out: {task} (no CIFAR-10 in {options.data_dir}; see the README on data)")
    sigmas = options.sigma or [5.0, 2.0, 10.0]
    return [
        Case(task, sigma, seed, method, options.sparsity)
        for task in tasks
        for sigma in sigmas
        for seed in seeds_of(options)
        for method in methods
    ]


def run_missing(cases: Sequence[Case], options: argparse.Namespace) -> None:
    """Run every case whose outcome is not kept yet; followers after the run that they follow."""
    missing = [case for case in cases if not case.path(options.store).exists()]
    for adaptcl, group in itertools.groupby(missing, key=lambda case: replace(case, method="adaptcl")):
        together = list(group)
        for is_follower in (False, True):
            batch = [case for case in together if (case.method in FOLLOWERS) == is_follower]
            if is_follower and not adaptcl.path(options.store).exists():
                if batch:
                    names = ", ".join(case.name for case in batch)
                    print(f"left out: {names}: there is no run of adaptcl to follow")
                continue
            jobs = [Job(case.name, keys_of(case, options), options.store, outcome) for case in batch]
            complete(jobs, options)


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
        **({"train.sparsity": case.sparsity} if case.sparsity else {}),
        **METHODS[case.method],
    }
    if (merges := merges_a_round(keys)) > 1:
        periods = {name: int(task.keys.get(name, 1)) * merges for name in PERIODS}
        keys |= {"num-rounds": num_rounds * merges, **periods}
    if case.method in FOLLOWERS:
        adaptcl = load(replace(case, method="adaptcl").path(options.store))
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
            "best": best_of(row.get("family", [row])),
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

    def path_of(seed: int, method: str) -> Path:
        return Case(task, sigma, seed, method, options.sparsity).path(options.store)

    rows = []
    for method in [m for m in asked if any(path_of(seed, m).exists() for seed in seeds)]:
        by_seed = []
        for seed in seeds:
            paths = {m: path_of(seed, m) for m in (method, "fedavg", "adaptcl")}
            if not all(path.exists() for path in paths.values()):
                continue
            runs = {m: load(path) for m, path in paths.items()}
            row = compare(runs[method], runs["fedavg"], runs["adaptcl"], TASKS[task].target)
            row["rounds"] /= merges_a_round({**TASKS[task].keys, **METHODS[method]})
            if (rival := path_of(seed, RIVAL)).exists():
                time_s = runs["adaptcl"]["time_s"]
                row[f"over {RIVAL}"] = best_within(runs[method], time_s) - best_within(load(rival), time_s)
            by_seed.append(row)
        rows.append({"method": method, "seeds": len(by_seed), **over_seeds(by_seed)})
    about = {"sparsity": options.sparsity} if options.sparsity else {}
    return {"task": task, "sigma": sigma, **about, "rows": rows}


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
    """Accuracy of the best member at the last evaluation up to a virtual time."""
    return float(last_within(run["curve"], "time_s", time_s, SLACK)["best"])


if __name__ == "__main__":
    main()
