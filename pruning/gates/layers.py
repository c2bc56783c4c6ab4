"""The layers of a gated network, executed whole and masked (the reference) or compact (the fast path).

Compact: only the winners' rows of a weight are gathered, only the columns of what the layer before computed, and a
small convolution runs for every part of the batch that shares winners. Activations stay compact from the layer that
writes units to the layer that reads them; nothing is ever scattered back but gradients.

``GatedConv2d`` and ``GatedLinear`` write the units of one gate, read those of another, or both; ``GatedNorm2d`` and
``GatedDepthwise2d`` lie in between. They are made in place of a network's own layers and share their tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.gates.gate import Gate, Winners
from pruning.gates.norm import compact_norm, masked_norm

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass
class Execution:
    """How all gates of one network work together.

    Attributes
    ----------
    share : who shares winners: ``sample``, ``group``, ``batch`` or ``client`` (all units of a sub-model win).
    is_compact : whether only winners are computed.
    num_groups : at most so many in one batch.
    sizes : of the groups of the batch under way; None outside of a pass.
    """

    share: str = "sample"
    is_compact: bool = False
    num_groups: int = 4
    sizes: tuple[int, ...] | None = None

    def parts_of(self, num_samples: int) -> tuple[int, ...] | None:
        """Sizes of the parts of a batch that share winners; None: every sample has its own."""
        if self.share == "sample":
            return None
        if self.share == "group" and self.sizes is not None:
            return self.sizes
        return (num_samples,)


@dataclass
class Wiring:
    """What a gated layer knows of others. Not a module: a gate belongs to the network, not to the layers it steers.

    Attributes
    ----------
    execution : of the network.
    source : gate of the units that the layer reads; None where its input is whole.
    gate : gate of the units that the layer writes; None where its output is whole.
    repeat : inputs of the layer per unit that it reads: height * width after flattening, else 1.
    is_rectified : whether the input is known to be >= 0.
    is_last : whether the gates are multiplied in here, for want of a normalisation behind.
    executed_ratio : multiply-accumulates of the last pass, as a share of those of the whole layer.
    """

    execution: Execution
    source: Gate | None = None
    gate: Gate | None = None
    repeat: int = 1
    is_rectified: bool = False
    is_last: bool = False
    executed_ratio: float = field(default=1.0, compare=False)


def become(layer: nn.Module, kind: type[Layer], wiring: Wiring) -> Layer:
    """A layer of ``kind``, a subclass of the layer's own, with the layer's tensors and attributes."""
    made = kind.__new__(kind)
    made.__dict__ = {**layer.__dict__, "wiring": wiring}
    return made


class _Tap(torch.autograd.Function):
    """x and its mean over positions; backward adds the mean's gradient in the same pass as nothing else would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.area = x.shape[2] * x.shape[3]
        return x.view_as(x), x.mean((2, 3))

    @staticmethod
    def backward(ctx: Any, dx: Tensor, d_mean: Tensor) -> Tensor:
        return dx.add(d_mean[:, :, None, None], alpha=1 / ctx.area)


def tap(x: Tensor, is_rectified: bool, repeat: int = 1) -> tuple[Tensor, Tensor]:
    """x as it goes on, and its salience [B, I]: the mean magnitude of every unit over its positions."""
    if x.dim() == 2:
        magnitude = x if is_rectified else x.abs()
        return x, magnitude if repeat == 1 else magnitude.unflatten(1, (-1, repeat)).mean(2)
    if is_rectified and x.requires_grad and torch.is_grad_enabled():
        through, salience = _Tap.apply(x)
        return through, salience
    return x, (x if is_rectified else x.abs()).mean((2, 3))


