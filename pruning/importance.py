"""How much a unit matters: one score per unit, from the weights or from their gradients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pruning.groups import Axis, Group, Layout
from pruning.unit_scale import scale_axes

UnitScores = dict[str, np.ndarray]
"""Group name -> importance of its units, float64 [size]."""

METHODS = ("bn-scale", "l1", "l2", "taylor")


class ImportanceError(ValueError):
    """An importance method is unknown or cannot be computed on this model."""


def score_units(
    state: Mapping[str, Tensor],
    layout: Layout,
    method: str = "bn-scale",
    gradients: Mapping[str, Tensor] | None = None,
    normalize: bool = True,
) -> UnitScores:
    """Score every unit of every prunable group.

    Parameters
    ----------
    state : full state dict.
    method : ``bn-scale``: mean |scale| over the unit's BatchNorm entries (Liu et al. 2017, network slimming), or a
        scale of its own (``pruning.unit_scale``); groups without either fall back to ``l2``; ``l1`` / ``l2``: norm of
        all the unit's weights (Li et al. 2017);
        ``taylor``: sum |gradient * weight| (Molchanov et al. 2019, eq. 8).
    gradients : for ``taylor``: key -> mean loss gradient of that entry.
    normalize : divide by the group's mean score. Raw magnitudes of different layers cannot be compared.

    Raises
    ------
    ImportanceError
        If ``method`` is unknown, or ``taylor`` is asked for without gradients.
    """
    if method not in METHODS:
        raise ImportanceError(f"importance: unknown method {method!r}; use one of {', '.join(METHODS)}")
    if method == "taylor" and gradients is None:
        raise ImportanceError("importance: 'taylor' needs the gradients of a batch; pass gradients=")
    scores: UnitScores = {}
    for group in layout.prunable:
        score = _score_group(group, state, method, gradients)
        mean = score.mean()
        scores[group.name] = score / mean if normalize and mean > 0 else score
    return scores


def _score_group(
    group: Group, state: Mapping[str, Tensor], method: str, gradients: Mapping[str, Tensor] | None
) -> np.ndarray:
    if method == "bn-scale":
        scales = [_unit_view(state[axis.key], axis, group).abs().mean(1) for axis in scale_axes(group, state)]
        if scales:
            return torch.stack(scales).mean(0).double().numpy()
        method = "l2"
    total = torch.zeros(group.size, dtype=torch.float64)
    for axis in group.axes:
        if not axis.key.endswith(("weight", "bias")):
            continue
        units = _unit_view(state[axis.key], axis, group).double()
        if method == "taylor":
            assert gradients is not None
            if axis.key in gradients:
                total += (units * _unit_view(gradients[axis.key], axis, group).double()).abs().sum(1)
        else:
            total += units.abs().sum(1) if method == "l1" else units.square().sum(1)
    return (total.sqrt() if method == "l2" else total).numpy()


def _unit_view(tensor: Tensor, axis: Axis, group: Group) -> Tensor:
    """Entries of one axis by unit: [size, entries per unit]."""
    owned = tensor.detach().narrow(axis.dim, axis.offset, group.size * axis.repeat)
    return owned.movedim(axis.dim, 0).reshape(group.size, -1)
