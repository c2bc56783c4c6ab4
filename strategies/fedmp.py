"""FedMP (Jiang et al. 2022, ICDE): every client's pruning rate from a bandit; residuals recovered in the merge.

Each round the server prunes the global model anew for every client: the rate comes from the client's agent (E-UCB, see
``pruning.bandit``), every layer keeps the same share of its units, those with the largest l1 norm. R2SP: a trained
sub-model is completed by the residual, what was pruned away for it, before the average: ``theta = sum_i w_i (theta_i +
residual_i) / sum_i w_i``. Nothing is known about devices but their update times, as with AdaptCL, to whose learned
rates this is the alternative. What is the paper's and what is ours: docs/fidelity.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pruning.bandit import BanditParams, RateAgent, choose_rate, learn, new_agent, reward
from pruning.importance import UnitScores, score_units
from pruning.merge import AggregateResult, MaskedMean, residual_mean
from pruning.select import equal_widths, select_top
from strategies.answers import ReportError
from strategies.base import SubModelStrategy
from strategies.exchange import Arrival
from strategies.setting import Order
from wire.flat import require_choice
from wire.message import Report, State


@dataclass(frozen=True)
class FedMPConfig:
    """Settings of FedMP.

    Attributes
    ----------
    bandit : the agents' knobs.
    importance : ``l1``, ``l2`` or ``bn-scale``.
    """

    bandit: BanditParams = BanditParams()
    importance: str = "l1"

    def __post_init__(self) -> None:
        """Check the choice."""
        require_choice("importance", self.importance, ("l1", "l2", "bn-scale"))


class FedMP(SubModelStrategy):
    """Rates by bandit, pruned anew each round."""

    name = "fedmp"
    Config = FedMPConfig
    config: FedMPConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._agents: dict[int, RateAgent] = {}
        self._asked: dict[int, float] = {}
        self._losses: dict[int, float] = {}
        self._times_s: dict[int, float] = {}
        self._trials: list[tuple[int, float, float, float]] = []  # client, rate, loss decrease, update time
        self._scored: State = {}
        self._scores: UnitScores = {}

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Every client's agent chooses a rate; the units are the best of the model as it is now."""
        for pid in clients:
            rng = np.random.default_rng((self.seed, server_round, pid))
            self._asked[pid] = choose_rate(self._agent(pid), self.config.bandit, rng)
        return {pid: self.evaluation_order(pid) for pid in clients}

    def vet(self, arrival: Arrival, report: Report) -> None:
        """A trial is worth what the loss fell by in the time it took: both have to be there."""
        if "loss" not in report.metrics:
            raise ReportError("report: metric 'loss' is missing, whose decrease is what a trial is worth")
        if not arrival.duration.update_time_s > 0:
            raise ReportError(f"report: its update took {arrival.duration.update_time_s} s, expected a time > 0")

    def observe(self, arrival: Arrival, report: Report) -> None:
        """Note the update time, and by how much the client's loss fell since its last answer."""
        pid, loss = arrival.entry.partition_id, report.metrics["loss"]
        self._times_s[pid] = arrival.duration.update_time_s
        if pid in self._losses:
            self._trials.append((pid, self._asked[pid], self._losses[pid] - loss, self._times_s[pid]))
        self._losses[pid] = loss

    def observe_late(self, arrival: Arrival, report: Report) -> None:
        """A rate at which the client misses the deadline is a trial too."""
        self.observe(arrival, report)

    def merge(self, mean: MaskedMean) -> AggregateResult:
        """Reward the agents, complete every sub-model by its residual, and average."""
        bandit, mean_s = self.config.bandit, sum(self._times_s.values()) / len(self._times_s)
        for pid, rate, decrease, time_s in self._trials:
            self._agents[pid] = learn(self._agent(pid), bandit, rate, reward(decrease, time_s, mean_s, bandit))
        self._trials = []
        return mean.finalize(self.loop.mixing_rate, residual_mean)

    def evaluation_order(self, partition_id: int) -> Order:
        """The sub-model of the rate that the client was asked for last."""
        state = self.progress.state
        if self._scored is not state:  # once per version of the model
            self._scored, self._scores = state, score_units(state, self.layout, self.config.importance)
        widths = equal_widths(self.layout, self.cost, 1 - self._asked.get(partition_id, 0.0))
        return Order(select_top(self.layout, widths, self._scores))

    def _agent(self, partition_id: int) -> RateAgent:
        return self._agents.get(partition_id, new_agent(self.config.bandit))

    def export_state(self) -> dict[str, Any]:
        """Agents, and of every client the rate asked last, the last loss and the last update time."""
        return {
            "agents": {str(pid): [list(a.edges), [list(t) for t in a.trials]] for pid, a in self._agents.items()},
            **{key: {str(pid): value for pid, value in known.items()} for key, known in self._known().items()},
        }

    def import_state(self, own: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        self._agents = {
            int(pid): RateAgent(tuple(edges), tuple((rate, reward) for rate, reward in trials))
            for pid, (edges, trials) in own["agents"].items()
        }
        for key, known in self._known().items():
            known |= {int(pid): value for pid, value in own[key].items()}

    def _known(self) -> dict[str, dict[int, float]]:
        return {"asked": self._asked, "losses": self._losses, "times_s": self._times_s}
