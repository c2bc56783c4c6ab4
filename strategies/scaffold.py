"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): control variates correct the drift of every local step.

``y_i <- y_i - eta (g_i(y_i) - c_i + c)``; option II of algorithm 1 renews c_i (``client_app.objectives.drift``);
``x <- x + mean of (y_i - x)``, ``c <- mean of c_i`` (``strategies.variates``). Buffers have no variates and are
averaged. Sub-models: variates follow them, c is the mean over those who hold an entry. Clients weigh as much as in
FedAvg; the paper's equal clients are ``loop.client-weight = "equal"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pruning.merge import AggregateResult, MaskedMean
from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.exchange import Entry
from strategies.levels import LevelsConfig, prefix_family, prefix_of
from strategies.setting import Order
from strategies.variates import Variates, check_variates
from wire.flat import refuse
from wire.message import Report


class Scaffold(SubModelStrategy):
    """Averages of models and of variates."""

    name = "scaffold"
    Config = LevelsConfig
    config: LevelsConfig

    def check(self) -> None:
        """Variates are means of steps of SGD over fixed holders, remembered by the clients."""
        check_variates(self.name, self.setting.job, self.setting.robust)
        refuse(
            self.config.assignment == "dynamic" and len(set(self.config.rates.split(","))) > 1,
            "scaffold.assignment=dynamic",
            "the holders of an entry would change every round, and the corrections c - c_i of those who train it would "
            "not cancel; use scaffold.assignment=capability or cycle",
        )

    def begin(self) -> None:
        """All variates are zero: the first round is FedAvg's."""
        specs = {pid: self._spec(pid) for pid in range(self.setting.job.num_clients)}
        self._variates = Variates(self.progress.state, self.layout, self.cost.trainable, specs)

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Everybody trains with its gradients corrected; the server's variate goes with the model."""
        specs = {pid: self._spec(pid) for pid in clients}
        c = self._variates.companions
        return {pid: Order(spec, "cross-entropy+variates", companions=c(spec)) for pid, spec in specs.items()}

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Average the model, and take the change of the client's variate into account.

        A stale model may count less; a variate is never stale, for it says what its client remembers.
        """
        change = self._variates.change(entry.partition_id, report.companions, report.narrowed)
        super().add(mean, entry, report, staleness)
        self._variates.add(change, self.loop.weight(report.num_examples, staleness=0))

    def merge(self, mean: MaskedMean) -> AggregateResult:
        """The variate moves when the model does."""
        self._variates.close()
        return super().merge(mean)

    def family(self) -> dict[str, SubModelSpec]:
        """Every level below the full model."""
        return prefix_family(self.setting, self.config.rates)

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's level."""
        return Order(self._spec(partition_id))

    def _spec(self, partition_id: int) -> SubModelSpec:
        return prefix_of(self.setting, self.config.rates, self.config.assignment, partition_id, 1)

    def export_state(self) -> dict[str, Any]:
        """The sums behind the server's variate."""
        return self._variates.export_state()

    def import_state(self, own: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        self.begin()
        self._variates.import_state(own)
