"""HeteroFL (Diao, Ding, Tarokh 2021, arXiv 2010.01264): each client trains the first channels of every layer.

Client i of complexity level p holds the upper left ``ceil(r_p * size)`` units of every layer (section 3); every entry
becomes the mean over those who hold it (equations 1 to 3). Options of the paper: rates drawn anew each round
(``dynamic``), logits of classes a client does not have masked out of its loss and out of the merge
(``mask-missing-labels``). Its static batch normalisation is no option of training here but a way of reading the result:
every central evaluation shows accuracies with statistics as merged and re-estimated. The scaler goes with static BN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.merge import MaskedMean
from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.exchange import Entry
from strategies.labels import check_classes, with_present_classes
from strategies.levels import check_levels, prefix_family, prefix_of
from strategies.setting import Order
from wire.message import Report


@dataclass(frozen=True)
class HeteroFLConfig:
    """Settings of HeteroFL.

    Attributes
    ----------
    rates : the levels' retention ratios by width, comma-separated, widest first.
    assignment : ``capability`` (equal parts of the clients per level, faster devices the wider ones), ``cycle``
        (client i gets level i mod levels) or ``dynamic`` (drawn anew each round).
    mask_missing_labels : keep classes a client does not have out of its loss and of the merge of the classifier.
    """

    rates: str = "1,0.5,0.25"
    assignment: str = "capability"
    mask_missing_labels: bool = True

    def __post_init__(self) -> None:
        """Check every range."""
        check_levels("rates", self.rates, self.assignment)


class HeteroFL(SubModelStrategy):
    """Width levels, nested by prefix."""

    name = "heterofl"
    Config = HeteroFLConfig
    config: HeteroFLConfig

    def check(self) -> None:
        """A merge by labels needs to know which rows of the model belong to which class."""
        if self.config.mask_missing_labels:
            check_classes(self.layout, "heterofl.mask-missing-labels", self.setting.job.model.name)

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Each client's level for this round."""
        settings = {"mask-missing-labels": self.config.mask_missing_labels}
        return {pid: Order(self._spec(pid, server_round), settings=settings) for pid in clients}

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Merge only the classifier rows of classes the client has."""
        part = with_present_classes(entry.spec, report) if self.config.mask_missing_labels else None
        mean.add(report.state, entry.spec, self.weigh(report, staleness), part=part)

    def family(self) -> dict[str, SubModelSpec]:
        """Every level below the full model."""
        return prefix_family(self.setting, self.config.rates)

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's level; the first round's when levels are drawn."""
        return Order(self._spec(partition_id, 1))

    def _spec(self, partition_id: int, server_round: int) -> SubModelSpec:
        return prefix_of(self.setting, self.config.rates, self.config.assignment, partition_id, server_round)
