"""How answers of clients that may be malicious are merged; the same option for every method."""

from __future__ import annotations

from dataclasses import dataclass

from pruning.groups import Layout
from pruning.merge import MaskedMean
from pruning.robust import CENTRES, RobustMean
from wire.flat import require
from wire.message import State


@dataclass(frozen=True)
class RobustConfig:
    """Robust merging (``pruning.robust``); off by default.

    Attributes
    ----------
    centre : ``mean``, or ``trimmed-mean`` or ``median`` over the holders of each entry, whatever weights they have.
    trim_ratio : share of an entry's holders left out at each end, in [0, 0.5), rounded up: choose it as large as the
        share of clients that may be malicious.
    clip_norm : L2 norm that an update is shortened to; 0 for no bound.
    clip_factor : the same as a multiple of the median norm of the round; 0 for no bound.
    """

    centre: str = "mean"
    trim_ratio: float = 0.2
    clip_norm: float = 0.0
    clip_factor: float = 0.0

    def __post_init__(self) -> None:
        """Check every range."""
        require(self.centre in CENTRES, "centre", self.centre, " or ".join(map(repr, CENTRES)))
        require(0 <= self.trim_ratio < 0.5, "trim-ratio", self.trim_ratio, "in [0, 0.5)")
        require(self.clip_norm >= 0, "clip-norm", self.clip_norm, ">= 0")
        require(self.clip_factor >= 0, "clip-factor", self.clip_factor, ">= 0")

    @property
    def is_plain(self) -> bool:
        """Whether answers are averaged as they are."""
        return self.centre == "mean" and not self.clip_norm and not self.clip_factor

    def make_mean(self, previous: State, layout: Layout) -> MaskedMean:
        """What a round's answers are collected in."""
        if self.is_plain:
            return MaskedMean(previous, layout)
        return RobustMean(
            previous,
            layout,
            centre=self.centre,
            trim_ratio=self.trim_ratio,
            clip_norm=self.clip_norm,
            clip_factor=self.clip_factor,
        )
