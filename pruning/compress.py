"""Top-k compression of updates with error feedback (DGC: Lin et al. 2018, arXiv 1712.01887)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

INDEX, VALUE = "#index", "#value"
"""Suffixes of a sparse entry's two tensors: int32 [num_kept] flat positions, float32 [num_kept] values."""


class CompressionError(ValueError):
    """A compressed update does not fit the sub-model it belongs to."""


def sparsify(
    update: Mapping[str, Tensor],
    velocity: Mapping[str, Tensor],
    residual: Mapping[str, Tensor],
    density: float,
    momentum: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Keep the largest entries of an accumulated update.

    With u the velocity and v the residual: ``u = momentum * u + update; v = v + u``; the ``density`` share of v that is
    largest in magnitude is sent, and cleared in u and v (DGC, algorithm 1). Tensors of one axis, and integers, are
    sent whole: they weigh nothing, and BatchNorm suffers.

    Returns
    -------
    sparse, velocity, residual
        What is sent, and what the client keeps for the next round.
    """
    sparse: dict[str, Tensor] = {}
    new_velocity: dict[str, Tensor] = {}
    new_residual: dict[str, Tensor] = {}
    for key, delta in update.items():
        if delta.dim() < 2 or not delta.is_floating_point():
            sparse[key] = delta
            continue
        u = momentum * velocity[key] + delta if key in velocity else delta.clone()
        v = residual[key] + u if key in residual else u.clone()
        num_kept = max(1, round(density * v.numel()))
        index = v.abs().flatten().topk(num_kept).indices.sort().values
        sparse[key + INDEX], sparse[key + VALUE] = index.to(torch.int32), v.flatten()[index].float()
        for kept in (u, v):
            kept.view(-1)[index] = 0
        new_velocity[key], new_residual[key] = u, v
    return sparse, new_velocity, new_residual


def densify(sparse: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of ``sparsify``: a dense update with zeros where nothing was sent.

    Raises
    ------
    CompressionError
        If a tensor is missing or of another form than ``sparsify`` makes, or an index lies outside its entry.
    """
    dense: dict[str, Tensor] = {}
    for key, tensor in like.items():
        if key in sparse:
            dense[key] = sparse[key]
        elif key + INDEX in sparse and key + VALUE in sparse:
            index, value = sparse[key + INDEX], sparse[key + VALUE]
            if index.dtype != torch.int32 or value.dtype != torch.float32 or index.dim() != 1:
                raise CompressionError(
                    f"compressed update: {key!r} should be a row of int32 positions and one of float32 values, got "
                    f"{index.dtype} {tuple(index.shape)} and {value.dtype} {tuple(value.shape)}"
                )
            if index.shape != value.shape or bool((index < 0).any()) or bool((index >= tensor.numel()).any()):
                raise CompressionError(f"compressed update: indices of {key!r} do not fit {tuple(tensor.shape)}")
            dense[key] = torch.zeros(tensor.numel()).index_copy_(0, index.long(), value).view(tensor.shape)
        elif tensor.is_floating_point():
            raise CompressionError(f"compressed update: entry {key!r} is missing")
    return dense
