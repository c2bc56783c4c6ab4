"""FedProx (Li et al. 2020, arXiv 1812.06127): a proximal term keeps clients near the model they were sent.

Client i minimises ``F_i(w) + mu / 2 ||w - w_t||^2`` (equation 2), the server averages as FedAvg does; mu = 0 is FedAvg.
Slow devices may do part of the work (``partial-work``), as in the paper, or get smaller models (``rates``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.levels import ProximalConfig, check_partial_work, prefix_family, prefix_of, proximal_order
from strategies.setting import Order


@dataclass(frozen=True)
class FedProxConfig(ProximalConfig):
    """Settings of FedProx; see ``ProximalConfig``."""

    mu: float = 0.01


class FedProx(SubModelStrategy):
    """FedAvg with a leash."""

    name = "fedprox"
    Config = FedProxConfig
    config: FedProxConfig

    def check(self) -> None:
        """Partial work needs known devices."""
        check_partial_work(self.name, self.setting, self.config)

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Everybody trains with the proximal term."""
        return {pid: proximal_order(self.setting, self.config, pid, server_round) for pid in clients}

    def family(self) -> dict[str, SubModelSpec]:
        """Every level below the full model."""
        return prefix_family(self.setting, self.config.rates)

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's level; the first round's when levels are drawn."""
        return Order(prefix_of(self.setting, self.config.rates, self.config.assignment, partition_id, 1))
