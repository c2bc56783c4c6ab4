"""Ordered dropout: every batch trains one of several nested widths, drawn at random (FjORD, arXiv 2102.13451)."""

from __future__ import annotations

import json
from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional

from client_app.model import costs_by_spec
from client_app.objectives.base import Findings, Objective, ObjectiveError, Task, last_logits
from client_app.objectives.cross_entropy import cross_entropy
from client_app.objectives.distillation import divergence
from client_app.objectives.inner import InnerNetwork
from pruning.spec import SubModelSpec
from wire.spec import spec_from_json


def ordered_dropout(task: Task) -> Objective:
    """Cross-entropy of a width p drawn uniformly among the client's own and the narrower ones, anew for every batch.

    With ``self-distillation`` the client's full width is trained on every batch and teaches the width drawn
    (section 3.3): CE(z_max, y) + (1 - a) CE(z_p, y) + a T^2 KL(softmax(z_max / T) || softmax(z_p / T)); where the full
    width itself is drawn, it is trained once and learns from nobody. Only the full width moves running statistics.

    Settings: ``levels``, a JSON list of specs, the client's own first; ``self-distillation``;
    ``distillation-weight`` a in [0, 1] and ``temperature`` T, both 1 by default.

    Raises
    ------
    ObjectiveError
        If a level is not part of the client's sub-model, or the first is not all of it.
    """
    levels = read_levels(task)
    if len(levels) == 1 or task.examples is None:
        return cross_entropy(task)
    teaches = bool(task.settings.get("self-distillation", False))
    share, temperature = (float(task.settings.get(name, 1.0)) for name in ("distillation-weight", "temperature"))
    inner = [InnerNetwork(task, spec) for spec in levels[1:]]
    cost = costs_by_spec(task.full, task.layout, tuple(task.examples.x.shape[1:]))
    macs = [cost.of(spec).train_macs for spec in levels]
    num_seen: Counter[int] = Counter()
    smoothing = task.train.label_smoothing

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        level = int(torch.randint(len(levels), (1,), generator=task.generator))
        num_seen[level] += len(y)
        if level == 0:
            logits = last_logits(task.model(x))
            return functional.cross_entropy(logits, y, label_smoothing=smoothing), logits
        logits = inner[level - 1](x)
        narrow = functional.cross_entropy(logits, y, label_smoothing=smoothing)
        if not teaches:
            return narrow, logits
        num_seen[0] += len(y)
        widest = last_logits(task.model(x))
        value = functional.cross_entropy(widest, y, label_smoothing=smoothing)
        return value + (1 - share) * narrow + share * divergence(widest, logits, temperature), widest

    def finish(num_steps: int) -> Findings:
        return Findings(train_macs=float(sum(macs[level] * count for level, count in num_seen.items())))

    return Objective(task.model, loss, finish=finish, varies=True)


def read_levels(task: Task) -> list[SubModelSpec]:
    """The widths to draw from, the client's own first."""
    levels = [spec_from_json(item) or SubModelSpec() for item in json.loads(str(task.settings["levels"]))]
    if not levels or levels[0] != task.spec:
        raise ObjectiveError("objective: levels: the first must be the sub-model that was sent")
    for number, spec in enumerate(levels):
        if not spec.is_subset_of(task.spec, task.layout):
            raise ObjectiveError(f"objective: levels: number {number} is not part of the sub-model that was sent")
    return levels
