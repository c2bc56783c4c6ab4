"""Batch normalisation of gated units, the gates multiplied in: one pass forward, two backward.

The statistics of a unit are those of the samples that it won for; only their activations exist. With statistics fixed,
``gate * (scale * (y - mean) / std + shift)`` is one multiply-add with a factor and a term per sample and unit, so that
gates cost nothing beside the normalisation.

B samples, K winners per sample, C units held; N_c activations of unit c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruning.gates.gate import Winners

ABSENCES = "absences"
"""Attribute of a normalisation whose running statistics are means over batches; not part of its state."""


def momentum_of(norm: nn.BatchNorm2d, is_seen: Tensor) -> float | Tensor:
    """Share of the new statistics in the running ones; counts the batch, as ``nn.BatchNorm2d.forward`` does.

    Without a momentum, running statistics are means over batches: each unit's, [C], over the batches that it is in.

    Parameters
    ----------
    is_seen : which units this batch has activations of, bool [C].
    """
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1 / (norm.num_batches_tracked - _count_absences(norm, is_seen)).clamp(min=1).double()
    assert norm.momentum is not None
    return norm.momentum


def _count_absences(norm: nn.BatchNorm2d, is_seen: Tensor) -> Tensor:
    """Batches since the last reset, this one included, that each unit was not in, int64 [C].

    Presences could not be counted: where all units win, the layer is an ordinary one.
    """
    is_first = int(norm.num_batches_tracked or 0) == 1
    absences: Tensor = ~is_seen + (0 if is_first else getattr(norm, ABSENCES, 0))
    setattr(norm, ABSENCES, absences)
    return absences


def compact_norm(norm: nn.BatchNorm2d, y: Tensor, winners: Winners, values: Tensor | None) -> Tensor:
    """Normalise compact activations.

    Parameters
    ----------
    y : [B, K, height, width], the channels of each sample those of its winners.
    values : gates [B, K] to multiply with; None for none.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    parts = [part for part in winners.parts if part is not None]
    rows = parts[0] if winners.is_shared else winners.positions
    if norm.training:
        return _Normalise.apply(y, norm.weight, norm.bias, values, norm, parts, winners.sizes, rows)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return _combine(y, pick(scale, rows), pick(norm.bias - norm.running_mean * scale, rows), values)[0]


def pick(per_unit: Tensor, rows: Tensor) -> Tensor:
    """Entries [C] of the winners: [1, K] where all samples share them (``rows`` [K]), else [B, K]."""
    chosen = per_unit.index_select(0, rows.reshape(-1))
    return chosen[None] if rows.dim() == 1 else chosen.view_as(rows)


