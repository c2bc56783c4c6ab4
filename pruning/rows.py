"""Reading and writing kept entries of a tensor: slices where they are contiguous, rows of memory where they are not.

Of a convolution's weight [O, I, k, k] with scattered O and I kept, what stays together in memory are runs of k * k
numbers. numpy moves such runs as single items of that many bytes, two to three times faster than torch moves rows.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

Kept = tuple[np.ndarray | None, ...]
"""One item per axis: ``None`` for the whole axis, or the sorted kept positions, int64 [num_kept]."""

CHUNK_BYTES = 1 << 18
"""What is read, added to and written back at once: small enough to stay in a core's cache."""


def gather(tensor: Tensor, kept: Kept) -> Tensor:
    """Entries of ``tensor`` at the kept positions of every axis; a view where all of them are contiguous.

    Gradients flow back to ``tensor`` where it wants any.
    """
    slices = as_slices(kept)
    if slices is not None:
        return tensor[slices] if slices else tensor
    wants_gradient = tensor.requires_grad and torch.is_grad_enabled()
    if tensor.dim() == 1 or tensor.device.type != "cpu" or wants_gradient:  # numpy's way has no gradient
        for dim, positions in enumerate(kept):
            if positions is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
        return tensor
    rows, row_size = as_rows(kept, tuple(tensor.shape))
    shape = [size if positions is None else len(positions) for size, positions in zip(tensor.shape, kept, strict=True)]
    result = torch.empty(shape, dtype=tensor.dtype)
    _items(tensor, row_size).take(rows, out=_items(result, row_size), mode="clip")  # "raise" would copy once more
    return result


def add_at(total: Tensor, kept: Kept, entry: Tensor, weight: float) -> None:
    """``total[kept] += weight * entry`` in place; ``total`` is contiguous and on the CPU."""
    slices = as_slices(kept)
    if slices is not None:
        total[slices].add_(entry, alpha=weight)
        return
    if total.dim() == 1 and kept[0] is not None:
        total.index_add_(0, torch.from_numpy(kept[0]), entry, alpha=weight)
        return
    rows, row_size = as_rows(kept, tuple(total.shape))
    items, entry = _items(total, row_size), entry.reshape(-1, row_size)
    step = max(1, CHUNK_BYTES // (row_size * total.element_size()))
    buffer = total.new_empty(min(step, len(rows)), row_size)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        block = buffer[: len(part)]
        # No row occurs twice, so that reading, adding and writing back is the same as adding in place.
        items.take(part, out=_items(block, row_size), mode="clip")
        block.add_(entry[start : start + step], alpha=weight)
        np.put(items, part, _items(block, row_size), mode="clip")


def as_slices(kept: Kept) -> tuple[slice, ...] | None:
    """The kept positions of all axes as slices, or None if those of one axis are scattered."""
    slices = []
    for positions in kept:
        if positions is None:
            slices.append(slice(None))
            continue
        first, last = int(positions[0]), int(positions[-1])
        if last - first + 1 != len(positions):
            return None
        slices.append(slice(first, last + 1))
    return tuple(slices)


def as_rows(kept: Kept, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Kept positions of which at least one axis is pruned, as whole rows of memory.

    Returns
    -------
    rows, row_size
        The kept entries of a contiguous tensor of ``shape`` are rows ``rows``, int64 [num_rows], of its view
        [num_entries / row_size, row_size]; the axes behind the last pruned one make up a row.
    """
    last = max(dim for dim, positions in enumerate(kept) if positions is not None)
    rows: np.ndarray | None = None
    for size, positions in zip(shape[: last + 1], kept, strict=False):
        axis = np.arange(size) if positions is None else positions
        rows = axis if rows is None else np.add.outer(rows * size, axis).reshape(-1)
    assert rows is not None
    return rows, math.prod(shape[last + 1 :])


def _items(tensor: Tensor, row_size: int) -> np.ndarray:
    """Rows of ``row_size`` entries as single items of memory, void [num_rows]; shares memory if contiguous."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype == torch.bfloat16:  # numpy has no such type
        flat = flat.view(torch.int16)
    return flat.numpy().view(_item_type(row_size * tensor.element_size()))


@cache
def _item_type(num_bytes: int) -> np.dtype[np.void]:
    return np.dtype((np.void, num_bytes))
