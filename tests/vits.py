"""A vision transformer small enough for tests: four blocks, four heads, exits at every quarter."""

from __future__ import annotations

from pruning.groups import Layout
from zoo.chain import BlockChain
from zoo.vit import vit


def small(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    exits: bool = False,
    width: float = 1.0,
    residual_outputs: bool = False,
) -> tuple[BlockChain, Layout]:
    """``model.name = tests.vits:small``."""
    return vit(
        num_classes,
        in_channels,
        image_size,
        dim=32,
        num_heads=4,
        num_blocks=4,
        grid=4,
        exits=exits,
        width=width,
        residual_outputs=residual_outputs,
    )


def writing(num_classes: int, in_channels: int, image_size: int, *, exits: bool = False) -> tuple[BlockChain, Layout]:
    """``model.name = tests.vits:writing``: the same, what its layers write into the residual stream units as well."""
    return small(num_classes, in_channels, image_size, exits=exits, residual_outputs=True)
