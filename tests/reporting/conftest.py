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
    run = FakeRun(strategy, num_clients, num_rounds, seed, sigma)
    run.evaluate(0, 0)
    if buffer:
        run.play_buffered(buffer)
    else:
        run.play_synchronous()
    if run.adaptive:
        run.rows.append(
            {"event": "warning", "message": "client 3: <script>alert(1)</script> reached its floor", "server_round": 10}
        )
    run.rows.append(
        {"event": "end", "status": "completed", "reason": "", "time_s": run.now_s, "num_rounds": num_rounds}
    )
    for index, row in enumerate(run.rows):
        row["wall_s"] = 2.0 + 0.05 * index
    return run.rows


class FakeRun:
    """Plays rounds and writes down what a real run would."""

    def __init__(self, strategy: str, num_clients: int, num_rounds: int, seed: int, sigma: float) -> None:
        self.rng = rng = random.Random(seed)
        self.adaptive, self.num_clients, self.num_rounds = strategy == "adaptcl", num_clients, num_rounds
        self.slowness = [1.0 + (sigma - 1.0) * i / max(1, num_clients - 1) for i in range(num_clients)]
        rng.shuffle(self.slowness)
        self.rates = [1.0] * num_clients
        self.examples = [rng.randint(60, 240) for _ in range(num_clients)]
        self.now_s, self.version = 0.0, 0
        run = {
            "event": "run", "strategy": strategy, "model": "resnet8", "data": "digits", "num_clients": num_clients,
            "num_parameters": 77_850, "seed": seed, "versions": {"python": "3.11.7", "torch": "2.13.0", "flwr": "1.41.0"},
            "config": {"strategy": strategy, "num-rounds": num_rounds, "fleet.name": f"linear:{sigma:g}", "learning-rate": 0.05,
                       "adaptcl.pruning-interval": 5, "data.partition": "dirichlet:0.5", "resume": ""},
        }  # fmt: skip
        clients = [
            {"partition_id": i, "device": f"linear-{slow:.1f}", "train_flops": 6e9 / slow,
             "uplink_bytes_per_s": 2e6 / slow, "downlink_bytes_per_s": 8e6 / slow,
             "memory_bytes": 4 * 2**30, "num_examples": self.examples[i],
             "label_counts": [int(self.examples[i] * w) for w in _skewed(rng, 10)]}
            for i, slow in enumerate(self.slowness)
        ]  # fmt: skip
        self.rows: list[dict[str, Any]] = [run, {"event": "clients", "clients": clients}]

    def arrive(self, i: int, server_round: int) -> dict[str, Any]:
        """Client ``i`` is asked now; the row of its answer."""
        noise, rate = math.exp(self.rng.gauss(0, 0.02)), self.rates[i]
        parts = {
            "download_s": 0.04 * self.slowness[i] * rate * noise,
            "compute_s": 3.0 * self.slowness[i] * (0.08 + 0.92 * rate) * noise,
            "upload_s": 0.155 * self.slowness[i] * rate * noise,
        }
        update_time_s = sum(parts.values())
        has_failed = self.rng.random() < 0.01
        return {
            "event": "arrival", "server_round": server_round, "partition_id": i,
            "status": "failed" if has_failed else "merged",
            "reason": "RuntimeError: <b>out of memory</b> & more" if has_failed else "",
            "global_version_sent": self.version, "staleness": 0, "start_s": self.now_s, "finish_s": self.now_s + update_time_s,
            **parts, "update_time_s": update_time_s, "num_examples": self.examples[i], "loss": 2.3 * math.exp(-server_round / 8),
            "accuracy": min(1.0, 0.2 + server_round / 25), "train_macs": FULL_MACS * rate, "download_bytes": int(FULL_BYTES * rate),
            "upload_bytes": int(FULL_BYTES * rate), "peak_memory_bytes": int(60e6 * (0.3 + 0.7 * rate)), "retention_ratio": rate,
            "widths": {g: max(1, round(n * math.sqrt(rate))) for g, n in GROUPS.items()}, "depth": None,
            "measured_compute_s": 0.21 * rate,
        }  # fmt: skip

    def evaluate(self, server_round: int, version: int) -> None:
        """A central and a federated evaluation."""
        ceiling = 0.975 if self.adaptive else 0.985
        noise = self.rng.gauss(0, 0.004) if server_round else 0
        accuracy = 0.1 + (ceiling - 0.1) * (1 - math.exp(-server_round / 4.5)) + noise
        row = {"event": "evaluation", "server_round": server_round, "global_version": version, "time_s": self.now_s,
               "where": "central", "accuracy": accuracy, "loss": 2.3 * (1 - accuracy) + 0.05, "num_examples": 360}  # fmt: skip
        if self.adaptive and server_round and server_round % 10 == 0:
            row["family"] = [
                {
                    "retention_ratio": r,
                    "accuracy": accuracy - 0.25 * (1 - r) ** 2,
                    "accuracy_reestimated": accuracy - 0.06 * (1 - r) ** 2,
                }
                for r in sorted({round(x, 4) for x in self.rates})
            ]
            row["best"] = "retention 1.0"
        self.rows.append(row)
        shares = {str(i): max(0.0, min(1.0, accuracy - abs(self.rng.gauss(0, 0.05)))) for i in range(self.num_clients)}
        self.rows.append({**row, "where": "federated", "accuracy": sum(shares.values()) / self.num_clients,
                          "clients": shares, "num_examples": 300, "family": None})  # fmt: skip

    def merge(self, server_round: int, taken: list[dict[str, Any]]) -> None:
        """Write down the answers of a round and their merge."""
        self.version += 1
        self.rows.extend(taken)
        done = [row for row in taken if row["status"] == "merged"]
        held = {g: sum(row["widths"][g] / n for row in done) / max(1, len(done)) for g, n in GROUPS.items()}
        self.rows.append({
            "event": "merge", "server_round": server_round, "global_version": self.version, "time_s": self.now_s,
            "num_merged": len(done), "n_star": sum(row["retention_ratio"] >= 0.999 for row in done),
            "uncovered_ratio": max(0.0, 0.02 * (1 - min(self.rates))), "coverage": held, "merge_cpu_s": 0.004,
        })  # fmt: skip

    def play_buffered(self, buffer: int) -> None:
        """A merge per ``buffer`` arrivals; clients never stop."""
        flying = [self.arrive(i, 1) for i in range(self.num_clients)]
        for server_round in range(1, self.num_rounds + 1):
            taken = []
            for _ in range(buffer):
                flying.sort(key=lambda row: row["finish_s"])
                done = flying.pop(0)
                self.now_s = done["finish_s"]
                staleness = self.version - done["global_version_sent"]
                taken.append({**done, "server_round": server_round, "staleness": staleness})
                flying.append(self.arrive(done["partition_id"], server_round + 1))
            self.merge(server_round, taken)
            self.evaluate(server_round, self.version)

    def play_synchronous(self) -> None:
        """Every round waits for everybody; an adaptive run shrinks its sub-models every five rounds."""
        for server_round in range(1, self.num_rounds + 1):
            taken = [self.arrive(i, server_round) for i in range(self.num_clients)]
            taken.sort(key=lambda row: row["finish_s"])
            self.now_s = taken[-1]["finish_s"]
            self.merge(server_round, taken)
            if self.adaptive and server_round % 5 == 0 and server_round < self.num_rounds:
                self.decide(server_round, {row["partition_id"]: row["update_time_s"] for row in taken})
            self.evaluate(server_round, self.version)

    def decide(self, server_round: int, times: dict[int, float]) -> None:
        """Shrink everybody but the fastest."""
        fastest = min(times, key=lambda i: times[i])
        self.rates = [
            rate if i == fastest else max(0.15, rate * (0.45 + 0.55 * min(1.0, times[fastest] / times[i])))
            for i, rate in enumerate(self.rates)
        ]
        self.rows.append({
            "event": "decision", "server_round": server_round, "reference": fastest, "reference_s": times[fastest],
            "rates": {str(i): r for i, r in enumerate(self.rates)}, "update_times_s": {str(i): t for i, t in times.items()},
            "floors": [i for i, r in enumerate(self.rates) if r <= 0.15], "order_hash": "a1b2c3",
        })  # fmt: skip


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
