"""FedNova (Wang et al. 2020, arXiv 2007.07481): updates are normalised by the local steps behind them.

``x+ = x + tau_eff sum_i p_i d_i / a_i`` (equation 8, ``strategies.normalise``) with a_i for SGD, momentum and a
proximal term (``wire.training.local_distance``); FedAvg weighs a client by its examples and, in effect, by its steps
too. With equal steps it is FedAvg, or FedProx with a ``mu``. Buffers are averaged as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pruning.merge import AggregateResult, MaskedMean
from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.exchange import Entry
from strategies.levels import ProximalConfig, check_partial_work, prefix_family, prefix_of, proximal_order
from strategies.normalise import StepTally, check_steps, scaled
from strategies.setting import Order
from wire.flat import refuse
from wire.message import Report
from wire.training import learning_rate, local_distance


class FedNova(SubModelStrategy):
    """Averages of normalised updates."""

    name = "fednova"
    Config = ProximalConfig
    config: ProximalConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._tally = StepTally()

    def check(self) -> None:
        """How far steps go is known of SGD; partial work needs known devices."""
        check_partial_work(self.name, self.setting, self.config)
        optimizer = self.setting.job.train.optimizer
        refuse(
            optimizer != "sgd",
            f"strategy=fednova with train.optimizer={optimizer}",
            "the norm a_i of accumulated gradients is known for SGD with momentum and a proximal term; use "
            "train.optimizer=sgd",
        )

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Everybody trains as in FedAvg, or FedProx."""
        return {pid: proximal_order(self.setting, self.config, pid, server_round) for pid in clients}

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Add the update scaled to the steps of the round's first."""
        job, held = self.setting.job, report.narrowed or entry.spec
        check_steps(report, job.train, entry.work_ratio)
        rate = learning_rate(job.train, entry.server_round, job.num_rounds)
        distance = local_distance(job.train, report.num_steps, rate, self.config.mu)
        start = self.present(held)
        state = scaled(report.state, start, self.cost.trainable, self._tally.factor(distance))
        super().add(mean, entry, replace(report, state=state), staleness)
        self._tally = self._tally.noted(distance, self.weigh(report, staleness))

    def merge(self, mean: MaskedMean) -> AggregateResult:
        """Scale the mean update to the effective number of steps."""
        tally, self._tally = self._tally, StepTally()
        mean.later = dict.fromkeys(self.cost.trainable, tally.effective)
        merged = super().merge(mean)
        state = scaled(merged.state, self.progress.state, self.cost.trainable, tally.effective)
        return replace(merged, state=state)

    def family(self) -> dict[str, SubModelSpec]:
        """Every level below the full model."""
        return prefix_family(self.setting, self.config.rates)

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's level; the first round's when levels are drawn."""
        return Order(prefix_of(self.setting, self.config.rates, self.config.assignment, partition_id, 1))
