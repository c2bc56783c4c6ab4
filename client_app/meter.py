"""What training holds in memory at its peak, counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MemoryMeter:
    """Counts what training holds at its peak: weights, gradients, optimiser state, tensors saved for backward.

    Frozen weights (``requires_grad`` false) have neither gradient nor optimiser state.

    Used as a context around the forward pass; counts the first, which is the largest batch, and then steps aside, or
    with ``every_pass`` finds the largest of all.

    Parameters
    ----------
    model : whose training is counted; on ``meta`` it counts what it would be.
    optimizer_slots : numbers that the optimiser keeps per trained weight (``wire.training.optimizer_slots``).
    every_pass : whether passes differ in size.
    """

    def __init__(self, model: nn.Module, optimizer_slots: int, every_pass: bool = False) -> None:
        parameters = list(model.parameters())
        self._owned = {parameter.data_ptr() for parameter in parameters}
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in parameters]
        trained = sum(size for size, is_trained in sizes if is_trained)
        self.fixed_bytes = sum(size for size, _ in sizes) + trained * (1 + optimizer_slots)
        self.saved_bytes = 0
        self._seen: dict[int, int] = {}
        self._hooks: Any = None
        self._every_pass, self._is_done = every_pass, False

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak."""
        return self.fixed_bytes + self.saved_bytes

    def __enter__(self) -> None:
        if not self._is_done:
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
            self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        if not self._is_done:
            self._hooks.__exit__(*error)
            self.saved_bytes = max(self.saved_bytes, sum(self._seen.values()))
            self._seen.clear()
            self._is_done = not self._every_pass

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._owned:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor
