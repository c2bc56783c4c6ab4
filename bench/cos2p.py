"""Co-S2P against its ablations and its rivals on 16 unequal Jetsons: real data, virtual clock, equal time budgets.

    python -m bench.cos2p                          # everything; hours on 2 cores, resumable
    python -m bench.cos2p --task digits --seeds 1
    python -m bench.cos2p --quick                  # a small comparison, a few minutes

Every run is kept in results/bench/cos2p; a run that is there is not repeated. Each method goes on, at one learning
rate, until the same virtual time has passed, so that its curve can be read at any time before, too. The clock is the
fleet's; memory is counted by every client, and measured in client processes of their own (ViT-Tiny) for Co-S2P and its
rivals, each device class and phase, unless --method says what to run. *Slow clients* are the slower half, who hold the
smaller sub-models. The CIFAR tasks need ``--data-dir`` with NAME.npz or torchvision's files; without them they are left
out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.common import add_device, finish, print_table, seeds_of
from bench.common import options as common_options
from bench.cos2p_memory import HALF, kept_memory, saved_ratios
from bench.runs import (
    FOLDERS,
    Job,
    Keys,
    add_store,
    best_of,
    complete,
    first_reaching,
    has_cifar,
    last_within,
    load,
    mean_and_spread,
    over_seeds,
    read,
    store_of,
)
from fleet.fleet import make_fleet
from reporting.summary import utilisation
from server_app.config import parse_overrides

RATES = "1,0.75,0.5,0.25"
NEAR = 0.97
"""Share of the lower of two accuracies that counts as equal accuracy: curves end on a plateau, in noise."""
Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Method -> seed -> outcome."""


@dataclass(frozen=True)
class Task:
    """A learning problem and the virtual time that every method gets for it.

    Attributes
    ----------
    keys : of the run config.
    budget_s : virtual seconds.
    """

    keys: Keys
    budget_s: float


COMMON: Keys = {
    "num-clients": 16,
    "fleet.name": "jetson-16",
    "data.partition": "merged-dirichlet:1.5",
    "model.exits": True,
    "train.local-epochs": 5,
    "train.batch-size": 16,
    "train.schedule": "constant",
    "evaluation.where": "both",
    "evaluation.family-every": 1,
    "num-rounds": 5,  # at first: a run goes on until its time is over
}
VIT: Keys = {"model.name": "vit_micro", "train.optimizer": "adam", "train.learning-rate": 0.002}
VIT_TINY: Keys = {**VIT, "model.name": "vit_tiny", "model.patch-size": 2, "train.learning-rate": 0.001}
RESNET: Keys = {"model.name": "resnet20", "train.learning-rate": 0.05, "train.local-epochs": 2}
CIFAR: Keys = {"data.max-train": 4000, "data.max-test": 2000, "train.augment": "flip-shift"}
TASKS: dict[str, Task] = {
    "digits": Task({**COMMON, **VIT, "data.name": "digits"}, 40.0),
    "digits-vit-tiny": Task({**COMMON, **VIT_TINY, "data.name": "digits"}, 400.0),
    "cifar10": Task({**COMMON, **VIT, **CIFAR, "data.name": "cifar10"}, 120.0),
    "cifar100": Task({**COMMON, **VIT, **CIFAR, "data.name": "cifar100"}, 120.0),
    "cifar10-resnet20": Task({**COMMON, **RESNET, **CIFAR, "data.name": "cifar10"}, 200.0),
}

