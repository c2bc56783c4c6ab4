"""Coverage over many merges: how often every entry was held so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def add_holders(so_far: Mapping[str, Tensor], holders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the holders of one more merge; tensors broadcast against their entries (see ``AggregateResult.holders``)."""
    added = {key: tensor.to(torch.float32) for key, tensor in holders.items()}
    return {**so_far, **{key: so_far[key] + tensor if key in so_far else tensor for key, tensor in added.items()}}


def extremes(so_far: Mapping[str, Tensor], num_answers: int) -> tuple[dict[str, float], dict[str, float]]:
    """Key -> share of all answers that held its least covered entry, and its most covered one."""
    least = {key: float(tensor.min()) / num_answers for key, tensor in so_far.items()}
    most = {key: float(tensor.max()) / num_answers for key, tensor in so_far.items()}
    return least, most
