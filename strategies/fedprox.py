"""FedProx (Li et al. 2020, arXiv 1812.06127): a proximal term keeps clients near the model they were sent.

Client i minimises ``F_i(w) + mu / 2 ||w - w_t||^2`` (equation 2), the server averages as FedAvg does; mu = 0 is FedAvg.
Instead of the paper's partial work for slow devices they may get smaller models here (``rates``, HeteroFL's levels),
or be late (``loop.deadline-s``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.levels import LevelsConfig, prefix_family, prefix_of
from strategies.setting import Order
from wire.flat import require


@dataclass(frozen=True)
class FedProxConfig(LevelsConfig):
    """Settings of FedProx.

    Attributes
    ----------
    mu : weight of the proximal term, >= 0.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        """Check every range."""
        super().__post_init__()
        require(self.mu >= 0, "mu", self.mu, ">= 0")


class FedProx(SubModelStrategy):
    """FedAvg with a leash."""

    name = "fedprox"
    Config = FedProxConfig
    config: FedProxConfig

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Everybody trains with the proximal term."""
        objective, settings = "cross-entropy+proximal", {"mu": self.config.mu}
        return {pid: Order(self._spec(pid, server_round), objective, settings) for pid in clients}

    def family(self) -> dict[str, SubModelSpec]:
        """Every level below the full model."""
        return prefix_family(self.setting, self.config.rates)

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's level; the first round's when levels are drawn."""
        return Order(self._spec(partition_id, 1))

    def _spec(self, partition_id: int, server_round: int) -> SubModelSpec:
        return prefix_of(self.setting, self.config.rates, self.config.assignment, partition_id, server_round)
