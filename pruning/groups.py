"""Groups and layouts: what can be pruned, as data.

A four-channel example. The network ``conv1 -> bn1 -> relu -> conv2`` has four inner channels. They exist or vanish
together with four rows of ``conv1.weight``, four entries of every ``bn1`` tensor and four input columns of
``conv2.weight``. That is one group of four units::

    Group("inner", 4, (Axis("conv1.weight", 0), Axis("bn1.weight", 0), Axis("bn1.bias", 0),
                       Axis("bn1.running_mean", 0), Axis("bn1.running_var", 0), Axis("conv2.weight", 1)))

A client that keeps units 0 and 2 holds rows 0 and 2 of ``conv1.weight`` and columns 0 and 2 of ``conv2.weight``.
Nothing else in this project knows how a network is wired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise


class LayoutError(ValueError):
    """A layout contradicts itself or the state dict it describes."""


@dataclass(frozen=True)
class Axis:
    """One axis of one state-dict entry, seen as a row of units.

    Unit ``u`` owns positions ``offset + u * repeat`` to ``offset + (u + 1) * repeat - 1`` of axis ``dim`` of ``key``.

    Attributes
    ----------
    key : state-dict key.
    dim : axis of that tensor, counted from 0.
    repeat : positions per unit: ``head_dim`` for an attention head, ``H * W`` for a channel flattened into a linear.
    offset : first position: ``dim`` and ``2 * dim`` for K and V in a fused qkv, the start of a part in a concatenation.
    """

    key: str
    dim: int
    repeat: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Group:
    """Units that exist or vanish together.

    Attributes
    ----------
    name : stable name such as ``stage2.trunk`` or ``block3.heads``.
    size : number of units in the full model.
    axes : every place in the state dict where these units lie.
    exact : removing a unit gives the same logits as silencing it (zeroing all it owns). False for groups that are
        only ever narrowed by a merge, such as the classes of a classifier.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    exact: bool = True

    @property
    def is_read(self) -> bool:
        """Whether a layer reads the units; what goes straight into a residual stream, none does."""
        return any(axis.dim == 1 for axis in self.axes)


@dataclass(frozen=True)
class Block:
    """A stretch of the network that depth pruning drops and that a cut layer cuts after.

    Attributes
    ----------
    name : dotted path of its module, e.g. ``blocks.3``.
    prefixes : key prefixes that exist only if this block is kept; an exit head behind the block belongs to it.
    gates : prefixes of the same kind, of the gates that steer the block (``pruning.gates``); a gate is no exit head.
    """

    name: str
    prefixes: tuple[str, ...]
    gates: tuple[str, ...] = ()

    @property
    def owned(self) -> tuple[str, ...]:
        """All key prefixes that exist only if this block is kept."""
        return (*self.prefixes, *self.gates)


@dataclass(frozen=True)
class Layout:
    """All groups and blocks of one model.

    Attributes
    ----------
    groups : what width pruning removes units of.
    blocks : what depth pruning drops, first block first; empty when the model cannot be cut in depth.
    """

    groups: tuple[Group, ...]
    blocks: tuple[Block, ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash((self.groups, self.blocks))

    def __hash__(self) -> int:
        """Hashed once: layouts are the keys of every cache."""
        return self._hash

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """Groups by name."""
        return {group.name: group for group in self.groups}

    @cached_property
    def axes_of(self) -> dict[str, tuple[tuple[Group, Axis], ...]]:
        """State-dict key -> the (group, axis) pairs that lie in it."""
        found: dict[str, list[tuple[Group, Axis]]] = {}
        for group in self.groups:
            for axis in group.axes:
                found.setdefault(axis.key, []).append((group, axis))
        return {key: tuple(pairs) for key, pairs in found.items()}

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups whose units a sub-model may leave out (the exact ones)."""
        return tuple(group for group in self.groups if group.exact)

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths behind which a head stands, shallowest first: more than one in a model with exits."""
        return tuple(
            number
            for number, block in enumerate(self.blocks, start=1)
            if any(not prefix.startswith(block.name + ".") for prefix in block.prefixes)
        )

    def block_of(self, key: str) -> int | None:
        """Index of the block that owns ``key``; None for what every depth keeps."""
        for index, block in enumerate(self.blocks):
            if key.startswith(block.owned):
                return index
        return None

    def without(self, names: Sequence[str]) -> Layout:
        """The same layout with the named groups kept whole."""
        return Layout(tuple(g for g in self.groups if g.name not in set(names)), self.blocks)

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise ``LayoutError`` unless every axis lies in ``shapes`` and no position belongs to two units."""
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise LayoutError(
                f"layout: group names must differ, got {sorted(n for n in set(names) if names.count(n) > 1)} twice"
            )
        owners: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
        for group in self.groups:
            if group.size < 1 or not group.axes:
                raise LayoutError(f"group {group.name!r}: needs at least one unit and one axis")
            for axis in group.axes:
                if axis.key not in shapes:
                    raise LayoutError(f"group {group.name!r}: the state dict has no entry {axis.key!r}")
                shape = tuple(shapes[axis.key])
                stop = axis.offset + group.size * axis.repeat
                if axis.dim >= len(shape) or stop > shape[axis.dim]:
                    raise LayoutError(
                        f"group {group.name!r}: units reach position {stop} of axis {axis.dim} of {axis.key!r}, "
                        f"whose shape is {shape}"
                    )
                owners.setdefault((axis.key, axis.dim), []).append((axis.offset, stop, group.name))
        for (key, dim), spans in owners.items():
            spans.sort()
            for (_, stop, first), (start, _, second) in pairwise(spans):
                if start < stop:
                    raise LayoutError(f"axis {dim} of {key!r}: groups {first!r} and {second!r} overlap")
