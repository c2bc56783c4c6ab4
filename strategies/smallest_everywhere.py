"""Smallest everywhere: the straggler's model on all clients. A baseline that papers omit and users ask for.

Everybody trains the same small model, averaged as in FedAvg. A method for unequal devices that is not better at equal
virtual time has no reason to exist. The default is the smallest of HeteroFL's default levels, unit for unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.one_size import OneSizeConfig, one_size, one_size_family
from strategies.setting import Order


@dataclass(frozen=True)
class SmallestEverywhereConfig(OneSizeConfig):
    """Settings of smallest-everywhere: those of ``OneSizeConfig`` with other defaults."""

    retention_ratio: float = 0.25
    measure: str = "width"
    round_to: int = 1


class SmallestEverywhere(SubModelStrategy):
    """The same small model for everybody, averaged."""

    name = "smallest-everywhere"
    Config = SmallestEverywhereConfig
    config: SmallestEverywhereConfig

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """The same small model for everybody."""
        return dict.fromkeys(clients, self.evaluation_order(0))

    def evaluation_order(self, partition_id: int) -> Order:
        """Everybody deploys what everybody trains."""
        return Order(one_size(self.setting, self.config))

    def family(self) -> dict[str, SubModelSpec]:
        """The model that was trained; the rest of the global model never leaves its first values."""
        return one_size_family(self.setting, self.config)
