"""Memory of clients under Co-S2P and its rivals: the peak of a process of its own, for each device class and phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.common import in_fresh_process, peak_bytes
from bench.runs import Keys, keep, load
from fleet.fleet import JETSON_PATTERN
from server_app.config import parse
from server_app.run import run
from strategies.base import RunStoppedError
from wire.local import LocalTransport
from wire.message import Instruction, Report

BATCH = 32
COMMON: Keys = {
    "num-clients": len(JETSON_PATTERN),
    "num-rounds": 1,
    "fleet.name": "jetson-16",
    "data.name": "digits",
    "data.partition": "iid",
    "data.max-train": 2 * BATCH * len(JETSON_PATTERN),
    "data.max-test": BATCH,
    "data.test-ratio": 0.1,
    "model.exits": True,
    "train.batch-size": BATCH,
    "train.optimizer": "adam",
    "train.learning-rate": 0.001,
}
"""One device of each class, two batches each."""
PHASES: dict[str, Keys] = {
    "masks + weights": {"cos2p.masks": "agreed", "cos2p.mask-epochs": 1},
    "weights": {"cos2p.masks": "first"},
}
"""Of Co-S2P's clients, and settings under which a client's first request is of this phase; others have the second."""
FULL = "fedavg"
HALF = JETSON_PATTERN[1]
"""The class of devices that has rate .5: the third fastest of four."""


def kept_memory(store: Path, methods: Mapping[str, Keys], model: str, *, may_measure: bool) -> list[dict[str, Any]]:
    """What the store has of ``measure_memory``, measured now where it lacks it; [] if that is not wanted."""
    path = store / f"peaks_{model}.json"
    asked = {name: {**COMMON, **keys} for name, keys in methods.items()}
    if may_measure and not (path.exists() and load(path)["methods"] == asked):
        keep(path, {"methods": asked, "rows": measure_memory(methods, model)})
    rows: list[dict[str, Any]] = load(path)["rows"] if path.exists() else []
    return rows


def measure_memory(methods: Mapping[str, Keys], model: str) -> list[dict[str, Any]]:
    """Peak of one client process for each method, phase and device class, MiB, and what the client counts.

    Parameters
    ----------
    methods : name -> its settings.
    model : name of the network.
    """
    rows, peaks = [], dict[str, dict[str, float]]()
    for method, keys in methods.items():
        phases = PHASES if keys["strategy"] == "cos2p" else {"weights": {}}
        for phase, more in phases.items():
            row: dict[str, Any] = {"method": method, "phase": phase}
            requests = first_requests({**COMMON, "model.name": model, **keys, **more})
            for pid, device in enumerate(JETSON_PATTERN):
                if pid in requests:
                    asked = requests[pid]
                    same = repr(replace(asked, dispatch=0, partition_id=0, state={}, companions={}))
                    peaks[same] = peaks.get(same) or in_fresh_process(client_peak, asked)
                    row |= {f"{device} {figure}": value for figure, value in peaks[same].items()}
            rows.append(row)
    return rows


def first_requests(keys: Keys) -> dict[int, Instruction]:
    """What a run asks its clients first, by partition id; nobody answers."""
    found: dict[int, Instruction] = {}

    def note(instruction: Instruction) -> Report:
        found.setdefault(instruction.partition_id, replace(instruction, job=replace(instruction.job, store_dir="")))
        raise RuntimeError("this device only listens")

    with (
        TemporaryDirectory() as folder,
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
        suppress(RunStoppedError),
    ):
        config = parse({**keys, "run-dir": f"{folder}/run"})
        run(config, LocalTransport(note, config.run.num_clients, 0), show=None)
    return found


def client_peak(instruction: Instruction) -> dict[str, float]:
    """Peak of this process while it handles one request, above its peak before, and what the client counts; MiB."""
    import torch

    from bench.cos2p_scale import reset_peak
    from client_app.data import client_examples
    from client_app.handler import handle
    from client_app.model import build_model, costs_by_spec, full_model, sub_model
    from wire.message import ModelConfig

    torch.set_num_threads(1)
    job, shape, classes = instruction.job, (1, 8, 8), 10
    client_examples(job.data, job.num_clients, job.seed)  # imports and caches are not what is compared
    full_model(job.model, classes, shape)
    sub_model(job.model, classes, shape, instruction.spec)
    tiny = replace(job, model=ModelConfig("mlp"), train=replace(job.train, batch_size=2))
    costs_by_spec(*full_model(tiny.model, classes, shape), shape)
    small = build_model(tiny.model, classes, shape)[0].state_dict()
    handle(Instruction("train", 0, 0, 1, 0, tiny, small))
    del small
    reset_peak()
    before = peak_bytes()
    report = handle(instruction)
    return {"measured": (peak_bytes() - before) / 2**20, "counted": report.peak_memory_bytes / 2**20}


def saved_ratios(rows: Sequence[Mapping[str, Any]], method: str, device: str) -> dict[str, float]:
    """Phase -> what this class of devices measured against the full model's training: -.5 for half of it."""
    measured = f"{device} measured"
    full = next(row for row in rows if row["method"] == FULL)[measured]
    return {row["phase"]: row[measured] / full - 1 for row in rows if row["method"] == method}
