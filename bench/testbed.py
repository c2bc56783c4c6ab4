"""AdaptCL and Co-S2P on unequal hosts that they know nothing about: real quotas, real links, measured times.

    python -m bench.testbed --data-dir data        # CIFAR-10; without it digits, where starting a process is the most
    python -m bench.testbed --quick                # two hosts, two rounds, digits

Each SuperNode lives in a network namespace with a CPU quota and a link of its own. AdaptCL must find pruning rates at
which all are as fast as the fastest. ``adaptcl-regrows`` gives widths back to who has become faster than that;
``adaptcl-plain`` does so, too, without the nested objective, under which a client with the smallest sub-model trains
one network and everybody else two, so that times jump there; ``adaptcl-works`` gives everybody the slowest one's model,
lets the others work until that one has finished (decision 7), and has a fifth more rounds than FedAvg, which are far
shorter. What AdaptCL learned is set beside what the simulator predicts for the same fleet: the devices' speeds are
taken from FedAvg's measured times, and the same run is repeated on the virtual clock. Co-S2P is set beside itself with
a quorum of all. ``--delay-s`` and ``--loss-ratio`` make the links long and lossy. Needs root; elsewhere it says why
not, and measures nothing.

While they run, the global model is tested on a thousand images, which is coarse; the last one of each is tested on the
other nine thousand as well (``accuracy_unseen``).

Quotas that together are more than the machine has are not kept: run it while nothing else runs. Every run is kept in
results/bench/testbed; one that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.common import finish, options, print_table
from bench.hosts import Federation, rows_of
from bench.netns import Host, hosts, why_not
from bench.runs import STORES, Keys, has_cifar
from client_app.data import examples_of
from client_app.handler import handle
from fleet.data import load_data
from pruning.cost import measure_costs
from reporting.log import read_events
from reporting.summary import summarise
from server_app.checkpoint import load_checkpoint
from server_app.config import parse
from server_app.evaluation import CentralEvaluator
from server_app.processes import count_cores
from server_app.run import make_model
from server_app.run import run as run_virtual
from wire.local import LocalTransport

SPREAD = 4.0
LINK_BYTES_PER_S = 1_000_000.0
NUM_DECISIONS = 5
"""After so many all should be within 15 % of the reference."""
NUM_EVALUATED = 1000
"""Test images that the runs are evaluated on; the others are for the last models."""
MORE_ROUNDS = {"adaptcl-works": 1.2}
"""Rounds of a run in units of FedAvg's."""
LIMIT_S = 5400.0

COMMON: Keys = {"data.partition": "iid", "reply-timeout-s": LIMIT_S, "deployment.join-timeout-s": 600.0}
ADAPTCL: Keys = {"strategy": "adaptcl", "adaptcl.pruning-interval": 1, "adaptcl.rates.min-timed-rounds": 1}
COS2P: Keys = {
    "strategy": "cos2p",
    "model.name": "resnet8",
    "model.exits": True,
    "cos2p.mask-epochs": 1,
    "train.local-epochs": 1,
}
RUNS: dict[str, Keys] = {
    "fedavg": {"strategy": "fedavg", "model.name": "cnn"},
    "adaptcl": {**ADAPTCL, "model.name": "cnn"},
    "adaptcl-regrows": {**ADAPTCL, "model.name": "cnn", "adaptcl.rates.regrow": True},
    "adaptcl-plain": {
        **ADAPTCL,
        "model.name": "cnn",
        "adaptcl.rates.regrow": True,
        "adaptcl.local-objective": "plain",
    },
    "adaptcl-works": {
        **ADAPTCL,
        "model.name": "cnn",
        "adaptcl.rates.direction": "hold",
        "adaptcl.rates.spare-time": "work",
    },
    "cos2p": COS2P,
    "cos2p-synchronous": {**COS2P, "cos2p.quorum-ratio": 1.0},
}


def fleet(num_nodes: int, cores: float, delay_s: float = 0.0, loss_ratio: float = 0.0) -> list[Host]:
    """Hosts whose cores and links fall evenly from the fastest to ``SPREAD`` times slower; together ``cores``."""
    slowdowns = [1 + (SPREAD - 1) * index / max(1, num_nodes - 1) for index in range(num_nodes)]
    fastest = min(1.0, cores / sum(1 / slowdown for slowdown in slowdowns))
    return [Host(fastest / slow, LINK_BYTES_PER_S / slow, delay_s, loss_ratio) for slow in slowdowns]


