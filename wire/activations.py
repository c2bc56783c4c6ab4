"""Activations as they travel: fp32 or fp16, dense or as a bitmap and the values that are not zero.

n samples, v values a sample. After a ReLU most values are zero: a bitmap costs one bit a value, so it pays from one
zero in 32 (fp32) or in 16 (fp16) on. The smaller form is chosen for every message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
VALUES, BITMAP = "values", "bitmap"


class ActivationError(ValueError):
    """Activations do not have the form that was agreed on."""


def encode(activations: Tensor, precision: str = "fp32") -> dict[str, Tensor]:
    """Activations [n, ...] -> ``values`` and, where that is smaller, ``bitmap``.

    With a bitmap (uint8, one bit a value, most significant first) ``values`` holds the non-zero ones in order. Values
    beyond the range of fp16 are cut to it. A value that fp16 rounds to zero counts as zero.
    """
    dtype = PRECISIONS[precision]
    limit = torch.finfo(dtype).max
    values = activations.detach().flatten().clamp(-limit, limit).to(dtype)
    is_held = values != 0
    num_held = int(is_held.sum())
    if num_held * dtype.itemsize + (len(values) + 7) // 8 >= len(values) * dtype.itemsize:
        return {VALUES: values}
    bitmap = torch.from_numpy(np.packbits(is_held.cpu().numpy()))
    return {VALUES: values[is_held], BITMAP: bitmap}


def decode(packed: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """Inverse of ``encode``: float32 activations of ``shape`` [n, ...].

    Raises
    ------
    ActivationError
        If values or bitmap are not of the kind or number that ``shape`` asks for: truncated, mis-shaped, of another
        type, or not finite.
    """
    values, total = packed[VALUES], math.prod(shape)
    if values.dtype not in PRECISIONS.values():
        raise ActivationError(f"activations: values should be fp32 or fp16, got {values.dtype}")
    if values.dim() != 1:
        raise ActivationError(f"activations: values should have shape (n,), got {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise ActivationError("activations: the upload holds NaN or infinity")
    if BITMAP not in packed:
        if len(values) != total:
            raise ActivationError(f"activations: values should have shape ({total},), got ({len(values)},)")
        return values.float().reshape(tuple(shape))
    bitmap = packed[BITMAP]
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != ((total + 7) // 8,):
        raise ActivationError(
            f"activations: the bitmap should be uint8 of shape ({(total + 7) // 8},), "
            f"got {bitmap.dtype} of shape {tuple(bitmap.shape)}"
        )
    is_held = torch.from_numpy(np.unpackbits(bitmap.cpu().numpy(), count=total)).bool()
    if int(is_held.sum()) != len(values):
        raise ActivationError(
            f"activations: values should have shape ({int(is_held.sum())},), as many as bits are set, "
            f"got ({len(values)},)"
        )
    dense = torch.zeros(total)
    dense[is_held] = values.float().cpu()
    return dense.reshape(tuple(shape))


def counted_bytes(activations: Tensor) -> int:
    """Four bytes for every value that is not zero: how the authors of AdaSplit count."""
    return 4 * int((activations != 0).sum())
