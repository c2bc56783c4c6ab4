"""Scaling down in width and depth together under a budget (ScaleFL, Ilhan, Su, Liu, CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pruning.cost import CostModel
from pruning.groups import Layout
from pruning.select import RetentionError, equal_widths, select_prefix
from pruning.spec import SubModelSpec


def scale_down(
    layout: Layout, cost: CostModel, budget: float, measure: str, depths: Sequence[int] | None = None
) -> SubModelSpec:
    """The best-balanced sub-model within a budget: first units of every group, cut behind an exit.

    For every depth the widest equal cut within the budget is found; of these the one is taken whose smaller ratio,
    depth or width, is the largest, the deeper one among equals.

    Parameters
    ----------
    budget : share of the full model's ``measure`` that may be kept, in (0, 1].
    measure : ``parameters``, ``prunable``, ``macs`` or ``bytes``.
    depths : blocks that may be kept; by default the depths behind which exits stand.

    Raises
    ------
    RetentionError
        If even the narrowest sub-model of the least depth is above the budget.
    """
    best: tuple[float, int, SubModelSpec] | None = None
    cheapest = np.inf
    for depth in depths or layout.exits:
        widths = equal_widths(layout, cost, budget, measure, depth=depth)
        kept = select_prefix(layout, widths).kept
        spec = SubModelSpec(kept, None if depth == len(layout.blocks) else depth)
        price = cost.retention_ratio(spec, measure)
        cheapest = min(cheapest, price)
        if price > budget * (1 + 1e-9):
            continue
        width_ratio = float(np.mean([width / layout.by_name[name].size for name, width in widths.items()]))
        found = (min(depth / len(layout.blocks), width_ratio), depth, spec)
        if best is None or found[:2] > best[:2]:
            best = found
    if best is None:
        raise RetentionError(
            f"budget: no sub-model keeps at most {budget:g} of the {measure}; the smallest allowed keeps {cheapest:.3g}"
        )
    return best[2]