OURS: Keys = {"strategy": "cos2p", "cos2p.budgets": RATES, "cos2p.mask-epochs": 5, "cos2p.kd-start": 5}
METHODS: dict[str, Keys] = {
    "cos2p": OURS,
    "cos2p own masks": {**OURS, "cos2p.masks": "learned"},
    "cos2p random masks": {**OURS, "cos2p.masks": "random"},
    "cos2p first units": {**OURS, "cos2p.masks": "first"},
    "cos2p no distillation": {**OURS, "cos2p.transfer": "none"},
    "cos2p mutual": {**OURS, "cos2p.transfer": "mutual"},
    "cos2p synchronous": {**OURS, "cos2p.quorum-ratio": 1.0},
    "cos2p per-entry norm": {**OURS, "cos2p.coverage-norm": "per-entry"},
    "cos2p published weight": {**OURS, "cos2p.client-weight": "published"},
    "cos2p samples": {**OURS, "cos2p.client-weight": "samples"},
    "cos2p uniform": {**OURS, "cos2p.client-weight": "uniform"},
    "cos2p polynomial": {**OURS, "cos2p.client-weight": "polynomial"},
    "fedavg": {"strategy": "fedavg"},
    "only-capable": {"strategy": "only-capable"},
    "smallest-everywhere": {"strategy": "smallest-everywhere"},
    "heterofl": {"strategy": "heterofl", "heterofl.rates": RATES},
    "fjord": {"strategy": "fjord", "fjord.rates": RATES},
    "fedrolex": {"strategy": "fedrolex", "fedrolex.rates": RATES},
    "depthfl": {"strategy": "depthfl"},
    "fiarse": {"strategy": "fiarse"},
}
RIVALS = ("fedavg", "only-capable", "smallest-everywhere", "heterofl", "fjord", "fedrolex", "depthfl", "fiarse")
PARTS = {"cos2p random masks": "masks agreed on above random ones", "cos2p no distillation": "distillation above none"}
"""Co-S2P without one of its parts -> what the part is for."""
QUICK = ("cos2p", "cos2p synchronous", "fedavg")
QUICK_MEMORY = ("cos2p", "fedavg")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, print the tables."""
    parser = common_options("cos2p", __doc__)
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only these")
    parser.add_argument("--also", action="append", default=[], metavar="KEY=VALUE", help="a setting of all of Co-S2P's")
    parser.add_argument("--seeds", type=int, default=3)
    add_device(parser)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--budget", type=float, default=1.0, help="times the virtual time of every task")
    add_store(parser, "cos2p")
    options = parser.parse_args(arguments)
    options.store = store_of(options, "cos2p")
    is_whole = options.quick or not options.method
    if options.quick:
        options.task, options.seeds, options.method = ["digits"], 1, list(QUICK)
    tasks = tasks_there(options)
    methods = options.method or list(METHODS)
    jobs = [job_of(task, seed, method, options) for task in tasks for seed in seeds_of(options) for method in methods]
    complete(jobs, options)
    compared = {name: METHODS[name] for name in (QUICK_MEMORY if options.quick else ("cos2p", *RIVALS))}
    model = "vit_micro" if options.quick else "vit_tiny"
    memory = kept_memory(options.store, compared, model, may_measure=not options.kept and is_whole)
    print_table("peak of a client process above its peak before the request, and what it counts, MiB", memory)
    tables = [summarise(task, options, memory) for task in tasks]
    for table in tables:
        print_table(f"{table['task']}: {table['budget_s']:g} virtual seconds, {table['seeds']} seeds", table["rows"])
        print_table(f"{table['task']}: the abstract's claims beside what was found", table["claims"])
    return finish("cos2p", options, {"memory": memory, "tables": tables}, seeds=seeds_of(options))


def tasks_there(options: argparse.Namespace) -> list[str]:
    """The tasks asked for whose data there is."""
    tasks: list[str] = options.task or list(TASKS)
    there = [
        t
        for t in tasks
        if options.kept or (name := str(TASKS[t].keys["data.name"])) not in FOLDERS or has_cifar(options.data_dir, name)
    ]
    for task in sorted(set(tasks) - set(there)):
        print(f"left out: {task} (no data in {options.data_dir}; see the README on data)")
    return there


def budget_of(task: str, options: argparse.Namespace) -> float:
    """Virtual seconds that a method gets."""
    return TASKS[task].budget_s * options.budget * (0.15 if options.quick else 1.0)


def job_of(task: str, seed: int, method: str, options: argparse.Namespace) -> Job:
    """One run."""
    quick: Keys = {"data.max-train": 640, "train.local-epochs": 1} if options.quick else {}
    also = options.also if METHODS[method]["strategy"] == "cos2p" else []
    keys = {
        **TASKS[task].keys,
        **quick,
        "data.dir": str(Path(options.data_dir).absolute()),
        "train.device": options.device,
        "seed": seed,
        "data.seed": seed,
        **parse_overrides(also),
        **METHODS[method],
    }
    budget_s = budget_of(task, options)
    name = "_".join((task, f"{budget_s:g}s", f"seed{seed}", method.replace(" ", "-"), *also))
    return Job(name, keys, options.store, outcome, until_s=budget_s)


def outcome(log: Path) -> dict[str, Any]:
    """What the tables need of an event log: the curve, totals, memory and N*."""
    rows = read(log)
    arrivals = [row for row in rows if row["event"] == "arrival"]
    merges = [row for row in rows if row["event"] == "merge"]
    personal = {row["server_round"]: row for row in rows if row.get("where") == "federated"}
    curve, upload_bytes = [], 0
    for row in rows:
        if row["event"] == "arrival":
            upload_bytes += row["upload_bytes"]
        elif row["event"] == "evaluation" and row["where"] == "central":
            family = {member["name"]: member["accuracy"] for member in row.get("family", [])}
            clients = personal.get(row["server_round"], {}).get("clients", {})
            curve.append(
                {
                    "time_s": row["time_s"],
                    "rounds": row["server_round"],
                    "upload_bytes": upload_bytes,
                    "base": row["accuracy"],
                    "best": best_of([row, *row.get("family", [])]),
                    "family": family,
                    "clients": clients,
                }
            )
    num_clients = next(len(row["clients"]) for row in rows if row["event"] == "clients")
    last, busy_s = max(row["finish_s"] for row in arrivals), sum(row["update_time_s"] for row in arrivals)
    return {
        "curve": curve,
        "time_s": merges[-1]["time_s"],
        "num_rounds": len(merges),
        "utilisation": utilisation(busy_s, num_clients, max(last, merges[-1]["time_s"])),
        "n_star": statistics.median(row["n_star"] for row in merges),
        "stale_ratio": sum(row["staleness"] > 0 for row in arrivals) / len(arrivals),
        "peak_memory": {str(pid): max(_peaks(arrivals, pid)) for pid in sorted({r["partition_id"] for r in arrivals})},
    }


def _peaks(arrivals: Sequence[Mapping[str, Any]], pid: int) -> list[float]:
    return [row.get("peak_memory_bytes", 0) for row in arrivals if row["partition_id"] == pid]


def summarise(task: str, options: argparse.Namespace, memory: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One table: every method at the end of the same virtual time, and the claims."""
    budget_s = budget_of(task, options)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for method in METHODS:
        paths = {seed: job_of(task, seed, method, options).path for seed in seeds_of(options)}
        if found := {seed: load(path) for seed, path in paths.items() if path.exists()}:
            runs[method] = found
    reference = runs.get("fedavg") or next(iter(runs.values()), {})
    targets = {seed: 0.95 * best_at(run, budget_s) for seed, run in reference.items()}
    rows = []
    for method, by_seed in runs.items():
        found_by_seed = [figures(run, budget_s, targets.get(seed)) for seed, run in by_seed.items()]
        rows.append({"method": method, "seeds": len(by_seed), **over_seeds(found_by_seed)})
    return {
        "task": task,
        "budget_s": budget_s,
        "seeds": options.seeds,
        "rows": rows,
        "claims": claims(runs, budget_s, memory),
        "raw": {
            method: [{"seed": seed, **slim(run, budget_s)} for seed, run in by_seed.items()]
            for method, by_seed in runs.items()
        },
    }


