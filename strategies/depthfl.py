"""DepthFL (Kim, Yu, Kim, Moon, ICLR 2023): clients hold the first blocks of a model with exits, cut behind an exit.

A client of depth d trains all its d exits, which learn the labels and learn from each other (mutual self-distillation):
sum_i [CE(z_i, y) + mu_t / (d - 1) sum_{j != i} KL(softmax(z_j) || softmax(z_i))], where mu_t ramps up over the first
rounds. A merge averages each entry over those who hold it. Predictions are the mean of all exits' logits. The paper
trains with FedDyn, which is another method's and not part of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.exits import PREDICTIONS, check_exits, cut_behind
from strategies.levels import ASSIGNMENTS, level_of
from strategies.schedule import gaussian_ramp_up
from strategies.setting import Order
from wire.flat import refuse, require, require_choice


@dataclass(frozen=True)
class DepthFLConfig:
    """Settings of DepthFL.

    Attributes
    ----------
    exits : how many exits the levels hold, comma-separated, such as ``4,2``; ``all`` for one level per exit.
    assignment : ``capability``, ``cycle`` or ``dynamic`` (see ``strategies.levels``).
    distillation_weight : of what exits learn from each other, when ramped up; 0 for joint training of the exits.
    temperature : of the distillation.
    ramp_up_rounds : until the weight is reached; 0 for at once.
    predict : with the ``ensemble`` of a model's exits, or its ``deepest``.
    """

    exits: str = "all"
    assignment: str = "capability"
    distillation_weight: float = 1.0
    temperature: float = 1.0
    ramp_up_rounds: int = 12
    predict: str = "ensemble"

    def __post_init__(self) -> None:
        """Check every range."""
        is_good = self.exits == "all" or all(part.strip().isdecimal() and int(part) for part in self.exits.split(","))
        require(is_good, "exits", self.exits, "'all', or numbers of exits >= 1, comma-separated")
        require_choice("assignment", self.assignment, ASSIGNMENTS)
        require_choice("predict", self.predict, PREDICTIONS)
        require(self.distillation_weight >= 0, "distillation-weight", self.distillation_weight, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.ramp_up_rounds >= 0, "ramp-up-rounds", self.ramp_up_rounds, ">= 0")


class DepthFL(SubModelStrategy):
    """Depth levels, nested; exits teach each other."""

    name = "depthfl"
    Config = DepthFLConfig
    config: DepthFLConfig

    def check(self) -> None:
        """A model needs as many exits as the deepest level asks for."""
        check_exits(self.layout, self.name, self.setting.job.model.name)
        most = max(self._levels())
        refuse(most > len(self.layout.exits), f"depthfl.exits={self.config.exits}", self._too_many())

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Each client's depth, and how much its exits learn from each other by now."""
        weight = self.config.distillation_weight * gaussian_ramp_up(server_round, self.config.ramp_up_rounds)
        settings = {"distillation-weight": weight, "temperature": self.config.temperature}
        return {pid: Order(self._spec(pid, server_round), "mutual", settings) for pid in clients}

    def family(self) -> dict[str, SubModelSpec]:
        """The model cut behind every exit but the deepest that is trained."""
        return {f"exit {n}": cut_behind(self.layout, n) for n in range(self._levels()[0] - 1, 0, -1)}

    def deployed(self) -> SubModelSpec:
        """The deepest level: exits behind it have never been trained."""
        return cut_behind(self.layout, self._levels()[0])

    def prediction(self) -> str:
        """By all exits, as the paper does, or the deepest."""
        return self.config.predict

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's depth; the first round's when levels are drawn."""
        return Order(self._spec(partition_id, 1), "exits", {"predict": self.config.predict})

    def _spec(self, partition_id: int, server_round: int) -> SubModelSpec:
        levels = self._levels()
        level = level_of(self.setting, self.config.assignment, len(levels), partition_id, server_round)
        return cut_behind(self.layout, levels[level])

    def _levels(self) -> list[int]:
        """Exits of every level, the deepest first."""
        if self.config.exits == "all":
            return list(range(len(self.layout.exits), 0, -1))
        return sorted((int(part) for part in self.config.exits.split(",")), reverse=True)

    def _too_many(self) -> str:
        return f"{self.setting.job.model.name!r} has {len(self.layout.exits)} exits; ask for at most as many"
