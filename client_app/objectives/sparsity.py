"""Regularisers that make units dispensable: L1 on their scales, or the group lasso."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from client_app.objectives.base import Objective, Task
from pruning.unit_scale import scale_axes


def sparse(task: Task, inner: Objective) -> Objective:
    """Add ``train.sparsity`` times the penalty that ``train.sparsity-norm`` names."""
    penalty = sparsity_penalty(replace(task, model=inner.model))  # a base may have cut it down

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value, logits = inner.loss(x, y)
        return value + task.train.sparsity * penalty(), logits

    return replace(inner, loss=loss)


def sparsity_penalty(task: Task) -> Callable[[], Tensor]:
    """Sum of |scale| (Liu et al. 2017), or the group lasso (Wen et al. 2016).

    Its groups are the rows by which one layer writes one unit: a filter, a neuron, the rows of a head's queries.
    """
    parameters = dict(task.model.named_parameters())
    state = task.model.state_dict()
    if task.train.sparsity_norm == "l1":
        keys = sorted({axis.key for group in task.layout.prunable for axis in scale_axes(group, state)})
        scales = [parameters[key] for key in keys if key in parameters]
        return lambda: torch.stack([scale.abs().sum() for scale in scales]).sum() if scales else torch.zeros(())
    repeats = {axis.key: axis.repeat for group in task.layout.prunable for axis in group.axes if axis.dim == 0}
    written = [(parameters[key], repeats[key]) for key in sorted(repeats) if key in parameters]
    weights = [(weight, repeat) for weight, repeat in written if weight.dim() > 1]
    if not weights:
        return lambda: torch.zeros(())
    return lambda: torch.stack([w.unflatten(0, (-1, r)).flatten(1).norm(dim=1).sum() for w, r in weights]).sum()
