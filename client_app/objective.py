"""What a client minimises, by name. Strategies ask for an objective; objectives know no strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.groups import Layout
from pruning.importance import bn_scale_axes
from wire.flat import Scalar, nearest
from wire.message import TrainConfig


class ObjectiveError(ValueError):
    """An instruction asks for an objective that this client does not have."""


@dataclass(frozen=True)
class Task:
    """What an objective may look at.

    Attributes
    ----------
    model : the sub-model, in training mode.
    layout : of the full model, whose group names and keys the sub-model shares.
    train : the run's training configuration.
    settings : the objective's own, from the instruction.
    label_counts : int64 [num_classes], this client's training examples by class.
    """

    model: nn.Module
    layout: Layout
    train: TrainConfig
    settings: Mapping[str, Scalar]
    label_counts: Tensor


Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images [batch, ...], labels [batch]) -> (scalar loss, logits [batch, num_classes])."""


def cross_entropy(task: Task) -> Loss:
    """Cross-entropy; with ``mask-missing-labels``, logits of classes the client lacks are set to 0 (HeteroFL)."""
    is_missing = task.label_counts == 0
    masks = bool(task.settings.get("mask-missing-labels", False)) and bool(is_missing.any())

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = last_logits(task.model(x))
        if masks:
            logits = logits.masked_fill(is_missing, 0.0)
        return functional.cross_entropy(logits, y, label_smoothing=task.train.label_smoothing), logits

    return loss


OBJECTIVES: dict[str, Callable[[Task], Loss]] = {"cross-entropy": cross_entropy}
"""Every objective by the name that instructions use."""


def make_loss(name: str, task: Task) -> Loss:
    """The named objective plus the run's regulariser.

    Raises
    ------
    ObjectiveError
        If there is no objective of that name.
    """
    if name not in OBJECTIVES:
        raise ObjectiveError(f"objective: {name!r} is not known here; this client has {', '.join(OBJECTIVES)}{nearest(name, OBJECTIVES)}")
    bare = OBJECTIVES[name](task)
    if not task.train.sparsity:
        return bare
    penalty = sparsity_penalty(task)

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value, logits = bare(x, y)
        return value + task.train.sparsity * penalty(), logits

    return loss


def sparsity_penalty(task: Task) -> Callable[[], Tensor]:
    """Sum of |BatchNorm scale| (Liu et al. 2017), or the group lasso over each unit's weights (Wen et al. 2016)."""
    parameters = dict(task.model.named_parameters())
    state = task.model.state_dict()
    if task.train.sparsity_norm == "l1":
        keys = sorted({axis.key for group in task.layout.prunable for axis in bn_scale_axes(group, state)})
        scales = [parameters[key] for key in keys if key in parameters]
        return lambda: torch.stack([scale.abs().sum() for scale in scales]).sum() if scales else torch.zeros(())
    rows = sorted({axis.key for group in task.layout.prunable for axis in group.axes if axis.dim == 0})
    weights = [parameters[key] for key in rows if key in parameters and parameters[key].dim() > 1]
    return lambda: torch.stack([w.flatten(1).norm(dim=1).sum() for w in weights]).sum() if weights else torch.zeros(())


def last_logits(output: Tensor | list[Tensor]) -> Tensor:
    """Logits [batch, num_classes] of the deepest exit."""
    return output[-1] if isinstance(output, list | tuple) else output