def at_time(run: Mapping[str, Any], time_s: float) -> Mapping[str, Any]:
    """The last evaluation within a virtual time."""
    return last_within(run["curve"], "time_s", time_s)


def best_at(run: Mapping[str, Any], time_s: float) -> float:
    """Accuracy of the best of base and family then."""
    return float(at_time(run, time_s)["best"])


def figures(run: Mapping[str, Any], budget_s: float, target: float | None) -> dict[str, float]:
    """The columns of one run; there is no target (NaN) where the run that sets it for this seed is missing."""
    point = at_time(run, budget_s)
    clients, memory = point["clients"], run["peak_memory"]
    slow, fast = halves()
    return {
        "rounds": point["rounds"],
        "base": point["base"],
        "best of family": point["best"],
        "in half the time": best_at(run, budget_s / 2),
        "clients' own": mean_of(clients, slow + fast),
        "slow clients' own": slow_own(run, budget_s),
        "first exit": point["family"].get("exit 1", float("nan")),
        "time to target": float("nan") if target is None else first_reaching(run["curve"], target),
        "utilisation": run["utilisation"],
        "median N*": run["n_star"],
        "upload MB": point["upload_bytes"] / 1e6,
        "slow clients' MiB": mean_of(memory, slow) / 2**20,
        "fast clients' MiB": mean_of(memory, fast) / 2**20,
    }


