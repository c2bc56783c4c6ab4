"""Many tensors as one block of bytes.

Flower sends every array of a message as objects of their own, each with HTTP requests of its own, both ways and again
between a SuperNode and its client process: a ResNet-18 has 122 arrays, and on a link with 50 ms of delay that alone is
many seconds. One block is one array, whatever the model; the index, name, type and shape of each tensor, goes with the
rest of the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wire.check import MAX_NAME, MAX_RANK, WireError

TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
Index = list[tuple[str, str, list[int]]]


def pack(state: Mapping[str, Tensor]) -> tuple[np.ndarray, Index]:
    """Bytes of all tensors one after the other, uint8 [num_bytes], and (name, type, shape) of each in this order."""
    index: Index = []
    parts = []
    for name, tensor in state.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in TYPES:
            raise WireError(f"message: tensor {name!r} is {tensor.dtype}, expected one of {', '.join(TYPES)}")
        index.append((name, kind, list(tensor.shape)))
        parts.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
    block: np.ndarray = (torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)).numpy()
    return block, index


def unpack(block: Tensor, index: Any) -> dict[str, Tensor]:
    """Inverse of ``pack``; each tensor has memory of its own.

    Raises
    ------
    WireError
        If the index is not one, or speaks of other bytes than are there.
    """
    if block.dtype != torch.uint8 or block.dim() != 1 or not isinstance(index, list):
        raise WireError(
            f"message: tensors are {block.dtype} {tuple(block.shape)}, expected one row of bytes with an index"
        )
    sizes = [_num_bytes(item) for item in index]
    if sum(sizes) != len(block):
        raise WireError(f"message: tensors have {len(block)} bytes, their index speaks of {sum(sizes)}")
    found: dict[str, Tensor] = {}
    start = 0
    for (name, kind, shape), size in zip(index, sizes, strict=True):
        if name in found:
            raise WireError(f"message: tensor {name!r} is there twice")
        found[name] = block[start : start + size].clone().view(TYPES[kind]).reshape(shape)
        start += size
    return found


def _num_bytes(item: Any) -> int:
    if isinstance(item, list | tuple) and len(item) == 3:
        name, kind, shape = item
        is_name = isinstance(name, str) and len(name) <= 4 * MAX_NAME
        is_shape = isinstance(shape, list) and len(shape) <= MAX_RANK and all(_is_size(size) for size in shape)
        if is_name and isinstance(kind, str) and kind in TYPES and is_shape:
            return math.prod(shape) * TYPES[kind].itemsize
    raise WireError(f"message: {str(item)[:200]!r} is no name, type and shape of a tensor")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40
