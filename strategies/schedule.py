"""How much distillation counts, round by round."""

from __future__ import annotations

import math


def gaussian_ramp_up(server_round: int, num_rounds: int) -> float:
    """exp(-5 (1 - t / T)^2) with t = ``server_round - 1``, 1 from t = T = ``num_rounds`` on (Laine and Aila 2017).

    A teacher that has learned nothing yet should teach little. 0 rounds: 1 from the start.
    """
    progress = 1.0 if num_rounds == 0 else min(1.0, (server_round - 1) / num_rounds)
    return math.exp(-5 * (1 - progress) ** 2)
