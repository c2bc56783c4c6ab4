"""Words for declaring a layout beside its module: which axes one layer contributes to a group of units."""

from __future__ import annotations

from pruning.groups import Axis, Block, Group


def scale_width(units: int, width: float) -> int:
    """``units`` times the width multiplier, rounded, at least one unit."""
    return max(1, round(units * width))


def rows(prefix: str, bias: bool = False, repeat: int = 1, offset: int = 0) -> tuple[Axis, ...]:
    """Output positions of a convolution or linear layer: rows of its weight and, if it has one, of its bias."""
    weight = Axis(f"{prefix}.weight", 0, repeat, offset)
    return (weight, Axis(f"{prefix}.bias", 0, repeat, offset)) if bias else (weight,)


def columns(prefix: str, repeat: int = 1, offset: int = 0) -> tuple[Axis, ...]:
    """Input positions of a convolution or linear layer."""
    return (Axis(f"{prefix}.weight", 1, repeat, offset),)


def batch_norm(prefix: str) -> tuple[Axis, ...]:
    """All four per-channel entries of a batch normalisation, running statistics included."""
    return tuple(Axis(f"{prefix}.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var"))


def unit_scale(prefix: str) -> tuple[Axis, ...]:
    """The factors of a ``UnitScale``."""
    return (Axis(f"{prefix}.scale.weight", 0),)


def classes(num_classes: int, *prefixes: str) -> Group:
    """Rows of the classifiers. Not exact: a class is never left out of a sub-model, only of a merge."""
    return Group("classes", num_classes, tuple(axis for p in prefixes for axis in rows(p, bias=True)), exact=False)


def declare_blocks(num_blocks: int, heads: dict[int, int]) -> tuple[Block, ...]:
    """Blocks of a ``BlockChain``; ``heads`` maps a block's index to the index of the head behind it."""
    return tuple(
        Block(f"blocks.{i}", (f"blocks.{i}.", f"heads.{heads[i]}.") if i in heads else (f"blocks.{i}.",))
        for i in range(num_blocks)
    )