class _Gated(nn.Module):
    """What convolution and linear layer have in common."""

    wiring: Wiring
    weight: Tensor
    bias: Any  # a parameter or None

    def forward(self, x: Tensor) -> Tensor:
        wiring = self.wiring
        before = None if wiring.source is None else wiring.source.winners
        after = None
        if wiring.gate is not None:
            if wiring.gate.k:
                x, salience = tap(x, wiring.is_rectified, wiring.repeat)
                salience = self._in_full(salience, before)
                after = wiring.gate.decide(salience, wiring.execution.parts_of(len(x)))
            else:
                wiring.gate.forget()
        if wiring.execution.is_compact and not (before is None and after is None):
            y = self._compact(x, before, after)
        else:
            y, wiring.executed_ratio = self._product(x, self.weight, self.bias), 1.0
        if after is not None and wiring.is_last:
            values = after.values if wiring.execution.is_compact else after.dense_values(y.shape[1])
            y = y * (values if y.dim() == 2 else values[:, :, None, None])
        return y

    def gates_at(self, x: Tensor) -> Tensor:
        """What the gate makes of a whole input, [B, C]."""
        assert self.wiring.gate is not None
        salience = tap(x, self.wiring.is_rectified, self.wiring.repeat)[1]
        return self.wiring.gate(self._in_full(salience, None))

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _in_full(self, salience: Tensor, before: Winners | None) -> Tensor:
        """Salience of all inputs that the predictor knows: what is not held, or has lost, is silent."""
        assert self.wiring.gate is not None
        source, num_inputs = self.wiring.source, self.wiring.gate.weight.shape[1]
        if source is None or salience.shape[1] == num_inputs:
            return salience
        rows = source.units.expand(len(salience), -1)
        if self.wiring.execution.is_compact and before is not None and not before.is_everybody:
            rows = source.units[before.positions]
        return salience.new_zeros(len(salience), num_inputs).scatter(1, rows, salience)

    def _compact(self, x: Tensor, before: Winners | None, after: Winners | None) -> Tensor:
        """One small product for each part of the batch that shares winners of both layers."""
        inputs, outputs = _parts(before), _parts(after)
        sizes = inputs[0] if inputs[1][0] is not None else outputs[0]
        columns, rows = inputs[1], outputs[1]
        if columns[0] is None and rows[0] is None:
            self.wiring.executed_ratio = 1.0
            return self._product(x, self.weight, self.bias)
        blocks = x.split(list(sizes)) if len(sizes) > 1 else (x,)
        columns, rows = _stretched(columns, len(sizes)), _stretched(rows, len(sizes))
        results, executed = [], 0
        for block, column, row in zip(blocks, columns, rows, strict=True):
            weight = self.weight if row is None else self.weight.index_select(0, row)
            bias = self.bias if row is None or self.bias is None else self.bias.index_select(0, row)
            if column is not None:
                weight = weight.index_select(1, _repeated(column, self.wiring.repeat))
            results.append(self._product(block, weight, bias))
            executed += len(block) * weight.numel()
        self.wiring.executed_ratio = executed / (len(x) * self.weight.numel())
        return results[0] if len(results) == 1 else torch.cat(results)


def _parts(winners: Winners | None) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    return ((), (None,)) if winners is None else (winners.sizes, winners.parts)


def _stretched(parts: tuple[Tensor | None, ...], num: int) -> tuple[Tensor | None, ...]:
    """One item for each part; one that all share is repeated."""
    return parts if len(parts) == num else parts * num


def _repeated(positions: Tensor, repeat: int) -> Tensor:
    """Positions of units -> positions of their inputs, ``repeat`` each; the last axis grows."""
    if repeat == 1:
        return positions
    inputs = positions[..., None] * repeat + torch.arange(repeat, device=positions.device)
    return inputs.flatten(-2)


class GatedConv2d(_Gated, nn.Conv2d):
    """A convolution that writes or reads gated units."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class GatedLinear(_Gated, nn.Linear):
    """A linear layer that writes or reads gated units."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)


class GatedDepthwise2d(nn.Conv2d):
    """A depthwise convolution of gated units: the winners' filters only."""

    wiring: Wiring

    def forward(self, x: Tensor) -> Tensor:
        """Filter [B, K or C, height, width]."""
        assert self.wiring.gate is not None
        winners = self.wiring.gate.winners
        self.wiring.executed_ratio = 1.0
        if winners is None or winners.is_everybody:
            return self._conv_forward(x, self.weight, self.bias)
        if not self.wiring.execution.is_compact:
            y = self._conv_forward(x, self.weight, self.bias)
            return y if self.bias is None else y * winners.mask(y.shape[1])[:, :, None, None]  # losers have no bias
        self.wiring.executed_ratio = x.shape[1] / len(self.weight)
        results = []
        for block, part in zip(x.split(list(winners.sizes)), winners.parts, strict=True):
            assert part is not None
            bias = None if self.bias is None else self.bias.index_select(0, part)
            weight = self.weight.index_select(0, part)
            results.append(
                functional.conv2d(block, weight, bias, self.stride, self.padding, self.dilation, len(weight))
            )
        return results[0] if len(results) == 1 else torch.cat(results)


class GatedNorm2d(nn.BatchNorm2d):
    """A normalisation of gated units; the first behind a writer multiplies the gates in."""

    wiring: Wiring

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, K or C, height, width]."""
        assert self.wiring.gate is not None
        winners = self.wiring.gate.winners
        if winners is None:
            return super().forward(x)
        if winners.is_everybody:
            y = super().forward(x)
            return y * winners.values[:, :, None, None] if self.wiring.is_last else y
        values = winners.values if self.wiring.is_last else None
        execute = compact_norm if self.wiring.execution.is_compact else masked_norm
        return execute(self, x, winners, values)
