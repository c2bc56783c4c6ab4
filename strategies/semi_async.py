"""Plain semi-asynchronous training: a round closes at a quorum or a deadline, and whoever is late counts later, less.

No paper's method, but what most of them share. The late answers' steps are merged with those of the round they arrive
in, weighted by examples and age. ``loop.preset=semi-async`` gives the rule to any method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strategies.base import SubModelStrategy
from strategies.loop import quorum_of, staleness_weight
from wire.flat import require


@dataclass(frozen=True)
class SemiAsyncConfig:
    """Settings of semi-asynchronous rounds.

    Attributes
    ----------
    quorum_ratio : share of the clients whose answers close a round; 0 leaves it to the deadline.
    deadline_s : close it after this long with at least one answer; 0 for none.
    max_staleness : older answers are dropped; -1 for no bound.
    staleness : weight by age, as ``loop.staleness``.
    """

    quorum_ratio: float = 0.5
    deadline_s: float = 0.0
    max_staleness: int = 10
    staleness: str = "polynomial:0.5"

    def __post_init__(self) -> None:
        """Check every range."""
        require(0 <= self.quorum_ratio <= 1, "quorum-ratio", self.quorum_ratio, "in [0, 1]")
        require(self.deadline_s >= 0, "deadline-s", self.deadline_s, ">= 0")
        require(
            self.quorum_ratio > 0 or self.deadline_s > 0, "quorum-ratio", self.quorum_ratio, "> 0, or a deadline-s > 0"
        )
        require(self.max_staleness != 0, "max-staleness", self.max_staleness, "> 0, or -1 for no bound")
        staleness_weight(self.staleness, 0)

    def loop_settings(self, num_clients: int) -> dict[str, Any]:
        """Rounds that do not wait for the slowest."""
        return {
            "quorum": quorum_of(self.quorum_ratio, num_clients),
            "deadline_s": self.deadline_s,
            "max_staleness": self.max_staleness,
            "staleness": self.staleness,
        }


class SemiAsync(SubModelStrategy):
    """Nobody waits for the slowest."""

    name = "semi-async"
    Config = SemiAsyncConfig
    config: SemiAsyncConfig
