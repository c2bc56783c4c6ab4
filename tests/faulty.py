"""Client handlers that misbehave: functions of a module, so that worker processes find them by name."""

from __future__ import annotations

import math
import os
import signal
import threading
from dataclasses import replace
from typing import Any

import sklearn.datasets  # noqa: F401  (here, so that worker processes are forked with it instead of importing it)
import torch

from client_app.handler import handle
from wire.message import Instruction, Report

CULPRIT = 1
"""The partition id of the client that misbehaves, in its first round."""


def is_due(instruction: Instruction) -> bool:
    """Whether this is the request that goes wrong; a round may ask several times."""
    if instruction.action != "train" or (instruction.partition_id, instruction.server_round) != (CULPRIT, 1):
        return False
    is_first_step = instruction.settings.get("start") == 0  # split learning asks one client after the other
    return instruction.dispatch < instruction.job.num_clients or is_first_step


def works(instruction: Instruction) -> Report:
    """Do as told."""
    return handle(instruction)


def raises(instruction: Instruction) -> Report:
    """Raise in the middle."""
    if is_due(instruction):
        raise RuntimeError("the battery is empty")
    return handle(instruction)


def cannot_test(instruction: Instruction) -> Report:
    """Train, and raise in every test."""
    if instruction.action == "evaluate":
        raise RuntimeError("no test part")
    return handle(instruction)


def dies(instruction: Instruction) -> Report:
    """Take the whole process down."""
    if is_due(instruction):
        os.kill(os.getpid(), signal.SIGKILL)
    return handle(instruction)


def hangs(instruction: Instruction) -> Report:
    """Never answer."""
    if is_due(instruction):
        threading.Event().wait()
    return handle(instruction)


def _with_state(report: Report, **changes: torch.Tensor | None) -> Report:
    name = "state" if report.state else "companions"
    tensors: dict[str, Any] = {**getattr(report, name), **{k.replace("__", "."): v for k, v in changes.items()}}
    return replace(report, **{name: {k: v for k, v in tensors.items() if v is not None}})


def _first(report: Report) -> tuple[str, torch.Tensor]:
    """A weight, or what is sent where there are none."""
    if report.state:
        return next((k, t) for k, t in report.state.items() if t.dim() > 1)
    return next((k, t) for k, t in report.companions.items() if t.is_floating_point())


def _spoil(kind: str, report: Report) -> Report:
    key, tensor = _first(report)
    if kind in ("nan", "infinity"):
        poisoned = tensor.clone()
        poisoned.view(-1)[3] = math.nan if kind == "nan" else math.inf
        return _with_state(report, **{key: poisoned})
    return {
        "wrong-shape": lambda: _with_state(report, **{key: tensor[:-1]}),
        "wrong-dtype": lambda: _with_state(report, **{key: tensor.to(torch.complex64)}),
        "missing-key": lambda: _with_state(report, **{key: None}),
        "unknown-key": lambda: _with_state(report, stowaway=tensor),
        "huge": lambda: _with_state(report, **{key: tensor * 0 + 1e30}),
        "no-examples": lambda: replace(report, num_examples=0),
        "reserved-metric": lambda: replace(report, metrics={**report.metrics, "event": 1.0, "server_round": 0.5}),
        "nan-loss": lambda: replace(report, metrics={"loss": math.nan}),
        "negative-examples": lambda: replace(report, num_examples=-5),
        "nan-macs": lambda: replace(report, train_macs=math.nan),
        "foreign-signature": lambda: replace(report, partition_id=3),
    }[kind]()


SPOILED = {
    "nan": ("rejected", "holds NaN or infinity"),
    "infinity": ("rejected", "holds NaN or infinity"),
    "wrong-shape": ("rejected", "should have shape"),
    "wrong-dtype": ("rejected", "complex64"),
    "missing-key": ("rejected", "missing entries"),
    "unknown-key": ("rejected", "stowaway"),
    "huge": ("rejected", "holds numbers up to"),
    "no-examples": ("rejected", "num-examples: got 0"),
    "reserved-metric": ("rejected", "metric 'event' has the name of a field of the event log"),
    "nan-loss": ("rejected", "'loss': got nan"),
    "negative-examples": ("rejected", "num-examples: got -5"),
    "nan-macs": ("rejected", "train-macs: got nan"),
    "foreign-signature": ("failed", "signed by client 3"),
}
"""Kind of spoiled answer -> (status, part of the reason) that the event log must show."""


class Spoiler:
    """Spoils one answer; only for handlers of this process."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, instruction: Instruction) -> Report:
        report = handle(instruction)
        return _spoil(self.kind, report) if is_due(instruction) else report
