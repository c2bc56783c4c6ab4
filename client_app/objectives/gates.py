"""Gates over units: Bernoulli draws in front of the layers that read a unit, with a straight-through gradient.

A unit whose gate is shut is silenced, which is what removing it does. Gating the readers' *input* instead of their
weights needs no gradient of any weight: with frozen weights a step costs two thirds of a training step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruning.groups import Axis, Group

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class StraightThrough(torch.autograd.Function):
    """g ~ Bernoulli(sigmoid(s)) forward; dL/ds = p dL/dg backward: the draw is passed straight, scaled by p."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, uniform: Tensor) -> Tensor:
        """Draw; both arguments are [num_units]."""
        p = torch.sigmoid(scores)
        ctx.save_for_backward(p)
        return (uniform < p).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Scale by p."""
        (p,) = ctx.saved_tensors
        return gradients[0] * p, None


class Gates:
    """One gate per unit of ``groups``, hooked into the layers of ``model`` that read the units.

    Parameters
    ----------
    model : whose forward passes are gated until ``remove``.
    groups : whose units get gates.
    scores : group name -> where its scores begin, float [size].
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> None:
        self.groups = tuple(groups)
        self.scores = nn.Parameter(torch.cat([scores[group.name] for group in self.groups]))
        self.values: Tensor = torch.ones_like(self.scores)
        self._sizes = [group.size for group in self.groups]
        modules = dict(model.named_modules())
        self._handles = []
        begin = 0
        for group in self.groups:
            for axis in readers_of(group, modules):
                module = modules[axis.key.rpartition(".")[0]]
                hook = self._hook(slice(begin, begin + group.size), axis, isinstance(module, nn.Linear))
                self._handles.append(module.register_forward_pre_hook(hook))
            begin += group.size

    def draw(self, generator: torch.Generator) -> Tensor:
        """Open and shut the gates anew; returns them, [num_units]."""
        uniform = torch.rand(len(self.scores), generator=generator).to(self.scores.device)
        self.values = StraightThrough.apply(self.scores, uniform)
        return self.values

    def by_group(self) -> dict[str, Tensor]:
        """Group name -> scores, float [size]."""
        parts = self.scores.detach().split(self._sizes)
        return {group.name: part.clone() for group, part in zip(self.groups, parts, strict=True)}

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, units: slice, axis: Axis, is_last: bool) -> Any:
        def gate(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            values = self.values[units]
            if axis.repeat > 1:
                values = values.repeat_interleave(axis.repeat)
            size = x.shape[-1 if is_last else 1]
            if len(values) < size:  # others share this input: a concatenation
                values = nn.functional.pad(values, (axis.offset, size - axis.offset - len(values)), value=1.0)
            return (x * (values if is_last else values.view(-1, *[1] * (x.dim() - 2))), *inputs[1:])

        return gate


def readers_of(group: Group, modules: Mapping[str, nn.Module]) -> list[Axis]:
    """The axes along which linear layers and convolutions read a group's units."""
    readers = {axis: modules.get(axis.key.rpartition(".")[0]) for axis in group.axes if axis.dim == 1}
    return [axis for axis, module in readers.items() if isinstance(module, READERS)]
