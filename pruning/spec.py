"""Specs: which units and how many blocks one client keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pruning.groups import Layout


class SpecError(ValueError):
    """A spec names units, groups or a depth that its layout does not have."""


@dataclass(frozen=True)
class SubModelSpec:
    """One sub-model, named by what it keeps.

    Attributes
    ----------
    kept : (group name, sorted kept units) pairs in the order of names; an absent group is kept whole.
    depth : blocks kept, counted from the first; None keeps all.
    """

    kept: tuple[tuple[str, tuple[int, ...]], ...] = ()
    depth: int | None = None

    @classmethod
    def of(cls, kept: Mapping[str, Sequence[int] | np.ndarray], depth: int | None = None) -> SubModelSpec:
        """Build a spec from any mapping of group name to units, in any order."""
        return cls(tuple((name, tuple(sorted(int(u) for u in kept[name]))) for name in sorted(kept)), depth)

    @cached_property
    def units(self) -> dict[str, tuple[int, ...]]:
        """Group name -> sorted kept units; groups kept whole are absent."""
        return dict(self.kept)

    @cached_property
    def _hash(self) -> int:
        return hash((self.kept, self.depth))

    def __hash__(self) -> int:
        """Hashed once: specs are the keys of every cache, and hold thousands of units."""
        return self._hash

    def __reduce__(self) -> tuple[type[SubModelSpec], tuple[object, ...]]:
        """Travel without the cached values, which belong to one process."""
        return SubModelSpec, (self.kept, self.depth)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Group name -> sorted kept units, int64 [num_kept]."""
        return {name: np.asarray(units, dtype=np.int64) for name, units in self.kept}

    def width(self, layout: Layout, name: str) -> int:
        """Kept units of group ``name``."""
        return len(self.units[name]) if name in self.units else layout.by_name[name].size

    def check(self, layout: Layout) -> None:
        """Raise ``SpecError`` unless this spec fits ``layout``."""
        for name, units in self.kept:
            group = layout.by_name.get(name)
            if group is None:
                raise SpecError(f"spec: the layout has no group {name!r}; it has {', '.join(layout.by_name)}")
            if not units:
                raise SpecError(f"spec: group {name!r} keeps no unit; keep at least one")
            if units[0] < 0 or units[-1] >= group.size or bool((np.diff(self.arrays[name]) <= 0).any()):
                raise SpecError(f"spec: units of {name!r} must be distinct, sorted and within 0..{group.size - 1}")
        if self.depth is not None and not 1 <= self.depth <= len(layout.blocks):
            raise SpecError(f"spec: depth must be within 1..{len(layout.blocks)}, got {self.depth}")

    def is_subset_of(self, other: SubModelSpec, layout: Layout) -> bool:
        """Whether every unit and block kept here is kept by ``other`` too."""
        deepest = len(layout.blocks)
        if (deepest if self.depth is None else self.depth) > (deepest if other.depth is None else other.depth):
            return False
        for name, theirs in other.kept:
            mine = self.units.get(name, range(layout.by_name[name].size))
            if not set(mine) <= set(theirs):
                return False
        return True

    def widths(self, layout: Layout) -> dict[str, int]:
        """Kept units of every group, also of those in blocks that are not kept."""
        return {group.name: self.width(layout, group.name) for group in layout.groups}

    def held_widths(self, layout: Layout) -> dict[str, int]:
        """Units of every group that a client holds: 0 of a group that lies only in blocks that are not kept."""
        widths = self.widths(layout)
        if self.depth is not None:
            for group in layout.groups:
                blocks = (layout.block_of(axis.key) for axis in group.axes)
                if all(block is not None and block >= self.depth for block in blocks):
                    widths[group.name] = 0
        return widths


FULL = SubModelSpec()
"""The spec that keeps everything."""
