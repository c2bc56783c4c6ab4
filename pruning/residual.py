"""A residual stream that stays whole, while the layers that write into it may write only some of its features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualSum(nn.Module):
    """Add what a layer writes to the stream: each feature to its place.

    Where features are units, ``units`` says which of them a narrowed layer still writes. It is part of the state dict,
    so that a sub-model's is cut out of the full model's like any other entry; integers are never merged.

    Parameters
    ----------
    num_features : D of the stream.
    is_prunable : a layer may write fewer.
    """

    units: Tensor | None

    def __init__(self, num_features: int, is_prunable: bool) -> None:
        super().__init__()
        self.register_buffer("units", torch.arange(num_features) if is_prunable else None)

    def forward(self, written: Tensor, stream: Tensor) -> Tensor:
        """[..., K] onto [..., D]: [..., D]."""
        if self.units is None or written.shape[-1] == stream.shape[-1]:
            return stream + written
        return stream.scatter_add(-1, self.units.expand(written.shape), written)
