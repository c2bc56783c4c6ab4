"""Scales: what a unit is multiplied with, BatchNorm's factor or one of its own. Units with small ones can be spared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pruning.groups import Axis, Group, Layout

OWN = ".scale.weight"
"""How keys of ``UnitScale`` end: models call it ``scale``."""


class UnitScale(nn.Module):
    """A learnable factor for every unit, 1 at first: what BatchNorm's scale is, for layers without BatchNorm.

    With ``train.sparsity`` it is what the L1 penalty is on (Liu et al. 2017, network slimming).

    Parameters
    ----------
    num_units : size U of ``weight``.
    unit_width : neighbouring features E that are one unit: the width of an attention head, 1 for a neuron.
    """

    def __init__(self, num_units: int, unit_width: int = 1) -> None:
        super().__init__()
        self.unit_width = unit_width
        self.weight = nn.Parameter(torch.ones(num_units))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply every unit of [..., U * E]."""
        if self.unit_width == 1:
            return x * self.weight
        return (x.unflatten(-1, (-1, self.unit_width)) * self.weight[:, None]).flatten(-2)


def scale_axes(group: Group, state: Mapping[str, Tensor]) -> list[Axis]:
    """The group's axes that are scales."""
    return [axis for axis in group.axes if axis.key.endswith(OWN) or _is_batch_norm(axis.key, state)]


def has_scales(model: nn.Module, layout: Layout) -> bool:
    """Whether a prunable unit has a scale."""
    state = model.state_dict()
    return any(scale_axes(group, state) for group in layout.prunable)


def _is_batch_norm(key: str, state: Mapping[str, Tensor]) -> bool:
    return key.endswith(".weight") and key.removesuffix("weight") + "running_var" in state