def _combine(y: Tensor, factor: Tensor, term: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """``gate * (factor * y + term)`` in one pass; also what y was multiplied with."""
    if values is not None:
        factor, term = factor * values, term * values
    return torch.addcmul(term[:, :, None, None], y, factor[:, :, None, None]), factor


class _Normalise(torch.autograd.Function):
    """Normalisation by the batch's own statistics, times gates."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        values: Tensor | None,
        norm: nn.BatchNorm2d,
        parts: Sequence[Tensor],
        sizes: Sequence[int],
        rows: Tensor,
    ) -> Tensor:
        mean, var, count = _statistics(y, parts, sizes, weight)
        _update_running(norm, mean, var, count)
        inverse = (var + norm.eps).rsqrt()
        scale = weight * inverse
        z, factor = _combine(y, pick(scale, rows), pick(bias - mean * scale, rows), values)
        ctx.save_for_backward(y, weight, bias, values, mean, inverse, count, factor, rows)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        y, weight, bias, values, mean, inverse, count, factor, rows = ctx.saved_tensors
        area = y.shape[2] * y.shape[3]
        sum_dz, sum_dzy = dz.mean((2, 3)).mul_(area), (dz * y).mean((2, 3)).mul_(area)  # [B, K]
        centred = (sum_dzy - pick(mean, rows) * sum_dz) * pick(inverse, rows)  # sums of dz * normalised y
        d_bias = _per_unit(sum_dz if values is None else sum_dz * values, rows, weight)
        d_weight = _per_unit(centred if values is None else centred * values, rows, weight)
        d_values = None if values is None else centred * pick(weight, rows) + sum_dz * pick(bias, rows)
        # d y = scale * (du - mean(du) - u mean(du u)), u the normalised y, du = gate * dz
        scale = weight * inverse / count.clamp(min=1)
        by_y = -(scale * inverse * d_weight)
        constant = -(scale * d_bias) - by_y * mean
        d_y = torch.addcmul(pick(constant, rows)[:, :, None, None], y, pick(by_y, rows)[:, :, None, None])
        d_y.addcmul_(dz, factor[:, :, None, None])
        return d_y, d_weight, d_bias, d_values, None, None, None, None


def _per_unit(sums: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Sums [B, K] of winners added up by unit, [C]."""
    if rows.dim() == 1:
        return torch.zeros_like(like).index_add_(0, rows, sums.sum(0))
    return torch.zeros_like(like).index_add_(0, rows.reshape(-1), sums.reshape(-1))


def _statistics(
    y: Tensor, parts: Sequence[Tensor], sizes: Sequence[int], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of activations of every unit, [C]; 0, 1 and 0 where there are none."""
    area = y.shape[2] * y.shape[3]
    total, square, count = (torch.zeros_like(like) for _ in range(3))
    for part, block in zip(parts, y.split(list(sizes)), strict=True):
        mean, var = _moments(block)
        num = block.shape[0] * area
        total.index_add_(0, part, mean, alpha=num)
        square.index_add_(0, part, var + mean * mean, alpha=num)
        count.index_add_(0, part, torch.full_like(mean, num))
    if len(parts) == 1:  # exact: no difference of large numbers
        full_mean, full_var = torch.zeros_like(like), torch.ones_like(like)
        return full_mean.index_copy_(0, part, mean), full_var.index_copy_(0, part, var), count
    safe = count.clamp(min=1)
    mean = total / safe
    var = torch.where(count > 0, (square / safe - mean * mean).clamp(min=0), torch.ones_like(like))
    return mean, var, count


def _moments(block: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of [n, K, height, width]."""
    if block.device.type == "cpu":
        mean, var = torch.batch_norm_update_stats(block, None, None, 0.0)
        return mean, var
    var, mean = torch.var_mean(block, (0, 2, 3), unbiased=False)
    return mean, var


def _update_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Move the running statistics of the units that there are activations of; the others' stay."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    is_seen = count > 0
    momentum = momentum_of(norm, is_seen)
    momentum = momentum.to(mean.dtype) if isinstance(momentum, Tensor) else momentum
    unbiased = var * count / (count - 1).clamp(min=1)
    norm.running_mean.copy_(torch.where(is_seen, norm.running_mean.lerp(mean, momentum), norm.running_mean))
    norm.running_var.copy_(torch.where(is_seen, norm.running_var.lerp(unbiased, momentum), norm.running_var))


def masked_norm(norm: nn.BatchNorm2d, y: Tensor, winners: Winners, values: Tensor | None) -> Tensor:
    """The same on full activations [B, C, height, width], in plain operations: what the compact form is held to."""
    num_units = y.shape[1]
    mask = winners.mask(num_units)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        weight = mask[:, :, None, None].to(y.dtype)
        count = mask.sum(0) * (y.shape[2] * y.shape[3])
        safe = count.clamp(min=1)
        mean = (y * weight).sum((0, 2, 3)) / safe
        var = (((y - mean[:, None, None]) * weight) ** 2).sum((0, 2, 3)) / safe
        var = torch.where(count > 0, var, torch.ones_like(var))
        with torch.no_grad():
            _update_running(norm, mean.detach(), var.detach(), count.to(y.dtype))
    normalised = (y - mean[:, None, None]) * (var + norm.eps).rsqrt()[:, None, None]
    z = normalised * norm.weight[:, None, None] + norm.bias[:, None, None]
    held = mask.to(y.dtype) if values is None else winners.dense_values(num_units)
    return z * held[:, :, None, None]
