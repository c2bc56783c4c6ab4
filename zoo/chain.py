"""The one shape all zoo models share: a stem, a chain of blocks, and heads behind some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BlockChain(nn.Module):
    """Stem, blocks and heads; depth pruning and cut layers truncate ``blocks`` and ``heads`` from the end.

    Attributes
    ----------
    stem : what comes before the first block.
    blocks : the chain.
    heads : classifiers; with exits ``heads[j]`` stands behind ``blocks[exits[j]]``, else one behind the last block.
    exits : indices of the blocks that have an exit head behind them, empty for a model with one output.
    """

    def __init__(
        self, stem: nn.Module, blocks: Sequence[nn.Module], heads: Sequence[nn.Module], exits: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(heads)
        self.exits = tuple(exits)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map images [B, C, H, W] to logits [B, num_classes].

        With exits the answer is a list of logits, deepest last. A chain cut so short that no head is left gives the
        activations at the cut instead: the smashed data of split learning.
        """
        x = self.stem(x)
        logits: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.exits:
                logits.append(self.heads[self.exits.index(index)](x))
        if logits:
            return logits
        return self.heads[0](x) if len(self.heads) and not self.exits else x


class PooledHead(nn.Module):
    """Optional pre-activation, global average pooling, linear classifier: [B, C, H, W] -> [B, num_classes]."""

    def __init__(self, channels: int, num_classes: int, pre_activation: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if pre_activation else None
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Pool over space and classify."""
        if self.norm is not None:
            x = torch.relu(self.norm(x))
        return self.linear(x.mean(dim=(2, 3)))
