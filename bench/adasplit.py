"""AdaSplit against SL-basic, SplitFed, FedAvg, FedProx, SCAFFOLD and FedNova: accuracy, bandwidth, client compute, C3.

    python -m bench.adasplit                          # everything; resumable; stops starting runs after --hours (6)
    python -m bench.adasplit --part compare --benchmark mixed-cifar
    python -m bench.adasplit --part sweeps
    python -m bench.adasplit --quick                  # a small version on digits, about two minutes

Mixed-CIFAR: CIFAR-10 as five disjoint pairs of classes. Mixed-NonIID: five tasks of five classes from five data sets
(``bench.mixed``; the images are not part of the project). Every client answers among its own classes: its identity is
known when it is tested. iid: the same images of CIFAR-10 dealt out at random, where end-to-end methods are at home.

Equal tuning: every method gets the same three trials of its learning rate, on a seed that is used for nothing else,
under Adam where it can (SCAFFOLD and FedNova are defined for SGD and get theirs there). Equal samples, augmentation
(none) and rounds. Budgets of C3: the largest spending of the compared methods, per benchmark; other temperatures and
counted bandwidth stand beside. Every run is kept in results/bench/adasplit; one that is there is not repeated.
``--device`` is the clients': the server's half of split learning works on the CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import RESULTS, add_device, finish, print_table, seeds_of
from bench.common import options as common_options
from bench.mixed import has_data
from bench.runs import Job, Keys, add_store, complete, load, store_of
from reporting.c3 import TEMPERATURE, Spending, budgets_of, scores, spending_of
from reporting.log import read_events
from wire.flat import Scalar

BENCHMARKS: dict[str, Keys] = {
    "mixed-cifar": {"data.name": "bench.mixed:mixed_cifar", "data.partition": "label-blocks:2"},
    "mixed-noniid": {"data.name": "bench.mixed:mixed_noniid", "data.partition": "label-blocks:5"},
    "iid": {"data.name": "bench.mixed:mixed_cifar", "data.partition": "iid"},
    "digits": {"data.name": "digits", "data.partition": "label-blocks:2"},
}
ADAM, SGD = (1e-3, 3e-4, 3e-3), (0.03, 0.01, 0.1)
METHODS: dict[str, tuple[Keys, str]] = {
    "adasplit": ({"strategy": "adasplit"}, "adam"),
    "adasplit, third layer": ({"strategy": "adasplit", "adasplit.cut": "3"}, "adam"),
    "adasplit, hand-off": (
        {"strategy": "adasplit", "adasplit.exchange": "exact", "adasplit.client-sync": "handoff"},
        "adam",
    ),
    "sl-basic": ({"strategy": "sl-basic"}, "adam"),
    "splitfed": ({"strategy": "splitfed"}, "adam"),
    "fedavg": ({"strategy": "fedavg"}, "adam"),
    "fedprox": ({"strategy": "fedprox"}, "adam"),
    "scaffold": ({"strategy": "scaffold", "train.momentum": 0.0}, "sgd"),
    "fednova": ({"strategy": "fednova", "train.momentum": 0.0}, "sgd"),
}
ABLATIONS: dict[str, Keys] = {
    "no masks": {"adasplit.mask.kind": "none"},
    "hard masks": {"adasplit.mask.kind": "hard"},
    "random selection": {"adasplit.selection": "random"},
    "random client half": {"adasplit.train-client": False},
    "hand-off": {"adasplit.exchange": "exact", "adasplit.client-sync": "handoff"},
    "server gradient": {"adasplit.exchange": "exact", "adasplit.server-gradient": True},
    "averaged halves": {"adasplit.client-sync": "average"},
    "frozen exchange": {"adasplit.exchange": "frozen"},
    "fp16": {"adasplit.precision": "fp16"},
    "third layer": {"adasplit.cut": "3"},
    "third layer, hand-off": {"adasplit.cut": "3", "adasplit.exchange": "exact", "adasplit.client-sync": "handoff"},
    "ucb, 50 clients": {"num-clients": 50},
    "random, 50 clients": {"num-clients": 50, "adasplit.selection": "random"},
}
SWEEPS: dict[str, tuple[str, tuple[Scalar, ...]]] = {
    "kappa": ("adasplit.kappa", (0.3, 0.45, 0.6, 0.75, 0.9)),
    "eta": ("adasplit.eta", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "cut": ("adasplit.cut", ("1", "2", "3", "4")),
    "beta": ("adasplit.beta", (0.0, 1e-7, 1e-6, 1e-5)),
}
PUBLISHED: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "mixed-cifar": {
        "adasplit": (0.9163, 3.63, 2.38, 0.880),
        "sl-basic": (0.7093, 25.98, 1.66, 0.624),
        "splitfed": (0.6576, 29.51, 1.66, 0.570),
        "fedavg": (0.9161, 2.39, 11.77, 0.800),
        "fedprox": (0.9255, 2.39, 11.77, 0.808),
    },
    "mixed-noniid": {
        "adasplit": (0.8888, 9.71, 5.38, 0.842),
        "sl-basic": (0.8465, 84.64, 3.76, 0.727),
        "splitfed": (0.8464, 84.54, 3.76, 0.727),
        "fedavg": (0.8421, 2.39, 17.13, 0.741),
        "fedprox": (0.8509, 2.39, 17.13, 0.748),
    },
}
"""Benchmark -> method -> accuracy, GB, client TMAC, C3 (five clients, five seeds, all images)."""
TUNING_SEED = 1000
ACCURACY, BANDWIDTH = "#1f5fa8", "#b5541c"
"""Colours of the curves."""


@dataclass(frozen=True)
class Case:
    """One run: a method, or AdaSplit with something changed, within a budget of rounds and images."""

    benchmark: str
    method: str
    variant: str
    seed: int
    rate: float
    budget: str

    @property
    def name(self) -> str:
        """Of the file that keeps its outcome: another budget is another file."""
        who = f"{self.method}_{self.variant or 'plain'}_lr{self.rate:g}_seed{self.seed}"
        words = f"{self.benchmark}_{self.budget}_{who}"
        return words.replace(" ", "-").replace(",", "")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing and the time allows, print the tables, draw the curves."""
    parser = common_options("adasplit", __doc__)
    parser.add_argument("--part", action="append", choices=("compare", "ablations", "sweeps"))
    parser.add_argument("--benchmark", action="append", choices=[name for name in BENCHMARKS if name != "digits"])
    parser.add_argument("--method", action="append", choices=list(METHODS), help="compare only these; repeatable")
    parser.add_argument("--variant", action="append", choices=list(ABLATIONS), help="only these ablations; repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--images", type=int, default=2000, help="of a client (default 2000; the paper has 12,000)")
    parser.add_argument("--hours", type=float, default=6.0, help="no run is started after so long")
    add_device(parser)
    add_store(parser, "adasplit")
    chosen = parser.parse_args(arguments)
    chosen.store = store_of(chosen, "adasplit")
    chosen.part = chosen.part or ["compare", "ablations", "sweeps"]
    chosen.benchmark = chosen.benchmark or ["mixed-cifar", "mixed-noniid", "iid"]
    chosen.method = chosen.method or list(METHODS)
    if chosen.quick:
        chosen.part, chosen.benchmark, chosen.seeds, chosen.rounds = ["compare"], ["digits"], 1, 5
    elif not chosen.kept and not has_data():
        parser.error("the images are not there: set PRUNUS_DATA to the folder that holds their load.py, or use --quick")
    os.environ["MIXED_IMAGES"] = str(chosen.images)
    deadline = time.monotonic() + chosen.hours * 3600
    tables = [table for name in chosen.benchmark for table in tables_of(name, chosen, deadline)]
    for table in tables:
        print_table(table["title"], table["rows"])
    sweeps = {name: table["rows"] for table in tables for name in SWEEPS if table["title"].endswith(f": {name}")}
    curves = {name: rows for name, rows in sweeps.items() if rows}  # none: every run of a knob has failed
    if curves:
        draw(curves, (chosen.out or RESULTS / "adasplit.json").with_suffix(".svg"))
    return finish("adasplit", chosen, {"tables": tables, "budget_hours": chosen.hours}, seeds=seeds_of(chosen))


