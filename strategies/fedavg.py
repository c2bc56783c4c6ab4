"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): everybody trains the full model; weights are averaged by examples.

theta = sum_i n_i theta_i / sum_i n_i (algorithm 1). With ``retention-ratio`` below 1 everybody trains the same smaller
model (see ``strategies.smallest_everywhere``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.one_size import OneSizeConfig, one_size, one_size_family
from strategies.setting import Order


@dataclass(frozen=True)
class FedAvgConfig(OneSizeConfig):
    """Settings of FedAvg; see ``OneSizeConfig``."""


class FedAvg(SubModelStrategy):
    """The same model for everybody, averaged."""

    name = "fedavg"
    Config = FedAvgConfig
    config: FedAvgConfig

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """The same model for everybody."""
        return dict.fromkeys(clients, self.evaluation_order(0))

    def evaluation_order(self, partition_id: int) -> Order:
        """Everybody deploys what everybody trains."""
        return Order(one_size(self.setting, self.config))

    def family(self) -> dict[str, SubModelSpec]:
        """The model that was trained, where it is not the full one."""
        return one_size_family(self.setting, self.config)
