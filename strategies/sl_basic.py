"""Split learning, one client after the other (Gupta and Raskar 2018, arXiv 1810.06060): the gradient comes down.

In a round every client in turn takes over the client's half from the one before, trains it on its data in exchange for
a gradient per step (Vepakomma et al. 2018, arXiv 1812.00564, the vanilla configuration), and hands it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pruning.merge import AggregateResult, MaskedMean
from strategies.base import SubModelStrategy
from strategies.exchange import Entry
from strategies.setting import Order
from strategies.split.halves import check_split, halves_of, merged
from strategies.split.masks import MaskConfig
from strategies.split.relay import Relay
from strategies.split.server import SplitServer
from wire.flat import require
from wire.message import Report


@dataclass(frozen=True)
class SLBasicConfig:
    """Settings of SL-basic.

    Attributes
    ----------
    cut : last layer on the client; for zoo models also the number of blocks there.
    order : of the clients in a round: ``fixed`` (by number) or ``shuffled`` (drawn anew each round).
    """

    cut: str = "1"
    order: str = "fixed"

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.order in ("fixed", "shuffled"), "order", self.order, "'fixed' or 'shuffled'")


class SLBasic(SubModelStrategy):
    """One client's half, handed round."""

    name = "sl-basic"
    Config = SLBasicConfig
    config: SLBasicConfig
    needs_barrier = True

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.halves = halves_of(self.setting, self.config.cut)
        self.relay = Relay(self.setting, self.halves, lambda pid: (self.server, 0))

    def check(self) -> None:
        """Refuse what split learning cannot do."""
        check_split(self.setting, self.name)

    def begin(self) -> None:
        """The server's half begins as the model was made."""
        self.server = SplitServer(self.halves.cut, self.progress.state, MaskConfig(kind="none"), self.setting.job.train)

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """The first client's first step."""
        self._waiting, self._num_done = list(clients), 0
        if self.config.order == "shuffled":
            self._waiting = [int(pid) for pid in np.random.default_rng((self.seed, server_round)).permutation(clients)]
        return self._next_client(server_round)

    def follow_up(self, server_round: int) -> dict[int, Order]:
        """The present client's next step, or the next client's first."""
        return self.relay.next() or self._next_client(server_round)

    def _next_client(self, server_round: int) -> dict[int, Order]:
        if not self._waiting:
            return {}
        self.relay.open([self._waiting.pop(0)], server_round)
        return self.relay.next()

    def add(self, mean: MaskedMean, entry: Entry, report: Report, staleness: int) -> None:
        """Train the server on a step; at the end the half goes to whoever is next."""
        half = self.relay.hear(entry.partition_id, report, self.progress.state)
        if half is not None:
            self.progress.state = {**self.progress.state, **half}
            self._num_done += 1

    def merge(self, mean: MaskedMean) -> AggregateResult:
        """Both halves as they are now."""
        return merged({**self.progress.state, **self.server.state()}, self._num_done)

    def export_state(self) -> dict[str, Any]:
        """The server's optimiser."""
        return {"server": self.server.export_state()}

    def import_state(self, own: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        self.begin()
        self.server.import_state(own["server"])
