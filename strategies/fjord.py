"""FjORD (Horvath et al. 2021, arXiv 2102.13451): ordered dropout; each client trains all widths up to its own.

For every batch a client draws a width p among those of the set P that it can hold and trains the first ``p * size``
units of every layer (section 3.1), optionally taught by its own full width (section 3.3). The units between two widths
are averaged over the clients that hold them (equation 1): the mean over holders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.levels import check_levels, level_of, prefix_family, prefix_levels, read_ratios
from strategies.setting import Order
from wire.flat import Scalar, require
from wire.spec import spec_to_json


@dataclass(frozen=True)
class FjORDConfig:
    """Settings of FjORD.

    Attributes
    ----------
    rates : the set P of retention ratios by width, comma-separated.
    assignment : ``capability``, ``cycle`` or ``dynamic`` (see ``strategies.levels``).
    self_distillation : train the client's full width on every batch, and let it teach the width drawn.
    distillation_weight : share of the narrow width's loss that is the teacher's, in [0, 1].
    temperature : of the distillation.
    """

    rates: str = "1,0.8,0.6,0.4,0.2"
    assignment: str = "capability"
    self_distillation: bool = False
    distillation_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check every range."""
        check_levels("rates", self.rates, self.assignment)
        require(0 <= self.distillation_weight <= 1, "distillation-weight", self.distillation_weight, "in [0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")


class FjORD(SubModelStrategy):
    """Width levels, nested by prefix; the wider ones train the narrower ones too."""

    name = "fjord"
    Config = FjORDConfig
    config: FjORDConfig

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Each client's width, and the narrower ones to train inside it."""
        levels = self._levels()
        written = [spec_to_json(spec) for spec in levels]
        orders = []
        for first, spec in enumerate(levels):
            settings: dict[str, Scalar] = {
                "levels": json.dumps(written[first:]),
                "self-distillation": self.config.self_distillation,
                "distillation-weight": self.config.distillation_weight,
                "temperature": self.config.temperature,
            }
            orders.append(Order(spec, "ordered-dropout", settings))
        return {pid: orders[self._level(pid, server_round)] for pid in clients}

    def family(self) -> dict[str, SubModelSpec]:
        """Every width below the full one."""
        return prefix_family(self.setting, self.config.rates)

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's full width; the first round's when levels are drawn."""
        return Order(self._levels()[self._level(partition_id, 1)])

    def _levels(self) -> list[SubModelSpec]:
        return prefix_levels(self.setting, self.config.rates)

    def _level(self, partition_id: int, server_round: int) -> int:
        num_levels = len(read_ratios(self.config.rates))
        return level_of(self.setting, self.config.assignment, num_levels, partition_id, server_round)
