"""FedRolex (Alam, Liu, Yan, Zhang 2022, arXiv 2212.01548): windows that roll over every layer, so that all is trained.

A client of capacity beta holds ``beta * size`` consecutive units of every layer; in round j the window starts at unit
``j mod size`` and wraps around (equation 4). Entries are averaged over those who hold them, as in HeteroFL. The rivals
of the paper are options: ``random`` units, drawn anew for each client and round (federated dropout), and ``static``
prefixes. ``staggered`` windows are ours: with the paper's, units are covered evenly, entries between two layers are
not (see ``pruning.rolling``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from pruning.merge import MaskedMean
from pruning.rolling import lockstep_starts, staggered_starts
from pruning.select import equal_widths, select_prefix, select_random, select_window
from pruning.spec import SubModelSpec
from strategies.base import SubModelStrategy
from strategies.exchange import Entry
from strategies.labels import check_classes, with_present_classes
from strategies.levels import check_levels, level_of, read_ratios
from strategies.setting import Order
from wire.flat import require_choice
from wire.message import Report

EXTRACTIONS = ("rolling", "staggered", "random", "static")


@dataclass(frozen=True)
class FedRolexConfig:
    """Settings of FedRolex.

    Attributes
    ----------
    rates : the levels' retention ratios by width (capacities), comma-separated.
    assignment : ``capability``, ``cycle`` or ``dynamic`` (see ``strategies.levels``).
    extraction : ``rolling``, ``staggered``, ``random`` or ``static``.
    mask_missing_labels : keep classes a client does not have out of its loss and of the merge of the classifier.
    """

    rates: str = "1,0.5,0.25,0.125,0.0625"
    assignment: str = "capability"
    extraction: str = "rolling"
    mask_missing_labels: bool = True

    def __post_init__(self) -> None:
        """Check every range."""
        check_levels("rates", self.rates, self.assignment)
        require_choice("extraction", self.extraction, EXTRACTIONS)


class FedRolex(SubModelStrategy):
    """Width levels; which units, changes every round."""

    name = "fedrolex"
    Config = FedRolexConfig
    config: FedRolexConfig

    def check(self) -> None:
        """A merge by labels needs to know which rows of the model belong to which class."""
        if self.config.mask_missing_labels:
            check_classes(self.layout, "fedrolex.mask-missing-labels", self.setting.job.model.name)

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Each client's units of this round."""
        settings = {"mask-missing-labels": self.config.mask_missing_labels}
        return {pid: Order(self._spec(pid, server_round), settings=settings) for pid in clients}

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Merge only the classifier rows of classes the client has."""
        part = with_present_classes(entry.spec, report) if self.config.mask_missing_labels else None
        mean.add(report.state, entry.spec, self.weigh(report, staleness), part=part)

    def family(self) -> dict[str, SubModelSpec]:
        """The last round's window of every level; random units differ from client to client and have no name."""
        rates = [] if self.config.extraction == "random" else read_ratios(self.config.rates)
        return {f"{rate:g}": self._extract_units(rate, 0, self._last_round()) for rate in rates if rate < 1}

    def evaluation_order(self, partition_id: int) -> Order:
        """What the client held last."""
        return Order(self._spec(partition_id, self._last_round()))

    def _last_round(self) -> int:
        return max(1, self.progress.server_round)

    def _spec(self, partition_id: int, server_round: int) -> SubModelSpec:
        rates = read_ratios(self.config.rates)
        level = level_of(self.setting, self.config.assignment, len(rates), partition_id, server_round)
        return self._extract_units(rates[level], partition_id, server_round)

    def _extract_units(self, rate: float, partition_id: int, server_round: int) -> SubModelSpec:
        widths = equal_widths(self.layout, self.cost, rate, "width")
        if self.config.extraction == "random":
            return select_random(self.layout, widths, np.random.default_rng((self.seed, server_round, partition_id, 1)))
        if self.config.extraction == "static":
            return select_prefix(self.layout, widths)
        if self.config.extraction == "rolling":
            return select_window(self.layout, widths, lockstep_starts(self.layout, server_round - 1))
        num_positions = ceil(1 / read_ratios(self.config.rates)[-1])
        return select_window(self.layout, widths, staggered_starts(self.layout, server_round - 1, num_positions))
