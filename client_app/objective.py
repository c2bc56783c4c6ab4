"""What a client minimises, by name. Strategies ask for an objective; objectives know no strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.extract import relative, resize, selection, shapes_of
from pruning.groups import Layout
from pruning.importance import bn_scale_axes
from pruning.rows import gather
from pruning.spec import SubModelSpec
from wire.flat import Scalar, nearest
from wire.grid import spec_from_json
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
    spec : what of the full model ``model`` is.
    full : the full model without storage, from which other sub-models are cut.
    """

    model: nn.Module
    layout: Layout
    train: TrainConfig
    settings: Mapping[str, Scalar]
    label_counts: Tensor
    spec: SubModelSpec
    full: nn.Module


Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images [batch, ...], labels [batch]) -> (scalar loss, logits [batch, num_classes])."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, and what it costs beyond one pass through the sub-model.

    Attributes
    ----------
    loss : of one batch.
    extra : further networks that every batch passes through, forward and backward.
    """

    loss: Loss
    extra: tuple[nn.Module, ...] = ()


def cross_entropy(task: Task) -> Objective:
    """Cross-entropy; with ``mask-missing-labels``, logits of classes the client lacks are set to 0 (HeteroFL)."""
    is_missing = task.label_counts == 0
    masks = bool(task.settings.get("mask-missing-labels", False)) and bool(is_missing.any())

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = last_logits(task.model(x))
        if masks:
            logits = logits.masked_fill(is_missing, 0.0)
        return functional.cross_entropy(logits, y, label_smoothing=task.train.label_smoothing), logits

    return Objective(loss)


def nested(task: Task) -> Objective:
    """Train the sub-model and, inside it, the core that everybody holds: CE(wide) + CE(core) + T^2 KL(wide || core).

    The core's weights are the sub-model's own, so that it stays a network of its own, and what lies around it is
    learned as an addition to it (universally slimmable networks and in-place distillation: Yu and Huang 2019).
    Settings: ``core``, a spec as JSON; ``temperature``.
    """
    core_spec = spec_from_json(str(task.settings["core"]))
    assert core_spec is not None
    if task.spec == core_spec:
        return cross_entropy(task)
    temperature = float(task.settings.get("temperature", 3.0))
    shapes = shapes_of(task.full.state_dict())
    outer, inner = (selection(task.layout, spec, shapes).positions for spec in (task.spec, core_spec))
    core = resize(task.full, task.layout, core_spec).train()
    places = {key: relative(outer[key], kept) for key, kept in inner.items()}
    own = dict(task.model.named_parameters()) | dict(task.model.named_buffers())

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = last_logits(task.model(x))
        # Clones: the core's pass must not touch the sub-model's running statistics, not even through a view.
        weights = {key: gather(own[key], kept).clone() for key, kept in places.items()}
        core_logits = last_logits(torch.func.functional_call(core, weights, (x,)))
        smoothing = task.train.label_smoothing
        value = functional.cross_entropy(logits, y, label_smoothing=smoothing)
        value = value + functional.cross_entropy(core_logits, y, label_smoothing=smoothing)
        teacher = functional.softmax(logits.detach() / temperature, dim=1)
        student = functional.log_softmax(core_logits / temperature, dim=1)
        return value + temperature**2 * functional.kl_div(student, teacher, reduction="batchmean"), logits

    return Objective(loss, (core,))


OBJECTIVES: dict[str, Callable[[Task], Objective]] = {"cross-entropy": cross_entropy, "nested": nested}
"""Every objective by the name that instructions use."""


def make_objective(name: str, task: Task) -> Objective:
    """The named objective plus the run's regulariser.

    Raises
    ------
    ObjectiveError
        If there is no objective of that name.
    """
    if name not in OBJECTIVES:
        raise ObjectiveError(
            f"objective: {name!r} is not known here; this client has {', '.join(OBJECTIVES)}{nearest(name, OBJECTIVES)}"
        )
    bare = OBJECTIVES[name](task)
    if not task.train.sparsity:
        return bare
    penalty = sparsity_penalty(task)

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value, logits = bare.loss(x, y)
        return value + task.train.sparsity * penalty(), logits

    return Objective(loss, bare.extra)


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
