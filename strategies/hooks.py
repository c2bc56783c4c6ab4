"""What a method decides: the hooks of the event loop, with FedAvg's answers as defaults.

This is all that a new method needs to know of the loop. They are called in this order: ``check`` and ``begin`` once,
then in every round ``plan``, for each answer ``vet``, ``add`` (which asks ``weigh``) and ``observe``, for one that is
too old ``vet`` and ``observe_late``, ``follow_up``, ``merge``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pruning.cost import CostModel
from pruning.groups import Layout
from pruning.merge import AggregateResult, MaskedMean
from pruning.spec import FULL, SubModelSpec
from strategies.exchange import Arrival, Entry
from strategies.loop import LoopConfig
from strategies.setting import Order, Progress, Setting
from wire.message import Report


class Hooks:
    """What a method decides, and what it may read.

    Attributes
    ----------
    config : the method's own settings, an instance of ``Config``.
    setting : the run; ``layout`` and ``cost`` of the global model, and ``seed``, are its.
    loop : who is asked, when a merge happens and with what weight, as it is in force.
    progress : where the run stands; ``progress.state`` is the global model.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    has_global_model: ClassVar[bool] = True
    """Whether the merged state is a model to test; if not, clients test what each of them has."""
    needs_barrier: ClassVar[bool] = False
    """Whether every round waits for everybody it asked: ``start`` refuses quorums and deadlines."""
    sends_deltas: ClassVar[bool] = False
    """Whether answers are differences, even where none is stale and nothing is compressed."""
    needs_versions: bool = False
    """Whether the method compares with the model that a client started from (``sent_state``)."""

    config: Any
    setting: Setting
    layout: Layout
    cost: CostModel
    loop: LoopConfig
    seed: int
    progress: Progress

    def check(self) -> None:
        """Refuse a run that makes no sense with this method; called before anything is sent, resumed or not.

        Raises
        ------
        ConfigError
            With the keys that contradict each other, the reason, and the remedy (see ``refuse``).
        """

    def takes_part(self, partition_id: int) -> bool:
        """Whether a client is ever asked to train; the others are not drawn."""
        return True

    def begin(self) -> None:
        """Called once before the first round of a fresh run; ``self.progress.state`` is the initial model."""

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Say what each of ``clients`` is asked for; a client left out is not asked this time.

        Called once a round, and with ``loop.ask = on-arrival`` again for whoever becomes free before it closes.
        """
        return {partition_id: Order() for partition_id in clients}

    def follow_up(self, server_round: int) -> dict[int, Order]:
        """What to ask further in the same round, told after the answers to everything asked before; {} closes it."""
        return {}

    def vet(self, arrival: Arrival, report: Report) -> None:
        """Turn away, with a ``ValueError``, an answer that ``add`` or ``observe`` could not use; changes nothing.

        Called with the report as it was sent, of late answers too.
        """

    def weigh(self, report: Report, staleness: int) -> float:
        """Weight of an answer in the merge."""
        return self.loop.weight(report.num_examples, staleness)

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Take one checked answer into the merge; a ``ValueError`` turns the answer away before it changed anything."""
        mean.add(report.state, report.narrowed or entry.spec, self.weigh(report, staleness))

    def observe(self, arrival: Arrival, report: Report) -> None:
        """Learn from an answer (update times, label counts) that is in the merge; nothing may go wrong any more."""

    def observe_late(self, arrival: Arrival, report: Report) -> None:
        """Learn from an answer that came too late for any merge: it still says how long its client took."""

    def merge(self, mean: MaskedMean) -> AggregateResult:
        """Close the round: what the global model becomes."""
        return mean.finalize(self.loop.mixing_rate)

    def family(self) -> dict[str, SubModelSpec]:
        """Named sub-models worth evaluating beside the global model."""
        return {}

    def deployed(self) -> SubModelSpec:
        """What stands for the global model in central evaluations: all of it, unless parts have never been trained."""
        return FULL

    def prediction(self) -> str:
        """What models with exits predict with in the central evaluation: the ``deepest`` exit or the ``ensemble``."""
        return "deepest"

    def evaluation_order(self, partition_id: int) -> Order:
        """What a client would deploy, and what it needs to be asked to test it."""
        return Order()

    def judge(self, report: Report) -> Report | None:
        """Finish a client's test that it could only begin; a ``ValueError`` leaves the client out.

        None: the test goes on, ``evaluation_order`` says how. Called as answers come, in no order.
        """
        return report

    def close(self) -> None:
        """Give back threads and files; called once at the end of a run, however it ended."""

    def export_state(self) -> dict[str, Any]:
        """The method's own state for a checkpoint: JSON values, and tensors in dicts."""
        return {}

    def import_state(self, own: dict[str, Any]) -> None:
        """Inverse of ``export_state``."""
