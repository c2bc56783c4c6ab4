"""Pruning by magnitude, as one snapshot of ADP's published code does it: small weights become zero after an epoch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from client_app.batches import num_batches
from client_app.objectives.base import Findings, Objective, Task


def magnitude(task: Task, inner: Objective) -> Objective:
    """Set weights below ``threshold`` in magnitude to zero after every local epoch; they may grow again.

    Convolutions and linear layers only, not their biases. Nothing is saved by it: uploads and products stay whole.
    """
    if task.examples is None:
        return inner
    threshold = float(task.settings.get("threshold", 1e-3))
    named = inner.model.named_parameters()  # positions and class tokens of ViTs are no weights
    weights = [parameter for name, parameter in named if name.endswith("weight") and parameter.dim() > 1]
    num_steps = num_batches(len(task.examples), task.train.batch_size)
    num_done = 0

    @torch.no_grad()
    def prune() -> None:
        for weight in weights:
            weight.masked_fill_(weight.abs() < threshold, 0.0)

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal num_done
        if num_done and num_done % num_steps == 0:
            prune()
        num_done += 1
        return inner.loss(x, y)

    def finish(steps: int) -> Findings:
        prune()
        findings = inner.finish(steps)
        total = sum(weight.numel() for weight in weights)
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        return replace(findings, metrics={**findings.metrics, "zero_ratio": zeros / max(1, total)})

    return replace(inner, loss=loss, finish=finish)
