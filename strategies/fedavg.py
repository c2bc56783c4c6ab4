"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): everybody trains the full model; weights are averaged by examples.

theta = sum_i n_i theta_i / sum_i n_i (algorithm 1). With ``retention-ratio`` below 1 everybody trains the same smaller
model: ``smallest-everywhere``, the rival that a method for unequal devices has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.select import equal_widths, select_prefix
from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.setting import Order
from wire.flat import require, require_choice


@dataclass(frozen=True)
class FedAvgConfig:
    """Settings of FedAvg.

    Attributes
    ----------
    retention_ratio : share of ``measure`` that everybody's model keeps, in (0, 1].
    measure : ``width``, ``prunable``, ``parameters``, ``macs`` or ``bytes``.
    round_to : wide layers keep a multiple of this.
    """

    retention_ratio: float = 1.0
    measure: str = "prunable"
    round_to: int = 8

    def __post_init__(self) -> None:
        """Check every range."""
        require(0 < self.retention_ratio <= 1, "retention-ratio", self.retention_ratio, "in (0, 1]")
        require_choice("measure", self.measure, ("width", "prunable", "parameters", "macs", "bytes"))


class FedAvg(SubModelStrategy):
    """The same model for everybody, averaged."""

    name = "fedavg"
    Config = FedAvgConfig
    config: FedAvgConfig

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """The same sub-model for everybody."""
        return dict.fromkeys(clients, self.evaluation_order(0))

    def evaluation_order(self, partition_id: int) -> Order:
        """Everybody deploys what everybody trains."""
        return Order(self._spec())

    def family(self) -> dict[str, SubModelSpec]:
        """The model that was trained, where it is not the full one."""
        spec = self._spec()
        return {f"{self.cost.retention_ratio(spec):.2f}": spec} if spec.kept else {}

    def _spec(self) -> SubModelSpec:
        c = self.config
        widths = equal_widths(self.layout, self.cost, c.retention_ratio, c.measure, c.round_to)
        return select_prefix(self.layout, widths)
