"""One gate: how salient each unit of a layer is for each sample, and who wins.

``s = mean over positions of |x|``, ``g = ReLU(s / mean(s) Wg^T + bg)``, the winners are the k units with the largest
gates (ADP, arXiv 2106.06921, after feature boosting and suppression). Dividing by the sample's own mean is ours
(docs/decisions/0076): gates stand behind BatchNorm, so that a loud sample's would make it louder, layer by layer. Who
*shares* winners is a choice: every sample has its own, or a part of the batch has those with the largest mean gate. A
sample's gate *values* are always its own.

B samples, C units of the full layer, H units held (a sub-model holds fewer), I inputs, K winners.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SPREAD = 0.3
"""Of a fresh predictor, against He-normal: gates begin near their bias, 1, and few are cut off by the ReLU."""
FLOOR = 1e-3
"""Least gate of a winner: k units speak even where fewer have a positive gate."""


@dataclass(frozen=True)
class Winners:
    """Who won in one forward pass.

    Attributes
    ----------
    sizes : samples of each part of the batch, in order.
    parts : winners of each part, positions among the held units, best first, int64 [K]; ``[None]``: all units win.
    values : gates of the winners, at least the floor, [B, K].
    gates : of all units of the full layer, [B, C].
    """

    sizes: tuple[int, ...]
    parts: tuple[Tensor | None, ...]
    values: Tensor
    gates: Tensor

    @property
    def is_shared(self) -> bool:
        """Whether the whole batch has the same winners."""
        return len(self.parts) == 1

    @property
    def is_everybody(self) -> bool:
        """Whether all units win, so that nothing is gathered."""
        return self.parts[0] is None

    @cached_property
    def positions(self) -> Tensor:
        """Winners of every sample, int64 [B, K]."""
        return rows_of([part for part in self.parts if part is not None], self.sizes)

    def mask(self, num_units: int) -> Tensor:
        """Bool [B, H]: who won for whom."""
        if self.is_everybody:
            return torch.ones(len(self.values), num_units, dtype=torch.bool, device=self.values.device)
        blank = torch.zeros(len(self.values), num_units, dtype=torch.bool, device=self.values.device)
        return blank.scatter(1, self.positions, True)

    def dense_values(self, num_units: int) -> Tensor:
        """Gates [B, H], zero for those who lost."""
        if self.is_everybody:
            return self.values
        return self.values.new_zeros(len(self.values), num_units).scatter(1, self.positions, self.values)

    def union(self, num_units: int) -> Tensor:
        """Bool [H]: who won for any sample."""
        return self.mask(num_units).any(0)


def rows_of(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """One row per sample out of one row per part: [num_parts, K] -> [B, K]."""
    if len(parts) == 1:
        return parts[0].expand(sizes[0], -1)
    rows = torch.stack(list(parts))
    if len(sizes) == sum(sizes):
        return rows
    return rows.repeat_interleave(torch.tensor(sizes, device=rows.device), 0)


class Gate(nn.Module):
    """The predictor of one layer's gates.

    Attributes
    ----------
    weight, bias : of the predictor, [C, I] and [C]; whole in every sub-model, so that what it does not hold is judged
        too.
    units : which units of the full layer are held, int64 [H]; integer entries are never averaged.
    num_winners : k; 0 for a layer that is left dense, and gated by nothing.
    winners : of the last forward pass; None if there was none or the layer is dense.
    """

    units: Tensor
    num_winners: Tensor

    def __init__(self, num_inputs: int, num_units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_units, num_inputs))
        self.bias = nn.Parameter(torch.ones(num_units))
        self.register_buffer("units", torch.arange(num_units))
        self.register_buffer("num_winners", torch.tensor(num_units))
        if not self.weight.is_meta:  # drawing nothing there would load PyTorch's compiler
            nn.init.normal_(self.weight, std=SPREAD * math.sqrt(2 / num_inputs))
        self.winners: Winners | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of: not the last pass's winners, which hang on a graph."""
        return {**self.__dict__, "winners": None}

    @property
    def k(self) -> int:
        """Winners among the held units; 0 where the layer is left dense. Without storage, everybody wins."""
        wanted = self.num_winners
        if wanted.is_meta:
            return len(self.units)
        k = int(wanted)
        return min(k, len(self.units)) if k else 0

    def forget(self) -> None:
        """Nobody has won: the layer was run dense. Cheap where that is so already, as in every pass of such a layer."""
        if self.winners is not None:  # a module's attributes are read for nothing, but set through many checks
            self.winners = None

    def forward(self, salience: Tensor) -> Tensor:
        """Gates of all units of the full layer, whatever the sample's scale: [B, I] -> [B, C]."""
        relative = salience / salience.mean(1, keepdim=True).clamp(min=torch.finfo(salience.dtype).tiny)
        return functional.relu(functional.linear(relative, self.weight, self.bias))

    def decide(self, salience: Tensor, sizes: Sequence[int] | None) -> Winners:
        """Find the winners of one batch and remember them.

        Parameters
        ----------
        salience : mean magnitude of the layer's inputs, [B, I].
        sizes : of the parts of the batch that share winners; None: every sample has its own.
        """
        gates = self(salience)
        held = gates if len(self.units) == len(self.bias) else gates.index_select(1, self.units)
        num_samples, k = len(gates), self.k
        if k >= held.shape[1]:
            found = Winners((num_samples,), (None,), held.clamp(min=FLOOR), gates)
        elif sizes is None:
            rows = top(held.detach(), k)
            values = held.gather(1, rows).clamp(min=FLOOR)
            found = Winners((1,) * num_samples, tuple(rows.unbind(0)), values, gates)
        else:
            parts = template(held.detach(), sizes, k)
            chosen = held.index_select(1, parts[0]) if len(parts) == 1 else held.gather(1, rows_of(parts, sizes))
            values = chosen.clamp(min=FLOOR)
            found = Winners(tuple(sizes), tuple(parts), values, gates)
        self.winners = found
        return found