@cache
def halves() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Partition ids of the slower half of the devices, which hold the smaller sub-models, and of the faster one."""
    fleet = make_fleet(str(COMMON["fleet.name"]), int(COMMON["num-clients"]))
    by_speed = [str(pid) for pid in sorted(range(len(fleet)), key=lambda pid: -fleet.speed_ranks[pid])]
    return tuple(by_speed[: len(fleet) // 2]), tuple(by_speed[len(fleet) // 2 :])


def mean_of(figures: Mapping[str, float], clients: Sequence[str]) -> float:
    """Mean of the figures of those of the clients who have one; NaN if nobody has."""
    found = [figures[pid] for pid in clients if pid in figures]
    return statistics.fmean(found) if found else float("nan")


def slim(run: Mapping[str, Any], budget_s: float) -> dict[str, Any]:
    """What of a run is kept with the figures."""
    point = at_time(run, budget_s)
    kept = {name: run[name] for name in ("num_rounds", "time_s", "utilisation", "n_star", "stale_ratio")}
    curve = [[round(p["time_s"], 3), round(p["best"], 4)] for p in run["curve"]]
    return kept | {name: point[name] for name in ("upload_bytes", "base", "best", "family")} | {"curve": curve}


def claims(runs: Runs, budget_s: float, memory: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The abstract's four claims: what it says, and what was found here; runs are compared seed by seed.

    ``memory`` is what ``measure_memory`` returns.
    """
    found, gains = [], {}
    for name in RIVALS:
        if pairs := paired(runs, "cos2p", name):
            gains[name] = statistics.fmean(best_at(a, budget_s) - best_at(b, budget_s) for a, b in pairs)
    ranked = sorted(gains, key=lambda name: -gains[name])
    for what, name in (("best", ranked[-1]), ("worst", ranked[0])) if ranked else ():
        gain = f"{100 * gains[name]:+.1f} against the {what} rival, {name}"
        found.append({"claim": "accuracy up to +8.8 points", "found": gain})
    pairs = paired(runs, "cos2p", "cos2p synchronous")
    if pairs:
        ratio = mean_and_spread([a["utilisation"] / b["utilisation"] for a, b in pairs])
        found.append({"claim": "utilisation up to 1.2x", "found": f"{ratio} x of synchronous"})
    if memory:
        found.append({"claim": "memory about -22 %", "found": f"{saved_memory(memory)} (ViT-Tiny)"})
    if pairs:
        saved = statistics.fmean(saved_time(a, b, budget_s) for a, b in pairs)
        how = f"{-100 * saved:+.0f} % of synchronous, to {NEAR:g} of the lower accuracy of the two"
        found.append({"claim": "time about -24 %", "found": how})
    for name, what in PARTS.items():
        if pairs := paired(runs, "cos2p", name):
            points = mean_and_spread([100 * (slow_own(a, budget_s) - slow_own(b, budget_s)) for a, b in pairs], 1)
            if points:
                found.append({"claim": f"slow clients' own: {what}", "found": f"{points} points"})
    return found


def slow_own(run: Mapping[str, Any], time_s: float) -> float:
    """Accuracy of the slow clients' own sub-models, each on its client's test, at a virtual time."""
    return mean_of(at_time(run, time_s)["clients"], halves()[0])


def paired(runs: Runs, ours: str, theirs: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Two methods' runs of the seeds that both have."""
    mine, rival = runs.get(ours, {}), runs.get(theirs, {})
    return [(mine[seed], rival[seed]) for seed in mine if seed in rival]


def saved_memory(memory: Sequence[Mapping[str, Any]]) -> str:
    """What clients of rate .5 measured, against the full model's training, in both phases."""
    half = {phase: f"{100 * ratio:+.0f} %" for phase, ratio in saved_ratios(memory, "cos2p", HALF).items()}
    return f"{half['masks + weights']} measured at rate .5 while masks are learned, {half['weights']} after that"


def saved_time(ours: Mapping[str, Any], theirs: Mapping[str, Any], budget_s: float) -> float:
    """Share of their time that ours does not need until both are as accurate, nearly, as the less accurate one."""
    target = NEAR * min(best_at(ours, budget_s), best_at(theirs, budget_s))
    return 1 - first_reaching(ours["curve"], target) / max(1e-9, first_reaching(theirs["curve"], target))


if __name__ == "__main__":
    main()
