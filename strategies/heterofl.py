"""HeteroFL (Diao, Ding, Tarokh 2021, arXiv 2010.01264): each client trains the first channels of every layer.

Client i of complexity level p holds the upper left ``ceil(r_p * size)`` units of every layer (section 3); every entry
becomes the mean over those who hold it (equations 1 to 3). Options of the paper: rates drawn anew each round
(``dynamic``), logits of classes a client does not have masked out of its loss and out of the merge
(``mask-missing-labels``), static batch normalisation. The scaler belongs to static BN and is not needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pruning.merge import MaskedMean
from pruning.select import equal_widths, select_prefix
from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.exchange import Entry
from strategies.setting import Order
from wire.flat import refuse, require, require_choice
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
        is_good = all(_is_ratio(part) for part in self.rates.split(","))
        require(is_good, "rates", self.rates, "retention ratios in (0, 1], comma-separated")
        require_choice("assignment", self.assignment, ("capability", "cycle", "dynamic"))


def _is_ratio(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


class HeteroFL(SubModelStrategy):
    """Width levels, nested by prefix."""

    name = "heterofl"
    Config = HeteroFLConfig
    config: HeteroFLConfig

    def check(self) -> None:
        """A merge by labels needs to know which rows of the model belong to which class."""
        refuse(
            self.config.mask_missing_labels and "classes" not in self.layout.by_name,
            "heterofl.mask-missing-labels=true",
            f"the layout of {self.setting.job.model.name!r} has no group 'classes' (a regression head, or a "
            "traced model with its classifier undeclared); declare the group or set heterofl.mask-missing-labels=false",
        )

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Each client's level for this round."""
        settings = {"mask-missing-labels": self.config.mask_missing_labels}
        return {pid: Order(self._level(self._rate(pid, server_round)), settings=settings) for pid in clients}

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Merge only the classifier rows of classes the client has."""
        mean.add(report.state, entry.spec, self.weigh(report, staleness), narrowed=self._present(entry.spec, report))

    def family(self) -> dict[str, SubModelSpec]:
        """Every level below the full model."""
        return {f"{rate:g}": self._level(rate) for rate in self._rates() if rate < 1}

    def evaluation_order(self, partition_id: int) -> Order:
        """The client's level; the first round's when levels are drawn."""
        return Order(self._level(self._rate(partition_id, 1)))

    def _present(self, spec: SubModelSpec, report: Report) -> SubModelSpec | None:
        present = [label for label, count in enumerate(report.label_counts) if count]
        if not self.config.mask_missing_labels or "classes" not in self.layout.by_name or not present:
            return None
        return SubModelSpec.of({**spec.units, "classes": present}, spec.depth)

    def _rates(self) -> list[float]:
        return sorted((float(part) for part in self.config.rates.split(",")), reverse=True)

    def _rate(self, partition_id: int, server_round: int) -> float:
        rates, num_clients = self._rates(), self.setting.job.num_clients
        if self.config.assignment == "dynamic":
            rng = np.random.default_rng((self.seed, server_round, partition_id))
            return float(rng.choice(rates))
        durations = self.setting.durations
        if self.config.assignment == "cycle" or durations is None:
            return rates[partition_id % len(rates)]
        speeds = [device.train_flops for device in durations.fleet.devices]
        rank = sorted(range(num_clients), key=lambda pid: (-speeds[pid], pid)).index(partition_id)
        return rates[rank * len(rates) // num_clients]

    def _level(self, rate: float) -> SubModelSpec:
        return select_prefix(self.layout, equal_widths(self.layout, self.cost, rate, "width"))
