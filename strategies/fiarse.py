"""FIARSE (Wu et al. 2024, arXiv 2407.19389): sub-models of what matters most, by magnitude, as the model learns.

Each time a client is asked, the units of largest magnitude in the current global model that fit its size make up its
sub-model: importance needs no score of its own, and what matters may change from round to round. A merge averages each
entry over those who hold it. The paper masks single entries; here units are kept or left out, so that a client really
holds, computes and sends less (docs/decisions/0021-fiarse-in-units.md). The units kept travel with every request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.importance import score_units
from pruning.select import equal_widths, nested_family, select_top
from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.levels import check_levels, level_of, read_ratios
from strategies.setting import Order
from wire.flat import require_choice
from wire.message import State


@dataclass(frozen=True)
class FIARSEConfig:
    """Settings of FIARSE.

    Attributes
    ----------
    sizes : the levels' shares of the prunable parameters, comma-separated.
    assignment : ``capability``, ``cycle`` or ``dynamic`` (see ``strategies.levels``).
    scope : ``per-layer`` (every layer keeps the same fraction, its own best units) or ``global`` (one ranking).
    importance : magnitude of a unit: ``l1`` or ``l2`` norm of all its weights.
    """

    sizes: str = "1,0.25,0.0625,0.015625"
    assignment: str = "capability"
    scope: str = "per-layer"
    importance: str = "l1"

    def __post_init__(self) -> None:
        """Check every range."""
        check_levels("sizes", self.sizes, self.assignment)
        require_choice("scope", self.scope, ("per-layer", "global"))
        require_choice("importance", self.importance, ("l1", "l2"))


class FIARSE(SubModelStrategy):
    """Sizes; which units, the global model's own magnitudes say."""

    name = "fiarse"
    Config = FIARSEConfig
    config: FIARSEConfig

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """The most important units of the present model, for every client as many as it can hold."""
        levels = self._levels(self.progress.state)
        return {pid: Order(levels[self._level(pid, server_round)]) for pid in clients}

    def family(self) -> dict[str, SubModelSpec]:
        """The most important units of the present model, for every size below the full one."""
        sizes, levels = read_ratios(self.config.sizes), self._levels(self.progress.state)
        return {f"{size:g}": spec for size, spec in zip(sizes, levels, strict=True) if size < 1}

    def evaluation_order(self, partition_id: int) -> Order:
        """What the client would be given now; at the first round's level when levels are drawn."""
        return Order(self._levels(self.progress.state)[self._level(partition_id, 1)])

    def _level(self, partition_id: int, server_round: int) -> int:
        num_levels = len(read_ratios(self.config.sizes))
        return level_of(self.setting, self.config.assignment, num_levels, partition_id, server_round)

    def _levels(self, state: State) -> list[SubModelSpec]:
        """The sub-model of every size, the largest first."""
        scores = score_units(state, self.layout, self.config.importance)
        sizes = read_ratios(self.config.sizes)
        if self.config.scope == "global":
            ranked = nested_family(self.layout, self.cost, scores, "global")
            return [ranked.member(ranked.achievable(size)) for size in sizes]
        widths = [equal_widths(self.layout, self.cost, size, "prunable") for size in sizes]
        return [select_top(self.layout, kept, scores) for kept in widths]
