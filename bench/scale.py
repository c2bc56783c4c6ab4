"""What bounds the server: 10,000 clients at 1 % participation on the virtual clock, merging in parts, a SuperLink.

Clients really train here, on a few images each (digits with noise, as many as it takes); what is reported is how much
of the round is the server's, and what grows with the number of clients. Merging in parts is of ResNet-18 replies:
``add`` is what a server pays for each reply, ``add_partial`` what it pays for each helper that merged replies before.
``--superlink`` also starts a SuperLink and SuperNodes that look for work, and counts CPU by request.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord

from bench.common import CpuTimer, finish, in_fresh_process, options, peak_bytes, print_table, settle
from bench.merge import Replies, specs
from client_app.handler import handle
from fleet.data import load_data
from pruning.extract import extract
from pruning.merge import MaskedMean
from server_app.config import parse
from server_app.event_log import EventLog
from server_app.run import build, prepare_folder
from wire.local import LocalTransport
from wire.message import Instruction, Report
from zoo import get_model

EXAMPLES_PER_CLIENT = 6


def noisy_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """PRUNUS_SCALE_CLIENTS times six digits with noise of their own, and the digits' test part."""
    data = load_data("digits")
    rng = np.random.default_rng(0)
    total = EXAMPLES_PER_CLIENT * int(os.environ["PRUNUS_SCALE_CLIENTS"])
    index = rng.integers(0, len(data.x_train), total)
    noisy = data.x_train[index].astype(np.int16) + rng.integers(-20, 21, (total, 8, 8), dtype=np.int16)
    return noisy.clip(0, 255).astype(np.uint8), data.y_train[index], data.x_test, data.y_test


