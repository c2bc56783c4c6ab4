"""Batches: shuffled, and augmented where asked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from wire.message import TrainConfig


def local_batches(
    num_examples: int, config: TrainConfig, generator: torch.Generator, work_ratio: float = 1.0
) -> Iterator[Tensor]:
    """The batches of one round: ``work_ratio`` times the run's local epochs, to the nearest batch, at least one."""
    num_left: int | None = None
    while num_left is None or num_left > 0:
        epoch = batches(num_examples, config.batch_size, generator)
        if num_left is None:
            num_left = max(1, round(work_ratio * config.local_epochs * len(epoch)))
        yield from epoch[:num_left]
        num_left -= len(epoch)


def batches(num_examples: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffled batches; a last batch of one example joins the one before, for BatchNorm's sake."""
    parts = list(torch.randperm(num_examples, generator=generator).split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        last = parts.pop()
        parts[-1] = torch.cat([parts[-1], last])
    return parts


def num_batches(num_examples: int, batch_size: int) -> int:
    """How many batches an epoch has."""
    full, rest = divmod(num_examples, batch_size)
    is_joined = batch_size == 1 or rest == 1  # a last batch of one joins the one before
    return max(1, full + (rest > 0) - is_joined)


def augmented(x: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """A batch of images [batch, channels, height, width] to train on, changed as ``train.augment`` says."""
    return flip_shift(x, generator) if config.augment == "flip-shift" else x


def flip_shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images [batch, channels, height, width] and shift all by up to an eighth."""
    flips = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flips.to(x.device)[:, None, None, None], x.flip(3), x)
    reach = x.shape[-1] // 8
    down, right = (int(v) for v in torch.randint(0, 2 * reach + 1, (2,), generator=generator))
    padded = functional.pad(x, (reach,) * 4)
    return padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]