def top(gates: Tensor, k: int) -> Tensor:
    """Positions of the k largest of every row [..., H], best first; ties go to the lower position. int64 [..., K]."""
    return gates.argsort(dim=-1, descending=True, stable=True)[..., :k]


def template(gates: Tensor, sizes: Sequence[int], k: int) -> list[Tensor]:
    """The winners that each part of the batch shares: those with the largest mean gate. int64 [K] per part."""
    if len(sizes) == 1:
        return [top(gates[0] if len(gates) == 1 else gates.mean(0), k)]
    means = torch.stack([part.mean(0) for part in gates.split(list(sizes))])
    return list(top(means, k).unbind(0))


def group_samples(gates: Tensor, num_groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """Put samples with like gates side by side.

    The batch is halved again and again, each time at the median along the direction in which its rows differ most.

    Parameters
    ----------
    gates : [B, C].
    num_groups : at most so many groups, a power of two.

    Returns
    -------
    order, sizes
        int64 [B], a permutation, and the sizes of the groups in that order; they differ by one at most.
    """
    parts = [torch.arange(len(gates), device=gates.device)]
    while 2 * len(parts) <= min(num_groups, len(gates)):
        halves = []
        for part in parts:
            along = _leading_direction_scores(gates[part])
            order = along.argsort(stable=True)
            cut = (len(part) + 1) // 2
            halves += [part[order[:cut]], part[order[cut:]]]
        parts = halves
    parts = [part.sort().values for part in parts]
    return torch.cat(parts), tuple(len(part) for part in parts)


def _leading_direction_scores(rows: Tensor, num_steps: int = 4) -> Tensor:
    """Coordinates of rows [n, C] along the direction of largest spread, by power iteration from the widest row."""
    centred = rows - rows.mean(0)
    direction = centred[centred.square().sum(1).argmax()]
    for _ in range(num_steps):
        direction = centred.T @ (centred @ direction)
        direction = direction / direction.norm().clamp(min=1e-30)
    return centred @ direction
