"""What comes from the network is bytes of a stranger: limits, types, and tensors without unpickling."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wire.flat import require

MAX_METRICS = 1000
MAX_NAME = 200
MAX_RANK = 8
MAX_LABELS = 1_000_000
MAX_MACS = 1e24
"""Of one request: a thousand years of the fastest device. What is above it is no measurement."""
WHOLE = ("dispatch", "partition_id", "num_examples", "peak_memory_bytes", "num_steps")
REAL = ("train_macs", "compute_s", "busy_s")
YES_OR_NO = ("is_delta", "is_sparse")


class WireError(ValueError):
    """A message is too large, or is not what it says it is."""


@dataclass(frozen=True)
class Limits:
    """How large an answer may be.

    Attributes
    ----------
    max_reply_bytes : of all its tensors.
    max_reply_tensors : their number.
    max_reply_text : characters of everything else.
    """

    max_reply_bytes: int = 2**31
    max_reply_tensors: int = 20_000
    max_reply_text: int = 2**24

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.max_reply_bytes >= 1, "max-reply-bytes", self.max_reply_bytes, ">= 1")
        require(self.max_reply_tensors >= 1, "max-reply-tensors", self.max_reply_tensors, ">= 1")
        require(self.max_reply_text >= 1, "max-reply-text", self.max_reply_text, ">= 1")


LIMITS = Limits()


def check_head(head: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain fields of a report, ready for ``Report(**...)``.

    Raises
    ------
    WireError
        If a field is missing or of another type.
    """
    if not isinstance(head, dict):
        raise WireError(f"message: its head is a {type(head).__name__}, expected a table")
    for name in (*WHOLE, *REAL, *YES_OR_NO, "label_counts", "narrowed"):
        if name not in head:
            raise WireError(f"message: its head has no {name!r}")
    for name in WHOLE:
        _need(_is_whole(head[name]), name, head[name], "a whole number of 64 bits")
    for name in REAL:
        is_real = isinstance(head[name], float) or _is_whole(head[name])
        _need(is_real, name, head[name], "a number")
    for name in YES_OR_NO:
        _need(isinstance(head[name], bool), name, head[name], "true or false")
    _need(isinstance(head["narrowed"], str), "narrowed", head["narrowed"], "text")
    counts = head["label_counts"]
    is_counts = isinstance(counts, list) and len(counts) <= MAX_LABELS and all(_is_whole(n) and n >= 0 for n in counts)
    _need(is_counts, "label_counts", counts, f"at most {MAX_LABELS} whole numbers >= 0")
    return {**head, "label_counts": tuple(counts)}


def _need(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise WireError(f"message: {name}: got {str(value)[:100]!r}, expected {expected}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def to_tensor(data: bytes) -> Tensor:
    """The tensor in NumPy's .npy format; memory is taken only for bytes that are there.

    Raises
    ------
    WireError
        If the bytes are no array of numbers, or not as many as its header says.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except Exception as error:  # a parser of Python literals runs below
        raise WireError(f"message: a tensor has no readable header: {str(error)[:200]}") from error
    num_bytes = math.prod(shape) * dtype.itemsize
    if dtype.kind not in "biufc" or len(shape) > MAX_RANK or any(size < 0 for size in shape):
        raise WireError(f"message: a tensor of shape {shape} and type {dtype} is not accepted")
    if num_bytes != len(data) - file.tell():
        raise WireError(f"message: a tensor of shape {shape} has {len(data) - file.tell()} bytes, expected {num_bytes}")
    flat = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    array = flat.reshape(shape, order="F" if is_fortran else "C")
    return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C"))
