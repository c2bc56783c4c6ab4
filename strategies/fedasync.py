"""FedAsync (Xie, Koyejo, Gupta 2019, arXiv 1903.03934): every answer is mixed in as it comes, the less the older it is.

With tau the version that a client started from and t the present one (algorithm 1)::

    alpha_t = alpha * s(t - tau)
    theta_t = (1 - alpha_t) theta_{t-1} + alpha_t theta_new

and s constant, polynomial (a) or hinge (a, b) (section 5.2). Clients minimise ``F(x) + rho / 2 ||x - x_tau||^2``. As a
loop, ``loop.preset=fedasync`` gives the server's rule to any method that says what is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strategies.base import SubModelStrategy
from strategies.loop import staleness_weight
from strategies.setting import Order
from wire.flat import require


@dataclass(frozen=True)
class FedAsyncConfig:
    """Settings of FedAsync.

    Attributes
    ----------
    mixing_rate : alpha, in (0, 1].
    mu : rho of the clients' proximal term, >= 0.
    staleness : s: ``constant``, ``polynomial:A`` or ``hinge:A:B``; the paper has A = 0.5, and A = 10 with B = 4.
    max_staleness : older answers are dropped; -1 for no bound.
    """

    mixing_rate: float = 0.6
    mu: float = 0.005
    staleness: str = "polynomial:0.5"
    max_staleness: int = -1

    def __post_init__(self) -> None:
        """Check every range."""
        require(0 < self.mixing_rate <= 1, "mixing-rate", self.mixing_rate, "in (0, 1]")
        require(self.mu >= 0, "mu", self.mu, ">= 0")
        staleness_weight(self.staleness, 0)

    def loop_settings(self, num_clients: int) -> dict[str, Any]:
        """One answer a merge, as values; its age scales the mixing rate."""
        return {
            "quorum": 1,
            "max_staleness": self.max_staleness,
            "staleness": self.staleness,
            "staleness_scales": "step",
            "merge_as": "values",
            "mixing_rate": self.mixing_rate,
        }


class FedAsync(SubModelStrategy):
    """Nobody waits for anybody."""

    name = "fedasync"
    Config = FedAsyncConfig
    config: FedAsyncConfig

    def plan(self, server_round: int, clients: Sequence[int]) -> dict[int, Order]:
        """Everybody trains the full model, not too far from where it started."""
        return dict.fromkeys(clients, Order(objective="cross-entropy+proximal", settings={"mu": self.config.mu}))
