"""Co-S2P at 0.1 billion parameters: 16 unequal simulated devices train a ViT of 115 M parameters, semi-asynchronously.

    python -m bench.cos2p_scale                    # at most 30 minutes on 2 cores
    python -m bench.cos2p_scale --device cuda      # the same on a GPU
    python -m bench.cos2p_scale --quick            # a ViT of 0.4 M parameters, half a minute

What it shows is that it fits, not that it learns: each client has a handful of images. Every client's request runs in
a process whose peak of resident memory (the kernel's, everything included) is read and reset for each request; the
server's peak is that of its own process. Times are virtual (the devices') and real (this machine's).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.common import CpuTimer, finish, in_fresh_process, options, peak_bytes, print_table, settle, within
from client_app.handler import handle
from reporting.summary import utilisation
from server_app.processes import count_cores
from wire.flat import Scalar
from wire.message import Instruction, Report

NUM_CLIENTS, NUM_ROUNDS, QUORUM = 16, 5, 8
IMAGES_A_CLIENT = 10
SERVER_BOUND_GIB, CLIENT_BOUND_GIB, WALL_BOUND_S, MERGE_BOUND_S = 4.0, 3.0, 1800.0, 10.0
GIB = 2**30
CLEAR_REFS = Path("/proc/self/clear_refs")


def measured_handle(instruction: Instruction) -> Report:
    """Handle a request and report, beside all else, the resident peak of this process while it did.

    What came before, back to the last request (sending that answer, receiving this instruction), is ``transfer_rss``.
    """
    before, began = peak_bytes(), time.process_time()
    reset_peak()
    report = handle(instruction)
    measured = {
        "client_rss": float(peak_bytes()),
        "transfer_rss": float(before),
        "client_cpu_s": time.process_time() - began,
    }
    return replace(report, metrics={**report.metrics, **measured})


def reset_peak() -> None:
    """Let the kernel count this process' peak anew (Linux)."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def keys(model: str, num_rounds: int, device: str, seed: int, data: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The run config: small local work on unequal devices."""
    return {
        "strategy": "cos2p",
        "num-clients": NUM_CLIENTS,
        "num-rounds": num_rounds,
        "seed": seed,
        "keep-checkpoints": 1,
        "reply-timeout-s": 900.0,
        "model.name": model,
        "model.exits": True,
        "data.max-train": NUM_CLIENTS * IMAGES_A_CLIENT,
        "data.max-test": 24,
        "data.partition": "iid",
        **data,
        "train.batch-size": 8,
        "train.local-epochs": 1,
        "train.learning-rate": 0.01,
        "train.max-grad-norm": 1.0,
        "train.schedule": "constant",
        "train.device": device,
        "fleet.name": "jetson-16",
        "evaluation.every": num_rounds,
        "evaluation.family-every": num_rounds,
        "loop.quorum": QUORUM,
        "loop.max-staleness": 10,
        "cos2p.mask-epochs": 1,
        "cos2p.kd-start": 2,
    }


def serve(flat: Mapping[str, Scalar], num_workers: int, folder: str) -> dict[str, Any]:
    """Be the server of one run, to be called in a process of its own; its figures and its event log."""
    from server_app.config import parse
    from server_app.run import run
    from wire.local import LocalTransport

    torch.set_num_threads(1)
    config = parse({**flat, "run-dir": folder})
    transport = LocalTransport(measured_handle, config.run.num_clients, num_workers, config.run.reply_timeout_s)
    began = time.monotonic()
    try:
        run(config, transport, show=lambda line: None)
    finally:
        transport.close()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "wall_s": time.monotonic() - began,
        "server_cpu_s": time.process_time(),
        "server_rss": peak_bytes(),
        "load": load,
    }


