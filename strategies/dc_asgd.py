"""DC-ASGD-a (Zheng et al. 2017, arXiv 1609.08326): asynchronous; a late step is corrected for what changed meanwhile.

A step d from theta_sent, merged into theta_now, becomes ``d - lambda_t * d * d * (theta_now - theta_sent)``: a first
order correction whose Hessian is approximated by the squared gradient; lambda_t adapts by a mean square
(``strategies.delay``, algorithm 2 and equation 10). theta_sent is read from disk. ``loop.preset=dc-asgd`` gives the
rule to any method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strategies.base import SubModelStrategy
from wire.flat import require


@dataclass(frozen=True)
class DCASGDConfig:
    """Settings of DC-ASGD-a.

    Attributes
    ----------
    compensation : lambda_0; 0 is plain asynchronous SGD.
    momentum : m of the mean square, in [0, 1).
    mixing_rate : share of each step that counts; 0 for one over the number of clients.
    max_staleness : older answers are dropped; -1 for no bound.
    """

    compensation: float = 2.0
    momentum: float = 0.95
    mixing_rate: float = 0.0
    max_staleness: int = -1

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.compensation >= 0, "compensation", self.compensation, ">= 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(self.mixing_rate >= 0, "mixing-rate", self.mixing_rate, ">= 0")

    def loop_settings(self, num_clients: int) -> dict[str, Any]:
        """One answer a merge, compensated."""
        return {
            "quorum": 1,
            "max_staleness": self.max_staleness,
            "mixing_rate": self.mixing_rate or 1 / num_clients,
            "compensation": self.compensation,
            "compensation_momentum": self.momentum,
        }


class DCASGD(SubModelStrategy):
    """Steps that know how late they are."""

    name = "dc-asgd"
    Config = DCASGDConfig
    config: DCASGDConfig
