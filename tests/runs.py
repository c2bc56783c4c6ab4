"""Small runs for tests: digits on a few clients, without Flower's engine and without a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from client_app.handler import handle
from server_app.config import parse
from server_app.run import run
from wire.local import Handler, LocalTransport

TINY: dict[str, Any] = {
    "num-rounds": 4,
    "num-clients": 4,
    "model.name": "mlp",
    "data.max-train": 400,
    "data.partition": "iid",
    "train.batch-size": 16,
    "train.local-epochs": 2,
    "train.schedule": "constant",  # so that a resumed run may have more rounds
    "keep-checkpoints": 100,
    "adaptcl.pruning-interval": 2,
    "adaptcl.rates.min-timed-rounds": 1,
}
"""A run of half a second in which every method shows what it does; AdaptCL decides in rounds 3, 5, 7, ..."""

MESSAGE_PER_BATCH: dict[str, Any] = {"train.local-epochs": 1, "train.batch-size": 32}

OWN: dict[str, dict[str, Any]] = {
    "sl-basic": MESSAGE_PER_BATCH,
    "splitfed": MESSAGE_PER_BATCH,
    "cos2p": {"cos2p.quorum-ratio": 0.0, "cos2p.mask-epochs": 2},  # waits for all unless told otherwise
    "adp": {"model.gates": True, "adp.warmup-rounds": 1, "adp.ramp-rounds": 1},
    "only-capable": {"only-capable.share": 1.0},  # so that as many clients answer as with other methods
    "fedbuff": {"fedbuff.buffer": 3},
    "depthfl": {"model.exits": True, "depthfl.ramp-up-rounds": 3},
    "scalefl": {"model.exits": True, "scalefl.distillation-start": 2},
    # the local phase is a share of the rounds: here none, so that a resumed run may have more rounds
    "adasplit": {"adasplit.kappa": 0.0, "adasplit.segments": 1, "adasplit.eta": 1.0, "train.momentum": 0.0},
    "fedrolex": {"fedrolex.rates": "1,0.5,0.25"},  # a sixteenth of the units needs more than ten rounds
}
"""What a method needs beyond ``TINY``, or instead of it."""

TIMINGS = ("wall_s", "measured_compute_s", "merge_cpu_s")
"""What of the event log may differ between two equal runs."""


def tiny_run(
    folder: Path, handler: Handler = handle, num_workers: int = 0, transport: Any = None, **settings: Any
) -> list[dict[str, Any]]:
    """Carry out a run into ``folder`` and return the rows of its event log; settings as ``loop__quorum=2``."""
    torch.set_num_threads(1)
    keys = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
    config = parse({**TINY, **OWN.get(keys.get("strategy", ""), {}), **keys, "run-dir": str(folder)})
    carrier = transport or LocalTransport(
        handler, config.run.num_clients, num_workers, reply_timeout_s=config.run.reply_timeout_s
    )
    try:
        with patch("server_app.run.write_report"):
            run(config, carrier, show=lambda line: None)
    finally:
        if transport is None:
            carrier.close()
    return read_rows(folder)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's event log."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def select(rows: list[dict[str, Any]], event: str, **where: Any) -> list[dict[str, Any]]:
    """The rows of one kind whose fields have the given values."""
    return [row for row in rows if row["event"] == event and all(row.get(k) == v for k, v in where.items())]


def without_timings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as two equal runs must share them: no wall times, and of the configuration nothing but what is trained.

    That a run was continued is in its log and not in that of the run which was not.
    """
    kept = [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows if row["event"] != "resume"]
    for row in kept:
        if row["event"] == "run":
            free = ("num-workers", "transport", "run-dir", "resume", "num-rounds", "reply-timeout-s")
            row["config"] = {k: v for k, v in row["config"].items() if k not in free}
    return kept


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """The global model of the newest checkpoint."""
    path = sorted((folder / "checkpoints").glob("round-*.pt"))[-1]
    return dict(torch.load(path, weights_only=True)["state"])


def equal_states(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are the same bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
