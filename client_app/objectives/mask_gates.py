"""The gates by which a mask is learned: Bernoulli draws in front of what reads a unit, passed straight through.

They are Co-S2P's, open or shut for a whole batch and gone with the mask phase; ADP's, in ``pruning.gates``, belong to
the model and judge every sample.

A unit whose gate is shut is silenced, which is what removing it does. What no layer reads, for it goes into a residual
stream, is gated behind the layer that writes it. The gradient of a gate needs no gradient of any
weight: with frozen weights a step makes two thirds of the products of a training step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.groups import Axis, Group

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

PIECE = 1 << 18
"""Numbers gone over at once on a CPU: one MiB, which its cache still has when the next operation comes to it."""


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


class GatedProduct(torch.autograd.Function):
    """x (W g)^T + b with a frozen W: the columns of W are gated, and no gradient of W is made to get that of g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
        """x is [..., num_in], W [num_out, num_in], g [num_in]: gating W's few rows is cheaper than gating x's many."""
        ctx.save_for_backward(x, weight, gate)
        return nn.functional.linear(x, weight * gate, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor]:
        """dL/dg = sum over rows of x (dL/dy W): also for gates that are shut."""
        x, weight, gate = ctx.saved_tensors
        moved = gradients[0].flatten(0, -2) @ weight
        num_rows = max(1, PIECE // len(gate)) if moved.device.type == "cpu" else len(moved)
        of_gate = torch.zeros_like(gate)
        for inputs, piece in zip(x.flatten(0, -2).split(num_rows), moved.split(num_rows), strict=True):
            of_gate += (inputs * piece).sum(0)
            piece.mul_(gate)
        return moved.view(x.shape), None, None, of_gate


class MaskGates:
    """One gate per unit of ``groups``, hooked into the layers of ``model`` that read it, or write it if none does.

    Parameters
    ----------
    model : whose forward passes are gated until ``remove``; weights that are frozen already are gated cheaper.
    groups : whose units get gates.
    scores : group name -> where its scores begin, float [size].
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> None:
        self.groups = tuple(groups)
        self.scores = nn.Parameter(torch.cat([scores[group.name] for group in self.groups]))
        self._sizes = [group.size for group in self.groups]
        self.set(torch.ones_like(self.scores))
        modules = dict(model.named_modules())
        self._handles: list[RemovableHandle] = []
        self._replaced: list[nn.Module] = []
        for number, group in enumerate(self.groups):
            for axis in readers_of(group, modules):
                module = modules[axis.key.rpartition(".")[0]]
                whole = isinstance(module, nn.Linear) and module.in_features == group.size * axis.repeat
                if isinstance(module, nn.Linear) and whole and not module.weight.requires_grad:
                    module.forward = partial(self._product, module, number, axis.repeat)  # type: ignore[method-assign]
                    self._replaced.append(module)
                else:
                    hook = self._hook(number, axis, isinstance(module, nn.Linear))
                    self._handles.append(module.register_forward_pre_hook(hook))
            for axis in writers_of(group, modules):
                module = modules[axis.key.rpartition(".")[0]]
                self._handles.append(module.register_forward_hook(self._written(number)))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Open and shut the gates anew; returns them, [num_units]."""
        uniform = torch.rand(len(self.scores), generator=generator).to(self.scores.device)
        drawn: Tensor = StraightThrough.apply(self.scores, uniform)
        self.set(drawn)
        return drawn

    def set(self, values: Tensor) -> None:
        """Gate with these, [num_units]."""
        self._values: Sequence[Tensor] = values.split(self._sizes)

    def by_group(self) -> dict[str, Tensor]:
        """Group name -> scores, float [size]."""
        parts = self.scores.detach().split(self._sizes)
        return {group.name: part.clone() for group, part in zip(self.groups, parts, strict=True)}

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward  # the class's shows again

    def _product(self, module: nn.Linear, number: int, repeat: int, x: Tensor) -> Tensor:
        gate = self._values[number]
        gate = gate.repeat_interleave(repeat) if repeat > 1 else gate
        product: Tensor = GatedProduct.apply(x, module.weight, module.bias, gate)
        return product

    def _written(self, number: int) -> Any:
        return lambda module, inputs, written: written * self._values[number]

    def _hook(self, number: int, axis: Axis, is_last: bool) -> Any:
        def gate(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            values = self._values[number]
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


def writers_of(group: Group, modules: Mapping[str, nn.Module]) -> list[Axis]:
    """The axes along which linear layers write a group's units and nothing else, where no layer reads them."""
    if group.is_read:
        return []
    writers = {axis: modules.get(axis.key.rpartition(".")[0]) for axis in group.axes if axis.key.endswith(".weight")}
    return [a for a, m in writers.items() if isinstance(m, nn.Linear) and m.out_features == group.size]
