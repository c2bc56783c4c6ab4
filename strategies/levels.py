"""Levels: the few sizes that a method hands out, and who gets which. Level 0 is the largest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pruning.select import equal_widths, select_prefix
from pruning.spec import SubModelSpec
from strategies.setting import Order, Setting
from wire.flat import refuse, require, require_choice

ASSIGNMENTS = ("capability", "cycle", "dynamic")


def check_levels(key: str, ratios: str, assignment: str) -> None:
    """Raise ``ConfigError`` unless ``ratios`` are retention ratios and ``assignment`` is known."""
    is_good = all(_is_ratio(part) for part in ratios.split(","))
    require(is_good, key, ratios, "retention ratios in (0, 1], comma-separated")
    require_choice("assignment", assignment, ASSIGNMENTS)


def read_ratios(ratios: str) -> list[float]:
    """``"0.25,1,0.5"`` -> [1.0, 0.5, 0.25]: the widest first, whatever the order."""
    return sorted((float(part) for part in ratios.split(",")), reverse=True)


def level_of(setting: Setting, assignment: str, num_levels: int, partition_id: int, server_round: int) -> int:
    """The level of one client in one round, 0 to ``num_levels - 1``.

    Parameters
    ----------
    assignment : ``capability`` (equal parts of the clients per level, faster devices the larger ones), ``cycle``
        (client i gets level i mod levels; also where nobody knows the devices) or ``dynamic`` (drawn anew each round).
    """
    if assignment == "dynamic":
        rng = np.random.default_rng((setting.job.seed, server_round, partition_id))
        return int(rng.choice(num_levels))
    if assignment == "cycle" or setting.durations is None:
        return partition_id % num_levels
    return setting.durations.fleet.speed_ranks[partition_id] * num_levels // setting.job.num_clients


@dataclass(frozen=True)
class LevelsConfig:
    """Settings of methods for full models, which may train on HeteroFL's width levels instead.

    Attributes
    ----------
    rates : the levels' retention ratios by width, comma-separated; 1 gives everybody the full model.
    assignment : of the levels to the clients: ``capability``, ``cycle`` or ``dynamic`` (see ``level_of``).
    """

    rates: str = "1"
    assignment: str = "capability"

    def __post_init__(self) -> None:
        """Check every range."""
        check_levels("rates", self.rates, self.assignment)


def prefix_levels(setting: Setting, rates: str) -> list[SubModelSpec]:
    """The first units of every layer, as many as each ratio asks for; the widest level first."""
    return [
        select_prefix(setting.layout, equal_widths(setting.layout, setting.cost, ratio, "width"))
        for ratio in read_ratios(rates)
    ]


def prefix_of(setting: Setting, rates: str, assignment: str, partition_id: int, server_round: int) -> SubModelSpec:
    """The level of one client in one round, as the first units of every layer."""
    levels = prefix_levels(setting, rates)
    return levels[level_of(setting, assignment, len(levels), partition_id, server_round)]


def prefix_family(setting: Setting, rates: str) -> dict[str, SubModelSpec]:
    """Every level below the full model, by the name that evaluations show."""
    levels = zip(read_ratios(rates), prefix_levels(setting, rates), strict=True)
    return {f"{ratio:g}": spec for ratio, spec in levels if ratio < 1}


@dataclass(frozen=True)
class ProximalConfig(LevelsConfig):
    """Settings of methods with a proximal term.

    Attributes
    ----------
    mu : weight of the term, >= 0.
    partial_work : every device trains only as much as it can in the time in which the fastest is done.
    """

    mu: float = 0.0
    partial_work: bool = False

    def __post_init__(self) -> None:
        """Check every range."""
        super().__post_init__()
        require(self.mu >= 0, "mu", self.mu, ">= 0")


def proximal_order(setting: Setting, config: ProximalConfig, partition_id: int, server_round: int) -> Order:
    """What a client is asked for under these settings; mu = 0 is plain training."""
    spec = prefix_of(setting, config.rates, config.assignment, partition_id, server_round)
    work_ratio = 1.0
    if config.partial_work and setting.durations is not None:
        speeds = [device.train_flops for device in setting.durations.fleet.devices]
        work_ratio = speeds[partition_id] / max(speeds)
    return Order(spec, "cross-entropy+proximal", {"mu": config.mu}, work_ratio=work_ratio)


def check_partial_work(name: str, setting: Setting, config: ProximalConfig) -> None:
    """Raise ``ConfigError`` where devices are to work as much as they can, and nobody knows how much that is."""
    refuse(
        config.partial_work and setting.durations is None,
        f"{name}.partial-work=true with fleet.name=none",
        "nobody knows the devices' speeds here; bound the time with loop.deadline-s instead",
    )


def _is_ratio(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
