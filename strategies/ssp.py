"""SSP, stale synchronous parallel (Ho et al. 2013, NIPS): everybody at their own pace, but at most s clocks apart.

A client's clock counts its answers. Each answer is added to the model as it comes, ``theta <- theta + d_i / N``, and a
client may begin its next round while its clock is at most s ahead of the slowest one's (section 2). With s = 0 this is
a synchronous round of equal weights, added up one by one. ``loop.preset=ssp`` gives the rule to any method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strategies.base import SubModelStrategy
from wire.flat import require


@dataclass(frozen=True)
class SSPConfig:
    """Settings of SSP.

    Attributes
    ----------
    max_lead : s, clocks that a client may be ahead of the slowest.
    mixing_rate : share of each step that counts; 0 for one over the number of clients.
    """

    max_lead: int = 3
    mixing_rate: float = 0.0

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.max_lead >= 0, "max-lead", self.max_lead, ">= 0")
        require(self.mixing_rate >= 0, "mixing-rate", self.mixing_rate, ">= 0")

    def loop_settings(self, num_clients: int) -> dict[str, Any]:
        """One answer a merge; the bound on leads is the only bound on staleness."""
        return {
            "max_lead": self.max_lead,
            "quorum": 1,
            "max_staleness": -1,
            "mixing_rate": self.mixing_rate or 1 / num_clients,
        }


class SSP(SubModelStrategy):
    """A barrier with slack."""

    name = "ssp"
    Config = SSPConfig
    config: SSPConfig