def run_scale(strategy: str, num_clients: int, num_rounds: int) -> dict[str, float]:
    """CPU and wall seconds of one run by whose they are, memory, and what a round writes."""
    torch.set_num_threads(1)
    os.environ["PRUNUS_SCALE_CLIENTS"] = str(num_clients)
    clients = CpuTimer()

    def work(instruction: Instruction) -> Report:
        with clients:
            return handle(instruction)

    peaks: list[int] = []
    walls: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = parse(
            {
                "strategy": strategy,
                "num-rounds": num_rounds,
                "num-clients": num_clients,
                "run-dir": str(Path(folder) / "run"),
                "model.name": "mlp",
                "data.name": "bench.scale:noisy_digits",
                "data.partition": "iid",
                "data.min-size": 2,
                "loop.clients-per-round": max(1, num_clients // 100),
                "evaluation.every": 10,
                "evaluation.family-every": 10,
                "adaptcl.pruning-interval": 5,
                "adaptcl.rates.min-timed-rounds": 1,
                "train.batch-size": 8,
            }
        )
        target = prepare_folder(config)
        began = time.process_time()
        with EventLog(target / "events.jsonl") as log:
            strategy_object, state = build(config, target, log.write, log)
            setup_cpu_s = time.process_time() - began
            keep = strategy_object.keep

            def noting(progress: Any, own: dict[str, Any]) -> None:
                keep(progress, own)
                peaks.append(peak_bytes())
                walls.append(time.perf_counter())

            strategy_object.keep = noting
            settle()
            cpu_began, wall_began = time.process_time(), time.perf_counter()
            strategy_object.start(LocalTransport(work, num_clients), ArrayRecord(state), num_rounds)
            cpu_s, wall_s = time.process_time() - cpu_began, time.perf_counter() - wall_began
        text = (target / "events.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        checkpoint = max(path.stat().st_size for path in (target / "checkpoints").iterdir())
    answers = sum(row["event"] == "arrival" for row in rows)
    accuracy = [row["accuracy"] for row in rows if row["event"] == "evaluation"][-1]
    return {
        "setup_cpu_s": setup_cpu_s,
        "server_cpu_ms_per_answer": 1e3 * (cpu_s - clients.cpu_s) / answers,
        "client_cpu_ms_per_answer": 1e3 * clients.cpu_s / answers,
        "wall_s_per_round": wall_s / num_rounds,
        "peak_mib": peaks[-1] / 2**20,
        "growth_mib": (peaks[-1] - peaks[len(peaks) // 2]) / 2**20,
        "log_bytes_per_answer": len(text) / answers,
        "checkpoint_bytes": checkpoint,
        "accuracy": accuracy,
    }


def merge_in_parts(num_clients: int, num_helpers: int, width: float) -> dict[str, float]:
    """CPU milliseconds of the two ways into a merge, and that both come to the same model."""
    torch.set_num_threads(1)
    model, layout = get_model("resnet18", width=width)
    state = model.state_dict()
    chosen = list(specs(layout, "prefix", num_clients, 0)) if width == 1 else [None] * num_clients
    replies = Replies(0, sum(t.numel() for t in state.values()))
    flat = MaskedMean(state, layout)
    parts = [MaskedMean(state, layout) for _ in range(num_helpers)]
    adding, joining, helping = CpuTimer(), CpuTimer(), CpuTimer()
    from pruning.spec import FULL

    for client, spec in enumerate(chosen):
        held = spec or FULL
        reply = replies.of(extract(state, layout, held))
        with adding:
            flat.add(reply, held, 1.0 + client)
        with helping:
            parts[client % num_helpers].add(reply, held, 1.0 + client)
    top = MaskedMean(state, layout)
    for part in parts:
        with joining:
            top.add_partial(part)
    one, two = flat.finalize().state, top.finalize().state
    worst = max(float((one[k] - two[k]).abs().max()) for k in one if one[k].is_floating_point())
    return {
        "add_ms_per_reply": 1e3 * adding.cpu_s / num_clients,
        "add_partial_ms_per_helper": 1e3 * joining.cpu_s / num_helpers,
        "partial_mib": sum(t.numel() * 4 for t in state.values()) / 2**20,
        "largest_difference": worst,
    }


def superlink_cost(num_nodes: int, watch_s: float) -> dict[str, float]:
    """CPU of a SuperLink with a database, by request of nodes that look for work."""
    from bench.hosts import Federation

    def cpu_s(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder) / "f", num_nodes, poll_s=0.1) as federation:
        assert federation.superlink is not None
        pid = federation.superlink.popen.pid

        def requests() -> int:
            assert federation.superlink is not None
            return len(re.findall(r'"POST /v1/', federation.superlink.text()))

        before, requests_before = cpu_s(pid), requests()
        end = time.monotonic() + watch_s
        while time.monotonic() < end:
            time.sleep(0.5)
        num_requests = requests() - requests_before
        spent = cpu_s(pid) - before
        status = Path(f"/proc/{pid}/status").read_text()
        resident = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
    return {
        "nodes": num_nodes,
        "requests_per_s": num_requests / watch_s,
        "cpu_ms_per_request": 1e3 * spent / max(1, num_requests),
        "resident_mib": resident,
    }


def main() -> dict[str, Any]:
    """Run the benchmark."""
    parser = options("scale", __doc__)
    parser.add_argument("--superlink", action="store_true", help="also measure a SuperLink (a minute, real processes)")
    arguments = parser.parse_args()
    from bench import scale as this  # by its own name, so that other processes find its functions

    sizes = [100, 300] if arguments.quick else [1000, 10_000]
    rows = []
    for strategy in ("fedavg", "adaptcl"):
        for num_clients in sizes:
            num_rounds = 4 if arguments.quick else 30
            found = in_fresh_process(this.run_scale, strategy, num_clients, num_rounds)
            rows.append({"strategy": strategy, "clients": num_clients, "rounds": num_rounds} | found)
    print_table("1 % participation, virtual clock, one process", rows)
    width = 0.25 if arguments.quick else 1.0
    parts = in_fresh_process(this.merge_in_parts, 8 if arguments.quick else 40, 4, width)
    print_table("merging ResNet-18 in parts" if width == 1 else "merging a thin ResNet-18 in parts", [parts])
    results: dict[str, Any] = {"rows": rows, "parts": parts}
    if arguments.superlink:
        results["superlink"] = [superlink_cost(count, 5.0 if arguments.quick else 20.0) for count in (1, 4)]
        print_table("a SuperLink with a database and nodes that look for work", results["superlink"])
    results["median_server_cpu_ms_per_answer"] = statistics.median(row["server_cpu_ms_per_answer"] for row in rows)
    return finish("scale", arguments, results)


if __name__ == "__main__":
    main()
