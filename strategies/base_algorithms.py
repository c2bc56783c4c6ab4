"""The base algorithms as pieces, for methods that change what clients train and leave the rest to one of these.

``fedavg``: nothing. ``fedprox``: a proximal term. ``scaffold``: control variates. ``fednova``: normalised updates.
What each does is written once: ``client_app.objectives.drift``, ``strategies.variates``, ``strategies.normalise``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pruning.groups import Layout
from pruning.merge import AggregateResult, MaskedMean
from pruning.spec import FULL, SubModelSpec
from strategies.exchange import Entry
from strategies.normalise import StepTally, check_steps, scaled
from strategies.setting import Setting
from strategies.variates import Change, Variates, check_variates
from wire.flat import refuse
from wire.message import Report, State
from wire.training import learning_rate, local_distance

BASES = ("fedavg", "fedprox", "scaffold", "fednova")


@dataclass(frozen=True)
class Answer:
    """One answer, ready for the mean.

    Attributes
    ----------
    report : with its state as it is to be averaged.
    note : told the answer's weight once it is in the mean.
    """

    report: Report
    note: Callable[[float], None] = lambda weight: None


class Base:
    """One base algorithm at work; with FedAvg, and as the others need not differ, it does nothing.

    Parameters
    ----------
    name : of ``BASES``.
    setting : of the run.
    mu : weight of the proximal term, of ``fedprox`` only.
    """

    def __init__(self, name: str, setting: Setting, mu: float = 0.0) -> None:
        self.name, self.setting, self.mu = name, setting, mu if name == "fedprox" else 0.0
        self._variates: Variates | None = None
        self._tally = StepTally()

    def check(self, strategy: str) -> None:
        """Refuse what makes no sense with the base."""
        if self.name == "scaffold":
            check_variates(strategy, self.setting.job, self.setting.robust)
        optimizer = self.setting.job.train.optimizer
        refuse(
            self.name == "fednova" and optimizer != "sgd",
            f"{strategy}.base=fednova with train.optimizer={optimizer}",
            "how far steps go is known for SGD; use train.optimizer=sgd",
        )

    def begin(self, state: State, layout: Layout) -> None:
        """Start from the initial model."""
        if self.name == "scaffold":
            specs = dict.fromkeys(range(self.setting.job.num_clients), FULL)
            self._variates = Variates(state, layout, self.setting.cost.trainable, specs)

    def objective(self, inner: str) -> str:
        """What clients minimise, ``inner`` being what they would without the base."""
        return inner + {"fedprox": "+proximal", "scaffold": "+variates"}.get(self.name, "")

    def settings(self) -> dict[str, float]:
        """What the base adds to an order's settings."""
        return {"mu": self.mu} if self.name == "fedprox" else {}

    def companions(self, spec: SubModelSpec) -> Callable[[], State]:
        """What goes with a request."""
        return dict if self._variates is None else self._variates.companions(spec)

    def read(self, entry: Entry, report: Report, start: State) -> Answer:
        """Prepare an answer for the mean; a ``ValueError`` turns it away before anything changed.

        Parameters
        ----------
        start : the part of the global model that the answer is about, as it is now.
        """
        if self._variates is not None:
            variates = self._variates
            change: Change = variates.change(entry.partition_id, report.companions, report.narrowed or entry.spec)
            weight_of = self.setting.loop.weight(report.num_examples, staleness=0)
            return Answer(report, lambda weight: variates.add(change, weight_of))
        if self.name == "fednova":
            job = self.setting.job
            check_steps(report, job.train, entry.work_ratio)
            rate = learning_rate(job.train, entry.server_round, job.num_rounds)
            distance = local_distance(job.train, report.num_steps, rate)
            factor = self._tally.factor(distance)
            state = scaled(report.state, start, self.setting.cost.trainable, factor)
            return Answer(replace(report, state=state), lambda weight: self._note(distance, weight))
        return Answer(report)

    def _note(self, distance: float, weight: float) -> None:
        self._tally = self._tally.noted(distance, weight)

    def prepare(self, mean: MaskedMean) -> None:
        """Say what ``close`` will do to a merge, before it is made."""
        if self.name == "fednova":
            mean.later = dict.fromkeys(self.setting.cost.trainable, self._tally.effective)

    def close(self, merged: AggregateResult, previous: State) -> AggregateResult:
        """Finish a merge."""
        if self._variates is not None:
            self._variates.close()
        if self.name != "fednova":
            return merged
        tally, self._tally = self._tally, StepTally()
        return replace(merged, state=scaled(merged.state, previous, self.setting.cost.trainable, tally.effective))

    def export_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {} if self._variates is None else self._variates.export_state()

    def import_state(self, own: dict[str, Any]) -> None:
        """Go on from ``export_state``, after ``begin``."""
        if self._variates is not None:
            self._variates.import_state(own)
