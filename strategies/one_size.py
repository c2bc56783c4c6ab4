"""One size for all: the same sub-model for every client, cut equally in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from pruning.select import equal_widths, select_prefix
from pruning.spec import SubModelSpec
from strategies.setting import Setting
from wire.flat import require, require_choice


@dataclass(frozen=True)
class OneSizeConfig:
    """Settings of methods that give everybody the same model.

    Attributes
    ----------
    retention_ratio : share of ``measure`` that everybody's model keeps, in (0, 1].
    measure : ``width``, ``prunable``, ``parameters``, ``macs`` or ``bytes``.
    round_to : wide layers keep a multiple of this.
    """

    retention_ratio: float = 1.0
    measure: str = "prunable"
    round_to: int = 8

    def __post_init__(self) -> None:
        """Check every range."""
        require(0 < self.retention_ratio <= 1, "retention-ratio", self.retention_ratio, "in (0, 1]")
        require_choice("measure", self.measure, ("width", "prunable", "parameters", "macs", "bytes"))
        require(self.round_to >= 1, "round-to", self.round_to, ">= 1")


def one_size(setting: Setting, config: OneSizeConfig) -> SubModelSpec:
    """The first units of every layer, as many as the configured share allows."""
    widths = equal_widths(setting.layout, setting.cost, config.retention_ratio, config.measure, config.round_to)
    return select_prefix(setting.layout, widths)


def one_size_family(setting: Setting, config: OneSizeConfig) -> dict[str, SubModelSpec]:
    """The model that was trained, by its share of the prunable parameters; none where it is the full one."""
    spec = one_size(setting, config)
    return {f"{setting.cost.retention_ratio(spec):.2f}": spec} if spec.kept else {}
