"""Levels: the few sizes that a method hands out, and who gets which. Level 0 is the largest."""

from __future__ import annotations

import numpy as np

from strategies.setting import Setting
from wire.flat import require, require_choice

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


def _is_ratio(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
