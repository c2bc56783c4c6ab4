"""FedBuff (Nguyen et al. 2022, arXiv 2106.06639): asynchronous clients, a server step whenever K answers are in.

With d_i the step that client i made from the version it started from, and tau_i the versions made since (algorithm 1)::

    theta <- theta + eta_g / K * sum_i s(tau_i) d_i,        s(tau) = 1 / sqrt(1 + tau)

The weights are not made to add up to one again: a buffer of old answers moves the model less. In a sub-model merge an
entry's K is the number of those in the buffer that hold it. ``loop.preset=fedbuff`` gives the rule to any method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strategies.base import SubModelStrategy
from strategies.loop import staleness_weight
from wire.flat import require, require_choice


@dataclass(frozen=True)
class FedBuffConfig:
    """Settings of FedBuff.

    Attributes
    ----------
    buffer : K, answers a merge.
    server_learning_rate : eta_g, > 0.
    staleness : s, as ``loop.staleness``.
    max_staleness : older answers are dropped; -1 for no bound.
    ask : ``on-arrival`` (the number of clients at work is constant, as in the paper) or ``at-merge``.
    """

    buffer: int = 10
    server_learning_rate: float = 1.0
    staleness: str = "polynomial:0.5"
    max_staleness: int = -1
    ask: str = "on-arrival"

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.buffer >= 1, "buffer", self.buffer, ">= 1")
        require(self.server_learning_rate > 0, "server-learning-rate", self.server_learning_rate, "> 0")
        require_choice("ask", self.ask, ("on-arrival", "at-merge"))
        staleness_weight(self.staleness, 0)

    def loop_settings(self, num_clients: int) -> dict[str, Any]:
        """K answers a merge, all of the same weight; each one's age scales its step."""
        return {
            "ask": self.ask,
            "quorum": self.buffer,
            "max_staleness": self.max_staleness,
            "staleness": self.staleness,
            "staleness_scales": "step",
            "client_weight": "equal",
            "mixing_rate": self.server_learning_rate,
        }


class FedBuff(SubModelStrategy):
    """A buffer between the clients and the model."""

    name = "fedbuff"
    Config = FedBuffConfig
    config: FedBuffConfig