def settings(name: str, num_nodes: int, chosen: argparse.Namespace) -> Keys:
    """Keys of a run, the same for real and simulated hosts."""
    data: Keys = {"data.name": "digits", "train.local-epochs": 2 if chosen.quick else 20}
    if has_images(chosen):
        images = chosen.images * num_nodes
        data = {
            "data.name": "cifar10",
            "data.max-train": images,
            "data.max-test": NUM_EVALUATED,
            "train.local-epochs": 2,
        }
    num_rounds = 2 if chosen.quick else round(chosen.rounds * MORE_ROUNDS.get(name, 1.0))
    return {**COMMON, **data, "num-clients": num_nodes, "num-rounds": num_rounds, "seed": chosen.seed, **RUNS[name]}


def has_images(chosen: argparse.Namespace) -> bool:
    """Whether the hosts train on CIFAR-10."""
    return not chosen.quick and has_cifar(chosen.data_dir)


def measure(name: str, wanted: list[Host], chosen: argparse.Namespace, folder: Path) -> Path:
    """Folder with the event log of one run on real hosts, kept or made now."""
    kept: Path = chosen.store / f"{name}_{len(wanted)}hosts_seed{chosen.seed}"
    if (kept / "events.jsonl").exists() and not chosen.quick:
        return kept
    site: dict[str, Any] = {"PRUNUS_DATA": str(Path(chosen.data_dir).resolve())} if has_images(chosen) else {}
    # JSON's true and false are the command line's, too
    keys = settings(name, len(wanted), chosen)
    tokens = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in keys.items()]
    tokens += [f"data.dir={site['PRUNUS_DATA']}"] if site else []
    with hosts(wanted, "prunus-bed") as (hub, *nodes):
        federation = Federation(folder / "f", 0, is_secure=True, names=[f"10.213.{i}.1" for i in range(len(wanted))])
        federation.prefix = hub
        with federation:
            for index, prefix in enumerate(nodes):
                federation.start_node(f"n{index}", index, prefix=prefix, address=f"10.213.{index}.1", **site)
            run = federation.submit(folder / "run", *tokens)
            if run.popen.wait(timeout=LIMIT_S):
                raise RuntimeError(f"{name}: the run failed: {run.text()[-2000:]}")
    if chosen.quick:
        return folder / "run"
    part = kept.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "run" / "events.jsonl", part)
    newest = max((folder / "run" / "checkpoints").glob("round-*.pt"))
    (part / newest.parent.name).mkdir(exist_ok=True)
    shutil.copy(newest, part / newest.parent.name)
    part.replace(kept)
    return kept


