"""Which units: widths under a retention ratio, and the units that fill them.

Two questions, kept apart. *How many* units of each group: ``equal_widths`` cuts every group by the same fraction.
*Which ones*: the first (``select_prefix``), a window that wanders (``select_window``), the best (``select_top``) or
any (``select_random``). ``NestedFamily`` answers both at once for a frozen global order, as AdaptCL needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pruning.cost import CostModel
from pruning.groups import Layout
from pruning.spec import SubModelSpec

WIDE_LAYER = 16
"""Layers of at least this many units have their widths rounded; narrow ones would lose too much."""


class RetentionError(ValueError):
    """A retention ratio is outside (0, 1]."""


def equal_widths(
    layout: Layout,
    cost: CostModel,
    retention_ratio: float,
    measure: str = "width",
    round_to: int = 1,
    depth: int | None = None,
) -> dict[str, int]:
    """Cut all groups by the same fraction.

    Parameters
    ----------
    retention_ratio : share to keep, in (0, 1].
    measure : of what: ``width`` (every group keeps ``ceil(ratio * size)`` units, HeteroFL's rule), or a quantity of the
        cost model (``parameters``, ``prunable``, ``macs``, ``bytes``): then the widest cut that does not exceed it.
    round_to : wide groups keep a multiple of this.
    depth : blocks that are kept; the quantity is still a share of the whole model's.

    Returns
    -------
    dict
        Group name -> kept units, for every group a sub-model may narrow.

    Raises
    ------
    RetentionError
        If ``retention_ratio`` is outside (0, 1].
    """
    if not 0 < retention_ratio <= 1:
        raise RetentionError(f"retention ratio must be in (0, 1], got {retention_ratio}")
    sizes = np.array([group.size for group in layout.groups])
    is_exact = np.array([group.exact for group in layout.groups])
    fractions = np.array([retention_ratio]) if measure == "width" else np.linspace(0, 1, 1025)[1:]
    widths = _widths_at(fractions[:, None], sizes, is_exact, round_to)
    row = 0
    if measure != "width":
        prices, whole = cost.price(measure, widths, depth), cost.price(measure, widths[-1:])[0]
        row = max(0, int(np.searchsorted(prices, retention_ratio * whole * (1 + 1e-9), side="right")) - 1)
    return {g.name: int(widths[row, i]) for i, g in enumerate(layout.groups) if g.exact}


def _widths_at(fractions: np.ndarray, sizes: np.ndarray, is_exact: np.ndarray, round_to: int) -> np.ndarray:
    """Widths [num_fractions, num_groups] when every exact group keeps ``ceil(fraction * size)`` units."""
    widths = np.clip(np.ceil(fractions * sizes - 1e-9), 1, sizes)
    return np.where(is_exact, round_widths(widths, sizes, round_to), sizes).astype(np.int64)


def round_widths(widths: np.ndarray, sizes: np.ndarray, round_to: int) -> np.ndarray:
    """Round the widths of wide groups up to a multiple of ``round_to``, within the group."""
    if round_to <= 1:
        return widths
    return np.where(sizes >= WIDE_LAYER, np.minimum(np.ceil(widths / round_to) * round_to, sizes), widths)


def select_prefix(layout: Layout, widths: Mapping[str, int]) -> SubModelSpec:
    """Keep the first units of every group (HeteroFL, FjORD)."""
    return _spec(layout, widths, {name: range(width) for name, width in widths.items()})


def select_window(layout: Layout, widths: Mapping[str, int], starts: Mapping[str, int]) -> SubModelSpec:
    """Keep a window of every group that starts at unit ``starts[group]`` and wraps around (see ``pruning.rolling``)."""
    kept = {}
    for name, width in widths.items():
        size = layout.by_name[name].size
        kept[name] = [(starts[name] + i) % size for i in range(width)]
    return _spec(layout, widths, kept)


def select_top(layout: Layout, widths: Mapping[str, int], scores: Mapping[str, np.ndarray]) -> SubModelSpec:
    """Keep the best units of every group; ties go to the lower index. Scores are float [size] per group."""
    kept = {name: np.argsort(-scores[name], kind="stable")[:width] for name, width in widths.items()}
    return _spec(layout, widths, kept)


def select_random(layout: Layout, widths: Mapping[str, int], rng: np.random.Generator) -> SubModelSpec:
    """Keep units drawn uniformly without replacement."""
    kept = {name: rng.permutation(layout.by_name[name].size)[:width] for name, width in widths.items()}
    return _spec(layout, widths, kept)


def _spec(layout: Layout, widths: Mapping[str, int], kept: Mapping[str, Sequence[int] | np.ndarray]) -> SubModelSpec:
    return SubModelSpec.of({name: units for name, units in kept.items() if widths[name] < layout.by_name[name].size})


@dataclass(frozen=True)
class NestedFamily:
    """Sub-models of one frozen order: a smaller one is a subset of every larger one.

    Attributes
    ----------
    layout : of the full model.
    order : group name -> its units, most important first.
    widths : int [num_members, num_groups], never decreasing from member to member, the full model last.
    retention : float [num_members], share of the prunable parameters that each member keeps.
    """

    layout: Layout
    order: Mapping[str, tuple[int, ...]]
    widths: np.ndarray
    retention: np.ndarray

    def achievable(self, retention_ratio: float, floor: float = 0.0) -> float:
        """Ratio of the largest member within ``retention_ratio``, but of one that keeps at least ``floor``."""
        least = int(np.searchsorted(self.retention, floor - 1e-9))
        row = max(least, int(np.searchsorted(self.retention, retention_ratio + 1e-9)) - 1)
        return float(self.retention[min(row, len(self.retention) - 1)])

    def member(self, retention_ratio: float) -> SubModelSpec:
        """The smallest member that keeps at least ``retention_ratio`` of the prunable parameters."""
        if not 0 < retention_ratio <= 1:
            raise RetentionError(f"retention ratio must be in (0, 1], got {retention_ratio}")
        row = min(int(np.searchsorted(self.retention, retention_ratio - 1e-9)), len(self.retention) - 1)
        if row not in self._members:
            self._members[row] = self._build(row)
        return self._members[row]

    @cached_property
    def _members(self) -> dict[int, SubModelSpec]:
        """Members asked for so far: a thousand clients share the few hundred that there are."""
        return {}

    @cached_property
    def _units(self) -> tuple[list[tuple[str, int]], np.ndarray, np.ndarray]:
        """Groups by name with their columns of ``widths``; then, over all their units, the rank and the index."""
        groups = sorted((g.name, i) for i, g in enumerate(self.layout.groups) if g.exact)
        ranks = np.concatenate([np.argsort(self.order[name]) for name, _ in groups])
        # Python integers made once: a spec holds thousands, and members hold the same ones.
        numbers = np.arange(max(len(self.order[name]) for name, _ in groups)).astype(object)
        return groups, ranks, np.concatenate([numbers[: len(self.order[name])] for name, _ in groups])

    def _build(self, row: int) -> SubModelSpec:
        groups, ranks, units = self._units
        widths = self.widths[row, [column for _, column in groups]]
        sizes = [len(self.order[name]) for name, _ in groups]
        kept = iter(np.split(units[ranks < np.repeat(widths, sizes)], np.cumsum(widths)[:-1]))
        named = [(name, tuple(next(kept).tolist()), size) for (name, _), size in zip(groups, sizes, strict=True)]
        return SubModelSpec(tuple((name, mine) for name, mine, size in named if len(mine) < size))


def nested_family(
    layout: Layout,
    cost: CostModel,
    scores: Mapping[str, np.ndarray],
    scope: str = "bounded",
    layer_bound: float = 0.5,
    round_to: int = 1,
) -> NestedFamily:
    """Rank all units once and tabulate every sub-model that a prefix of the ranking gives.

    Parameters
    ----------
    scores : group name -> importance, float [size], comparable between groups.
    scope : ``global`` (one ranking over all groups), ``per-layer`` (every group keeps the same fraction of its own best
        units) or ``bounded`` (the global ranking, but each group keeps between ``layer_bound`` and ``1 / layer_bound``
        times the fraction that an equal cut with as many parameters keeps).
    layer_bound : in (0, 1].
    round_to : wide groups keep a multiple of this.
    """
    sizes = np.array([group.size for group in layout.groups])
    is_exact = np.array([group.exact for group in layout.groups])
    order = {
        g.name: tuple(int(u) for u in np.argsort(-np.asarray(scores[g.name]), kind="stable")) for g in layout.prunable
    }
    fractions = np.linspace(0, 1, 1025)[1:, None]
    equal = np.where(is_exact, np.maximum(1.0, fractions * sizes), sizes)
    if scope == "per-layer":
        raw = equal
    else:
        raw = _global_prefixes(layout, scores)
        if scope == "bounded":
            price, equal_price = cost.price("prunable", raw), cost.price("prunable", equal)
            share = np.interp(price, equal_price, fractions[:, 0])[:, None]
            raw = np.clip(raw, layer_bound * share * sizes, share / layer_bound * sizes)
    widths = np.clip(np.ceil(raw - 1e-9), 1, sizes)
    widths = np.where(is_exact, round_widths(widths, sizes, round_to), sizes).astype(np.int64)
    widths = np.maximum.accumulate(np.vstack([widths, sizes]), axis=0)
    widths = widths[np.concatenate([[True], (np.diff(widths, axis=0) > 0).any(axis=1)])]
    prices = cost.price("prunable", widths)
    return NestedFamily(layout, order, widths, prices / prices[-1])


def _global_prefixes(layout: Layout, scores: Mapping[str, np.ndarray], max_rows: int = 2048) -> np.ndarray:
    """Widths [num_rows, num_groups] of the prefixes of one global ranking; the best unit of each group comes first."""
    owner = np.concatenate([np.full(g.size, i) for i, g in enumerate(layout.groups) if g.exact])
    value = np.concatenate([np.asarray(scores[g.name], dtype=np.float64) for g in layout.groups if g.exact])
    is_best = np.concatenate([np.arange(g.size) == int(np.argmax(scores[g.name])) for g in layout.groups if g.exact])
    ranked = owner[np.lexsort((-value, ~is_best))]
    stops = np.unique(np.linspace(is_best.sum(), len(ranked), max_rows).astype(int))
    columns = [
        np.searchsorted(np.flatnonzero(ranked == i), stops) if g.exact else np.full(len(stops), g.size)
        for i, g in enumerate(layout.groups)
    ]
    return np.stack(columns, axis=1).astype(np.float64)