def device_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per device class: what its clients held, sent, computed and needed."""
    clients = next(row["clients"] for row in rows if row["event"] == "clients")
    device = {client["partition_id"]: client["device"] for client in clients}
    arrivals = [row for row in rows if row["event"] == "arrival" and "client_rss" in row]
    table = []
    for name in dict.fromkeys(device[pid] for pid in sorted(device)):
        mine = [row for row in arrivals if device[row["partition_id"]] == name]
        if not mine:
            continue
        for phase, is_mask in (("mask + weights", True), ("weights", False)):
            phase_rows = [row for row in mine if ("mask_loss" in row) == is_mask]
            if phase_rows:
                table.append({"device": name, "phase": phase, **_means(phase_rows)})
    return table


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "requests": len(rows),
        "depth": rows[-1]["depth"] or "all",
        "download_mb": statistics.fmean(row["download_bytes"] for row in rows) / 1e6,
        "upload_mb": statistics.fmean(row["upload_bytes"] for row in rows) / 1e6,
        "device_s": statistics.fmean(row["update_time_s"] for row in rows),
        "here_cpu_s": statistics.fmean(row["client_cpu_s"] for row in rows),
        "counted_gib": max(row["peak_memory_bytes"] for row in rows) / GIB,
        "measured_gib": max(row["client_rss"] for row in rows) / GIB,
        "mean_staleness": statistics.fmean(row["staleness"] for row in rows),
    }


def measure_merge(model: str, num_clients: int, seed: int) -> dict[str, float]:
    """CPU seconds of weighing and merging ``num_clients`` sub-models of all four rates; in a process of its own."""
    import numpy as np

    from pruning.capability import inner_groups, solve_rate, sub_model_at
    from pruning.extract import extract
    from pruning.merge import MaskedMean, residual_mean
    from pruning.select import select_random
    from pruning.spec import SubModelSpec
    from strategies.cos2p_rule import co_s2p_weight, l1_distance, num_trained
    from zoo import get_model

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network, layout = get_model(model, 100, 3, 32, exits=True)
    state = {key: tensor.detach() for key, tensor in network.state_dict().items()}
    groups = inner_groups(layout, {key: tuple(tensor.shape) for key, tensor in state.items()})
    rng, timer = np.random.default_rng(seed), CpuTimer()
    with timer:
        mean = MaskedMean(state, layout)
    for client in range(num_clients):
        rate = (1.0, 0.75, 0.5, 0.25)[client % 4]
        shape = sub_model_at(layout, groups, solve_rate(layout, rate).depth, rate)
        widths = {name: len(units) for name, units in shape.units.items()}
        spec = SubModelSpec(select_random(layout, widths, rng).kept, shape.depth)
        answer = {key: tensor + 0.01 for key, tensor in extract(state, layout, spec).items()}
        settle()
        with timer:
            now = extract(state, layout, spec)
            drift = l1_distance(now, answer)  # stands for the distance to the version it was sent
            mean.add(answer, spec, co_s2p_weight(l1_distance(now, answer), num_trained(answer), drift))
        del answer, now
    with timer:
        mean.finalize(rule=residual_mean)
    return {"cpu_s": timer.cpu_s, "peak_gib": peak_bytes() / GIB, "num_clients": num_clients}


def main() -> dict[str, Any]:
    """Run the benchmark."""
    parser = options("cos2p_scale", __doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=min(2, count_cores()), help="client processes at once")
    parser.add_argument("--model", default="vit_115m", help="vit_115m or vit_86m")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS, help="merges")
    parser.add_argument("--data-dir", help="folder with cifar10.npz; without it handwritten digits are used")
    arguments = parser.parse_args()
    model = "vit_micro" if arguments.quick else arguments.model
    rounds = 2 if arguments.quick else arguments.rounds
    data: dict[str, Scalar] = {"data.name": "digits"}
    if arguments.data_dir:
        data = {"data.name": "cifar10", "data.dir": os.path.abspath(arguments.data_dir)}
    flat = keys(model, rounds, arguments.device, arguments.seed, data)
    with tempfile.TemporaryDirectory(prefix="cos2p-scale-", dir=os.environ.get("TMPDIR")) as folder:
        figures = in_fresh_process(serve, flat, arguments.workers, os.path.join(folder, "run"))
        log = Path(folder, "run", "events.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    table = device_rows(rows)
    merges = [row for row in rows if row["event"] == "merge"]
    arrivals = [row for row in rows if row["event"] == "arrival"]
    merge = in_fresh_process(measure_merge, model, 16, arguments.seed)
    measured = [row for row in arrivals if "client_rss" in row]
    client_gib = max(max(row["client_rss"], row["transfer_rss"]) for row in measured) / GIB
    busy_s = sum(row["update_time_s"] for row in arrivals)
    summary = {
        "num_parameters": next(row["num_parameters"] for row in rows if row["event"] == "run"),
        "merges": len(merges),
        "answers": len(arrivals),
        "stale answers": sum(row["staleness"] > 0 for row in arrivals),
        "n_star": [row["n_star"] for row in merges],
        "virtual_s": merges[-1]["time_s"],
        "utilisation": utilisation(busy_s, NUM_CLIENTS, merges[-1]["time_s"]),
        "wall_s": figures["wall_s"],
        "load of the machine at the end": figures["load"],
        "server_cpu_s": figures["server_cpu_s"],
        "clients_cpu_s": sum(row.get("client_cpu_s", 0.0) for row in arrivals),
        "server_gib": figures["server_rss"] / GIB,
        "client_gib": client_gib,
        "merge_cpu_s_16": merge["cpu_s"],
        "losses": [round(row["loss"], 4) for row in arrivals if "loss" in row],
    }
    print_table("what each device class held, moved and needed (means; peaks are maxima)", table)
    bounds = {
        "wall": within(summary["wall_s"], WALL_BOUND_S),
        "server": within(summary["server_gib"], SERVER_BOUND_GIB),
        "client": within(client_gib, CLIENT_BOUND_GIB),
        "merge of 16": within(merge["cpu_s"], MERGE_BOUND_S),
    }
    print_table("the run", [{"figure": name, "value": str(value)} for name, value in summary.items()])
    print_table("bounds (s, GiB, GiB, CPU s)", [{"bound": name, "stands": text} for name, text in bounds.items()])
    return finish("cos2p_scale", arguments, {"rows": table, "run": summary, "bounds": bounds})


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main()