def tables_of(benchmark: str, chosen: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """Everything that was asked for on one benchmark."""
    budget = budget_of(chosen)
    rates = tuned(benchmark, chosen, deadline)
    made = []
    if "compare" in chosen.part:
        cases = [Case(benchmark, m, "", seed, rates[m], budget) for m in chosen.method for seed in seeds_of(chosen)]
        run_missing(cases, chosen, deadline)
        made.append({"title": f"{benchmark}: methods", "rows": rows_of(benchmark, cases, chosen)})
    rate = rates["adasplit"]
    if "ablations" in chosen.part and benchmark == "mixed-cifar":
        variants, seeds = ("", *(chosen.variant or ABLATIONS)), seeds_of(chosen)
        cases = [Case(benchmark, "adasplit", v, seed, rate, budget) for v in variants for seed in seeds]
        run_missing(cases, chosen, deadline)
        made.append({"title": f"{benchmark}: ablations of AdaSplit", "rows": rows_of(benchmark, cases, chosen)})
    if "sweeps" in chosen.part and benchmark == "mixed-cifar":
        for name, (_, values) in SWEEPS.items():
            cases = [Case(benchmark, "adasplit", f"{name} {value}", 0, rate, budget) for value in values]
            run_missing(cases, chosen, deadline)
            made.append({"title": f"{benchmark}: {name}", "rows": rows_of(benchmark, cases, chosen)})
    return made


def tuned(benchmark: str, chosen: argparse.Namespace, deadline: float) -> dict[str, float]:
    """The best of three learning rates of every method, on a seed of its own and half of the rounds."""
    trials = {m: ADAM if kind == "adam" else SGD for m, (_, kind) in METHODS.items()}
    if chosen.quick:
        return {m: values[0] for m, values in trials.items()}
    compared = chosen.method if "compare" in chosen.part else []
    varied = ["adasplit"] if chosen.part != ["compare"] else []
    wanted, budget = dict.fromkeys([*compared, *varied]), budget_of(chosen)
    cases = {m: [Case(benchmark, m, "", TUNING_SEED, rate, budget) for rate in trials[m]] for m in wanted}
    run_missing([case for group in cases.values() for case in group], chosen, deadline)
    best = {m: values[0] for m, values in trials.items()}
    for m, group in cases.items():
        known = {case.rate: outcome_of(case, chosen) for case in group}
        found = {rate: run.accuracy for rate, run in known.items() if run is not None}
        if len(found) < len(group):
            print(f"{benchmark}, {m}: only {len(found)} of {len(group)} learning rates were tried")
        best[m] = max(found, key=lambda rate: (found[rate], -rate)) if found else best[m]
    return best


def budget_of(chosen: argparse.Namespace) -> str:
    """Rounds and images of a client, as outcomes are named."""
    return f"{chosen.rounds}x{chosen.images}"


def keys_of(case: Case, chosen: argparse.Namespace) -> Keys:
    """The run config of a case."""
    own, optimizer = METHODS[case.method]
    keys: Keys = {
        **BENCHMARKS[case.benchmark],
        "model.name": "lenet",
        "num-clients": 5,
        "num-rounds": chosen.rounds // 2 if case.seed == TUNING_SEED else chosen.rounds,
        "data.test-ratio": 0.1 if case.benchmark != "digits" else 0.2,
        "data.seed": case.seed,
        "seed": case.seed,
        "train.optimizer": optimizer,
        "train.learning-rate": case.rate,
        "train.weight-decay": 1e-5,
        "train.device": chosen.device,
        "evaluation.where": "federated",
        "evaluation.own-classes": True,
        "evaluation.every": chosen.rounds,
        "fleet.name": "uniform",
        **own,
    }
    if case.variant in ABLATIONS:
        keys |= ABLATIONS[case.variant]
    elif case.variant:
        name, _, _ = case.variant.partition(" ")
        key, values = SWEEPS[name]
        keys[key] = next(value for value in values if f"{name} {value}" == case.variant)
    return keys


def run_missing(cases: Sequence[Case], chosen: argparse.Namespace, deadline: float) -> None:
    """Run every case whose outcome is not kept yet, until the budget is used up; a run that diverges is left out."""
    jobs = [Job(case.name, keys_of(case, chosen), chosen.store, spent) for case in cases]
    complete(jobs, chosen, deadline)


def spent(log: Path) -> dict[str, Any]:
    """What a run spent and got to."""
    spending = spending_of(read_events(log.parent))
    if spending is None:
        raise ValueError("it has no accuracy")
    return asdict(spending)


def outcome_of(case: Case, chosen: argparse.Namespace) -> Spending | None:
    """A kept outcome; None if the run was left out or failed."""
    path = chosen.store / f"{case.name}.json"
    return Spending(**load(path)) if path.exists() else None


def rows_of(benchmark: str, cases: Sequence[Case], chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per method or variant: means over seeds; C3 under budgets that are the largest mean spending."""
    groups: dict[tuple[str, str], list[Spending]] = {}
    rates = {(case.method, case.variant): case.rate for case in cases}
    for case in cases:
        outcome = outcome_of(case, chosen)
        if outcome is not None:
            groups.setdefault((case.method, case.variant), []).append(outcome)
    means = {key: mean_spending(runs) for key, runs in groups.items()}
    budgets = budgets_of(list(means.values()))
    rows = []
    for (method, variant), spent in means.items():
        runs = groups[method, variant]
        found = scores(spent, budgets)
        row: dict[str, Any] = {
            "method": variant or method,
            "accuracy": spent.accuracy,
            "spread": statistics.stdev(run.accuracy for run in runs) if len(runs) > 1 else None,
            "GB": spent.total_bytes / 1e9,
            "GB counted": spent.counted_bytes / 1e9,
            "client TMAC": spent.train_macs / 1e12,
            **{f"C3 (T {name.removeprefix('c3_t')})": value for name, value in found.items() if "counted" not in name},
            "C3 counted": found[f"c3_counted_t{TEMPERATURE:g}"],
            "seeds": len(runs),
            "learning rate": rates[method, variant],
        }
        published = PUBLISHED.get(benchmark, {}).get(method) if not variant else None
        if published:
            row["published accuracy, GB, TMAC, C3"] = "  ".join(f"{value:g}" for value in published)
        rows.append(row)
    return rows


def mean_spending(runs: Sequence[Spending]) -> Spending:
    """The mean over seeds."""
    return Spending(*(statistics.fmean(getattr(run, name) for run in runs) for name in Spending.__dataclass_fields__))


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Accuracy and bandwidth over every knob, a panel each; ``curves``: knob -> its rows, at least one."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same curves are the same file
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(curves), figsize=(3.2 * len(curves), 2.8), layout="constrained", sharey=True
    )
    for (name, rows), left in zip(curves.items(), np.atleast_1d(panels), strict=True):
        right = left.twinx()
        labels = [str(row["method"]).removeprefix(f"{name} ") for row in rows]
        left.plot(labels, [row["accuracy"] for row in rows], marker="o", color=ACCURACY)
        right.plot(labels, [row["GB counted"] for row in rows], marker="s", linestyle="--", color=BANDWIDTH)
        left.set_xlabel(name)
        right.set_ylim(0, 1.1 * max(row["GB counted"] for each in curves.values() for row in each))
        right.tick_params(axis="y", colors=BANDWIDTH, labelright=name == list(curves)[-1])
    figure.supylabel("accuracy", color=ACCURACY, fontsize="medium")
    right.set_ylabel("GB counted", color=BANDWIDTH)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
