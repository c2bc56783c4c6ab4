"""Synthetic but realistic event logs: unequal devices, synchronous or buffered rounds, sub-models that shrink."""

# ruff: noqa: E501  (rows of a log read best as rows)
from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GROUPS = {
    "stem": 16, "stage1.trunk": 16, "stage1.block0.inner": 16, "stage2.trunk": 32, "stage2.block0.inner": 32,
    "stage3.trunk": 64, "stage3.block0.inner": 64,
}  # fmt: skip
FULL_MACS, FULL_BYTES = 9.0e9, 310_000
FIELDS = ("download_s", "compute_s", "upload_s")


def make_rows(
    strategy: str = "adaptcl",
    num_clients: int = 10,
    num_rounds: int = 30,
    seed: int = 1,
    sigma: float = 5.0,
    buffer: int = 0,
) -> list[dict[str, Any]]:
    """Return the rows of one run. ``buffer`` > 0: a merge per that many arrivals, clients never stop (semi-asynchronous)."""
    rng = random.Random(seed)
    adaptive = strategy == "adaptcl"
    slowness = [1.0 + (sigma - 1.0) * i / max(1, num_clients - 1) for i in range(num_clients)]
    rng.shuffle(slowness)
    rates = [1.0] * num_clients
    examples = [rng.randint(60, 240) for _ in range(num_clients)]
    rows: list[dict[str, Any]] = [
        {
            "event": "run", "strategy": strategy, "model": "resnet8", "data": "digits", "num_clients": num_clients,
            "num_parameters": 77_850, "seed": seed, "versions": {"python": "3.11.7", "torch": "2.13.0", "flwr": "1.41.0"},
            "config": {"strategy": strategy, "num-rounds": num_rounds, "fleet.name": f"linear:{sigma:g}", "learning-rate": 0.05,
                       "adaptcl.pruning-interval": 5, "data.partition": "dirichlet:0.5", "resume": ""},
        },
        {
            "event": "clients",
            "clients": [
                {"partition_id": i, "device": f"linear-{slowness[i]:.1f}", "train_flops": 6e9 / slowness[i],
                 "uplink_bytes_per_s": 2e6 / slowness[i], "downlink_bytes_per_s": 8e6 / slowness[i],
                 "memory_bytes": 4 * 2**30, "num_examples": examples[i],
                 "label_counts": [int(examples[i] * w) for w in _skewed(rng, 10)]}
                for i in range(num_clients)
            ],
        },
    ]  # fmt: skip

    def arrival(i: int, server_round: int, start_s: float, sent: int, staleness: int) -> dict[str, Any]:
        noise = math.exp(rng.gauss(0, 0.02))
        down, up = FULL_BYTES * rates[i], FULL_BYTES * rates[i]
        parts = {
            "download_s": 0.04 * slowness[i] * rates[i] * noise,
            "compute_s": 3.0 * slowness[i] * (0.08 + 0.92 * rates[i]) * noise,
            "upload_s": 0.155 * slowness[i] * rates[i] * noise,
        }
        update_time_s = sum(parts.values())
        status, reason = "merged", ""
        if rng.random() < 0.01:
            status, reason = "failed", "RuntimeError: <b>out of memory</b> & more"
        row = {
            "event": "arrival", "server_round": server_round, "partition_id": i, "status": status, "reason": reason,
            "global_version_sent": sent, "staleness": staleness, "start_s": start_s, "finish_s": start_s + update_time_s,
            **parts, "update_time_s": update_time_s, "num_examples": examples[i], "loss": 2.3 * math.exp(-server_round / 8),
            "accuracy": min(1.0, 0.2 + server_round / 25), "train_macs": FULL_MACS * rates[i], "download_bytes": int(down),
            "upload_bytes": int(up), "peak_memory_bytes": int(60e6 * (0.3 + 0.7 * rates[i])), "retention_ratio": rates[i],
            "widths": {g: max(1, round(n * math.sqrt(rates[i]))) for g, n in GROUPS.items()}, "depth": None,
            "measured_compute_s": 0.21 * rates[i],
        }  # fmt: skip
        return row

    def evaluate(server_round: int, version: int, time_s: float) -> None:
        ceiling = 0.975 if adaptive else 0.985
        accuracy = (
            0.1 + (ceiling - 0.1) * (1 - math.exp(-server_round / 4.5)) + (rng.gauss(0, 0.004) if server_round else 0)
        )
        row = {"event": "evaluation", "server_round": server_round, "global_version": version, "time_s": time_s,
               "where": "central", "accuracy": accuracy, "loss": 2.3 * (1 - accuracy) + 0.05, "num_examples": 360}  # fmt: skip
        if adaptive:
            row |= {"depth": 2, "exits": [0.8 * accuracy, accuracy]} if server_round < 3 else {
                "exits": [0.8 * accuracy, 0.9 * accuracy, accuracy]}  # fmt: skip
        if adaptive and server_round and server_round % 10 == 0:
            row["family"] = [
                {
                    "name": f"retention {r}",
                    "retention_ratio": r,
                    "accuracy": accuracy - 0.25 * (1 - r) ** 2,
                    "accuracy_reestimated": accuracy - 0.06 * (1 - r) ** 2,
                }
                for r in sorted({round(x, 4) for x in rates})
            ]
            row["best"] = "retention 1.0"
        rows.append(row)
        shares = {str(i): max(0.0, min(1.0, accuracy - abs(rng.gauss(0, 0.05)))) for i in range(num_clients)}
        rows.append({**row, "where": "federated", "accuracy": sum(shares.values()) / num_clients, "clients": shares,
                     "num_examples": 300, "family": None})  # fmt: skip

    def merge(server_round: int, version: int, now_s: float, taken: list[dict[str, Any]]) -> None:
        done = [row for row in taken if row["status"] == "merged"]
        held = {g: sum(row["widths"][g] / n for row in done) / max(1, len(done)) for g, n in GROUPS.items()}
        rows.append({
            "event": "merge", "server_round": server_round, "global_version": version, "time_s": now_s, "num_merged": len(done),
            "n_star": sum(row["retention_ratio"] >= 0.999 for row in done), "uncovered_ratio": max(0.0, 0.02 * (1 - min(rates))),
            "coverage": held, "merge_cpu_s": 0.004,
        })  # fmt: skip

    def gates(server_round: int) -> None:
        layers = {g: {"entropy": 0.9, "overlap": 0.6, "never_used_ratio": 0.1, "agreement": 0.8} for g in GROUPS}
        overlaps = [[1.0 if a == b else 0.5 for b in range(10)] for a in range(10)]
        rows.append({"event": "gates", "server_round": server_round, "density": 0.5, "layers": layers,
                     "overlaps": overlaps})  # fmt: skip

    now_s, version = 0.0, 0
    if adaptive:
        times = {g: {"dense_s": 0.02, "gated_s": 0.012} for g in GROUPS}
        rows.append({"event": "plan", "server_round": 1, "partition_id": 0, "layers": times})
    evaluate(0, 0, 0.0)
    if buffer:
        flying = [arrival(i, 1, 0.0, 0, 0) for i in range(num_clients)]
        for server_round in range(1, num_rounds + 1):
            taken = []
            for _ in range(buffer):
                flying.sort(key=lambda row: row["finish_s"])
                done = flying.pop(0)
                now_s = done["finish_s"]
                taken.append({**done, "server_round": server_round, "staleness": version - done["global_version_sent"]})
                flying.append(arrival(done["partition_id"], server_round + 1, now_s, version, 0))
            version += 1
            rows.extend(taken)
            merge(server_round, version, now_s, taken)
            evaluate(server_round, version, now_s)
    else:
        for server_round in range(1, num_rounds + 1):
            taken = [arrival(i, server_round, now_s, version, 0) for i in range(num_clients)]
            taken.sort(key=lambda row: row["finish_s"])
            now_s = taken[-1]["finish_s"]
            rows.extend(taken)
            version += 1
            merge(server_round, version, now_s, taken)
            if adaptive:
                gates(server_round)
            if adaptive and server_round % 5 == 0 and server_round < num_rounds:
                times = {row["partition_id"]: row["update_time_s"] for row in taken}
                fastest = min(times, key=lambda i: times[i])
                rates = [
                    max(0.15, r * (0.45 + 0.55 * min(1.0, times[fastest] / times[i]))) if i != fastest else r
                    for i, r in enumerate(rates)
                ]
                rows.append({
                    "event": "decision", "server_round": server_round, "reference": fastest, "reference_s": times[fastest],
                    "rates": {str(i): r for i, r in enumerate(rates)}, "update_times_s": {str(i): t for i, t in times.items()},
                    "floors": [i for i, r in enumerate(rates) if r <= 0.15], "order_hash": "a1b2c3",
                })  # fmt: skip
            evaluate(server_round, version, now_s)
    if adaptive:
        rows.append(
            {"event": "warning", "message": "client 3: <script>alert(1)</script> reached its floor", "server_round": 10}
        )
    rows.append({"event": "end", "status": "completed", "reason": "", "time_s": now_s, "num_rounds": num_rounds})
    for index, row in enumerate(rows):
        row["wall_s"] = 2.0 + 0.05 * index
    return rows


def _skewed(rng: random.Random, size: int) -> list[float]:
    raw = [rng.gammavariate(0.5, 1.0) for _ in range(size)]
    return [value / sum(raw) for value in raw]


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write ``rows`` as the event log of run folder ``folder``; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function (name, **options of ``make_rows``) -> run folder."""

    def make(name: str = "run", rows: list[dict[str, Any]] | None = None, **options: Any) -> Path:
        return write_run(tmp_path / name, make_rows(**options) if rows is None else rows)

    return make
