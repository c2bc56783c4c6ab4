"""AdaptCL on unequal hosts that it knows nothing about: real quotas, real links, measured times.

Each SuperNode lives in a network namespace with a CPU quota and a link of its own. AdaptCL must find pruning rates at
which all are as fast as the fastest. What it learned is set beside what the simulator predicts for the same fleet: the
devices' speeds are taken from FedAvg's measured times, and the same run is repeated on the virtual clock. Needs root;
elsewhere it says why not, and measures nothing.

Quotas that together are more than the machine has are not kept: run it while nothing else runs.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.common import finish, num_cores, options, print_table
from bench.hosts import Federation, rows_of
from bench.netns import Host, hosts, why_not
from client_app.handler import handle
from server_app.config import parse
from server_app.run import run as run_virtual
from wire.local import LocalTransport

SPREAD = 4.0
LINK_BYTES_PER_S = 1_000_000.0
REFERENCE_TOLERANCE = 0.15
LIMIT_S = 5400.0


def fleet(num_nodes: int, cores: float) -> list[Host]:
    """Hosts whose cores and links fall evenly from the fastest to ``SPREAD`` times slower; together ``cores``."""
    slowdowns = [1 + (SPREAD - 1) * index / max(1, num_nodes - 1) for index in range(num_nodes)]
    fastest = min(1.0, cores / sum(1 / slowdown for slowdown in slowdowns))
    return [Host(fastest / slowdown, LINK_BYTES_PER_S / slowdown) for slowdown in slowdowns]


def settings(strategy: str, num_nodes: int, num_rounds: int, epochs: int) -> dict[str, Any]:
    """Keys of a run, the same for real and simulated hosts."""
    return {
        "strategy": strategy,
        "num-clients": num_nodes,
        "num-rounds": num_rounds,
        "model.name": "cnn",
        "data.partition": "iid",
        "train.local-epochs": epochs,
        "adaptcl.pruning-interval": 1,
        "adaptcl.rates.min-timed-rounds": 1,
        "reply-timeout-s": LIMIT_S,
        "deployment.join-timeout-s": 600.0,
    }


def measure(folder: Path, wanted: list[Host], keys: dict[str, Any]) -> list[dict[str, Any]]:
    """Event log of one run on real hosts."""
    with hosts(wanted, "prunus-bed") as (hub, *nodes):
        federation = Federation(folder / "f", 0, is_secure=True, names=[f"10.213.{i}.1" for i in range(len(wanted))])
        federation.prefix = hub
        with federation:
            for index, prefix in enumerate(nodes):
                federation.start_node(f"n{index}", index, prefix=prefix, address=f"10.213.{index}.1")
            tokens = [f"{key}={value}" for key, value in keys.items()]
            run = federation.submit(folder / "run", *tokens)
            if run.popen.wait(timeout=LIMIT_S):
                raise RuntimeError(f"the run failed: {run.text()[-2000:]}")
    return rows_of(folder / "run")


def predicted(
    folder: Path, rows: list[dict[str, Any]], wanted: list[Host], keys: dict[str, Any]
) -> list[dict[str, Any]]:
    """Event log of the same run on the virtual clock, with the devices' speeds from measured full-model rounds."""
    lines = []
    for index, host in enumerate(wanted):
        times = [row for row in rows if row["event"] == "arrival" and row["partition_id"] == index]
        flops = statistics.median(2 * row["train_macs"] / row["compute_s"] for row in times)
        link = f"uplink-bytes-per-s = {host.bytes_per_s}\ndownlink-bytes-per-s = {host.bytes_per_s}"
        lines.append(f'[[devices]]\nname = "host {index}"\ntrain-flops = {flops}\nmemory-bytes = 1e9\n{link}\n')
    (folder / "fleet.toml").write_text("\n".join(lines), encoding="utf-8")
    own = {"run-dir": str(folder / "virtual"), "fleet.name": str(folder / "fleet.toml"), "fleet.noise": 0.0}
    config = parse({**keys, **own})
    run_virtual(config, LocalTransport(handle, len(wanted)), show=lambda line: None)
    return rows_of(folder / "virtual")


def last_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Retention ratios of the last decision."""
    return dict([row for row in rows if row["event"] == "decision"][-1]["rates"])


def spread(rows: list[dict[str, Any]], server_round: int) -> dict[int, float]:
    """Update time of every client in a round, in units of the fastest's."""
    times = {
        row["partition_id"]: row["update_time_s"]
        for row in rows
        if row["event"] == "arrival" and row["server_round"] == server_round and row["status"] == "merged"
    }
    return {pid: time_s / min(times.values()) for pid, time_s in sorted(times.items())}


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
    parser.add_argument("--cores", type=float, default=0.75 * num_cores(), help="cores that all quotas share")
    arguments = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"no unequal hosts can be made here: {reason}")
        return finish("testbed", arguments, {"skipped": reason})
    num_nodes, num_rounds, epochs = (2, 2, 2) if arguments.quick else (arguments.nodes, 8, 20)
    wanted = fleet(num_nodes, arguments.cores)
    with tempfile.TemporaryDirectory(prefix="prunus-bed-") as folder:
        logs = {
            name: measure(Path(folder) / name, wanted, settings(name, num_nodes, num_rounds, epochs))
            for name in ("fedavg", "adaptcl")
        }
        keys = settings("adaptcl", num_nodes, num_rounds, epochs)
        virtual = predicted(Path(folder), logs["fedavg"], wanted, keys)
    before, after = spread(logs["fedavg"], num_rounds), spread(logs["adaptcl"], num_rounds)
    real, simulated = last_rates(logs["adaptcl"]), last_rates(virtual)
    rows = [
        {
            "host": index,
            "cores": host.cores,
            "link_bytes_per_s": host.bytes_per_s,
            "fedavg_time": before.get(index),
            "adaptcl_time": after.get(index),
            "rate": real.get(str(index)),
            "rate_predicted": simulated.get(str(index)),
        }
        for index, host in enumerate(wanted)
    ]
    print_table("update times in units of the fastest host's, and retention ratios", rows)
    shared = sorted(set(real) & set(simulated))
    totals = {name: busy_s(log) for name, log in logs.items()}
    accuracy = {
        name: [row["accuracy"] for row in log if row["event"] == "evaluation"][-1] for name, log in logs.items()
    }
    results = {
        "rows": rows,
        "within_tolerance": all(ratio <= 1 + REFERENCE_TOLERANCE for ratio in after.values()),
        "time_saved_ratio": 1 - totals["adaptcl"] / totals["fedavg"],
        "update_time_total_s": totals,
        "wall_s": {name: log[-1]["wall_s"] for name, log in logs.items()},
        "accuracy": accuracy,
        "mean_rate_error": statistics.mean(abs(real[pid] - simulated[pid]) for pid in shared) if shared else None,
    }
    print_table("totals", [{key: value for key, value in results.items() if not isinstance(value, list | dict)}])
    return finish("testbed", arguments, results)


if __name__ == "__main__":
    main()