def predicted(
    name: str, log: Path, wanted: list[Host], chosen: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Event log of a run of AdaptCL on the virtual clock, with the devices' speeds from FedAvg's measured rounds."""
    lines = []
    for index, host in enumerate(wanted):
        times = [row for row in rows_of(log) if row["event"] == "arrival" and row["partition_id"] == index]
        flops = statistics.median(2 * row["train_macs"] / row["compute_s"] for row in times)
        link = f"uplink-bytes-per-s = {host.bytes_per_s}\ndownlink-bytes-per-s = {host.bytes_per_s}"
        lines.append(f'[[devices]]\nname = "host {index}"\ntrain-flops = {flops}\nmemory-bytes = 1e9\n{link}\n')
    fleet_file = folder / "fleet.toml"
    fleet_file.write_text("\n".join(lines), encoding="utf-8")
    own: Keys = {"run-dir": str(folder / f"virtual-{name}"), "fleet.name": str(fleet_file), "fleet.noise": 0.0}
    data: Keys = {"data.dir": chosen.data_dir} if has_images(chosen) else {}
    config = parse({**settings(name, len(wanted), chosen), **data, **own})
    run_virtual(config, LocalTransport(handle, len(wanted)), show=lambda line: None)
    return rows_of(folder / f"virtual-{name}")


def decisions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """AdaptCL's decisions, first to last."""
    return [row for row in rows if row["event"] == "decision"]


def last_times(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Update time of every client in the last round, s."""
    merged = [row for row in rows if row["event"] == "arrival" and row["status"] == "merged"]
    last = max(row["server_round"] for row in merged)
    return {row["partition_id"]: row["update_time_s"] for row in merged if row["server_round"] == last}


def over_reference(decision: dict[str, Any], host: int) -> float | None:
    """Update time of a host that a decision went by, in units of its reference's; of the model decided before it."""
    time_s = decision["update_times_s"].get(str(host))
    return time_s / decision["reference_s"] if time_s else None


def busy_s(rows: list[dict[str, Any]]) -> float:
    """Sum over rounds of the slowest client's update time: the wall time of the method without the engine's share."""
    rounds: dict[int, float] = {}
    for row in rows:
        if row["event"] == "arrival" and row["status"] == "merged":
            rounds[row["server_round"]] = max(rounds.get(row["server_round"], 0.0), row["update_time_s"])
    return sum(rounds.values())


def main() -> dict[str, Any]:
    """Run the benchmark."""
    parser = options("testbed", __doc__)
    parser.add_argument("--nodes", type=int, default=4, help="hosts (default 4)")
    parser.add_argument("--rounds", type=int, default=10, help="of every run (default 10)")
    parser.add_argument("--images", type=int, default=2000, help="of CIFAR-10 on every host (default 2000)")
    parser.add_argument("--cores", type=float, default=0.75 * count_cores(), help="cores that all quotas share")
    parser.add_argument("--delay-s", type=float, default=0.0, help="of every link, each way (default 0)")
    parser.add_argument("--loss-ratio", type=float, default=0.0, help="of every link's packets, each way (default 0)")
    parser.add_argument("--run", action="append", choices=list(RUNS), help="only these besides fedavg and adaptcl")
    parser.add_argument("--data-dir", default="data", help="folder with cifar10.npz or torchvision's files")
    parser.add_argument("--store", type=Path, default=STORES / "testbed")
    chosen = parser.parse_args()
    reason = why_not(chosen.delay_s, chosen.loss_ratio)
    if reason:
        print(f"no unequal hosts can be made here: {reason}")
        return finish("testbed", chosen, {"skipped": reason})
    names = ["fedavg", "adaptcl"] if chosen.quick else chosen.run or list(RUNS)
    wanted = fleet(2 if chosen.quick else chosen.nodes, chosen.cores, chosen.delay_s, chosen.loss_ratio)
    with tempfile.TemporaryDirectory(prefix="prunus-bed-") as made:
        folders = {name: Path(made) / name for name in dict.fromkeys(["fedavg", "adaptcl", *names])}
        logs = {name: measure(name, wanted, chosen, folder) for name, folder in folders.items()}
        learners = [name for name in logs if name.startswith("adaptcl")]
        learned = {
            name: compare_learned(rows_of(logs[name]), predicted(name, logs["fedavg"], wanted, chosen, Path(made)))
            for name in learners
        }
        results: dict[str, Any] = {
            "rows": describe_hosts(rows_of(logs["fedavg"]), wanted),
            "learned": [{"run": name, **row} for name, rows in learned.items() for row in rows],
            "runs": [total(name, log, chosen.data_dir if has_images(chosen) else None) for name, log in logs.items()],
        }
    print_table("hosts, and their update times under FedAvg in units of the fastest's", results["rows"])
    print_table(
        "AdaptCL: update times in units of the reference's, and what the virtual clock predicts", results["learned"]
    )
    print_table("runs", results["runs"])
    runs = {run["run"]: run for run in results["runs"]}
    results["variants"] = [
        {**against(runs["fedavg"], runs[name], logs["fedavg"]), **judge_learned(learned[name])} for name in learners
    ]
    print_table("AdaptCL beside FedAvg", results["variants"])
    if "cos2p" in runs and "cos2p-synchronous" in runs:
        results["cos2p"] = against_synchronous(runs["cos2p"], runs["cos2p-synchronous"], logs["cos2p-synchronous"])
        print_table("Co-S2P beside itself with a quorum of all", [results["cos2p"]])
    return finish("testbed", chosen, results)


def describe_hosts(before: list[dict[str, Any]], wanted: list[Host]) -> list[dict[str, Any]]:
    """One row per host: what it is, and its last update time under FedAvg in units of the fastest host's."""
    times = last_times(before)
    return [
        {
            "host": index,
            "cores": host.cores,
            "link_bytes_per_s": host.bytes_per_s,
            "fedavg_time": times[index] / min(times.values()) if index in times else None,
        }
        for index, host in enumerate(wanted)
    ]


def compare_learned(rows: list[dict[str, Any]], virtual: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per host: its update times in units of the reference's, and its rates, real and predicted.

    A decision goes by times of the models that the one before it chose: the sixth sees what five have come to, and
    what the last chose is in force in a round that nobody decides after.
    """
    made, last_predicted = decisions(rows), decisions(virtual)[-1]
    sixth, last = made[min(NUM_DECISIONS, len(made) - 1)], made[-1]
    return [
        {
            "host": host,
            "after_five": over_reference(sixth, host),
            "at_last": over_reference(last, host),
            "rate": last["rates"][str(host)],
            "rate_predicted": last_predicted["rates"].get(str(host)),
            "work": last["work_ratios"][str(host)],
            "work_predicted": last_predicted["work_ratios"].get(str(host)),
            "is_floored": host in last["floors"],
        }
        for host in sorted(map(int, last["rates"]))
    ]


def judge_learned(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How far everybody is from the reference, and the learned rates from the predicted ones."""
    found = {
        f"{what}_{when}": which(row[when] for row in rows if row[when] is not None)
        for when in ("after_five", "at_last")
        for what, which in (("slowest", max), ("fastest", min))
    }
    both = [row for row in rows if row["rate_predicted"] is not None]
    return found | {"rate_error": statistics.fmean(abs(row["rate"] - row["rate_predicted"]) for row in both)}


def total(name: str, log: Path, data_dir: str | None) -> dict[str, Any]:
    """One row per run; ``data_dir`` is None where the hosts trained on digits."""
    found = summarise(read_events(log))
    rows = rows_of(log)
    return {
        "run": name,
        "rounds": found["num_merges"],
        "wall_s": rows[-1]["wall_s"],
        "update_time_s": busy_s(rows),
        "accuracy": accuracy_at(rows, rows[-1]["wall_s"]),
        "accuracy_unseen": accuracy_unseen(log, data_dir),
        "utilisation": found["utilisation_ratio"],
    }


def accuracy_at(rows: list[dict[str, Any]], wall_s: float) -> float:
    """Test accuracy of the last evaluation by then, with BatchNorm's statistics as merged or re-estimated."""
    last = [row for row in rows if row["event"] == "evaluation" and row["wall_s"] <= wall_s][-1]
    return max(float(last["accuracy"]), float(last["accuracy_reestimated"]))


def accuracy_unseen(log: Path, data_dir: str | None) -> float | None:
    """Accuracy of a run's last model on test images that it was not evaluated on; None where there are none.

    BatchNorm's statistics are as merged or re-estimated, whichever is better, on a tenth of these images.
    """
    if data_dir is None or not (log / "checkpoints").is_dir():
        return None
    progress, _, flat, _ = load_checkpoint(log)
    data = load_data("cifar10", data_dir)
    held_out = examples_of(data, data.x_test[NUM_EVALUATED:], data.y_test[NUM_EVALUATED:])
    shape = tuple(held_out.x.shape[1:])
    model, layout = make_model(parse(flat), data.num_classes, shape)
    cost = measure_costs(model, layout, torch.zeros(2, *shape))
    row = CentralEvaluator(model, layout, cost, held_out, calibration_ratio=0.1)(progress.state, {})
    return max(float(row["accuracy"]), float(row["accuracy_reestimated"]))


def gained(run: dict[str, Any], other: Path) -> float:
    """Accuracy of a run over what the other had after the same wall time."""
    return float(run["accuracy"]) - accuracy_at(rows_of(other), run["wall_s"])


def against(fedavg: dict[str, Any], run: dict[str, Any], log: Path) -> dict[str, Any]:
    """One row per variant of AdaptCL: what it saves, and what its models are worth, beside FedAvg."""
    row = {
        "run": run["run"],
        "rounds_ratio": run["rounds"] / fedavg["rounds"],
        "wall_time_saved": 1 - run["wall_s"] / fedavg["wall_s"],
        "update_time_saved": 1 - run["update_time_s"] / fedavg["update_time_s"],
        "accuracy_gained": run["accuracy"] - fedavg["accuracy"],
        "accuracy_gained_same_wall_time": gained(run, log),
    }
    both = run["accuracy_unseen"], fedavg["accuracy_unseen"]
    return row | {"accuracy_gained_unseen": None if None in both else both[0] - both[1]}


def against_synchronous(run: dict[str, Any], other: dict[str, Any], log: Path) -> dict[str, float]:
    """Co-S2P beside itself with a quorum of all: how much busier it keeps hosts, and accuracy at its end's time."""
    return {
        "utilisation_ratio": run["utilisation"] / other["utilisation"],
        "accuracy_gained_same_wall_time": gained(run, log),
    }


if __name__ == "__main__":
    main()
