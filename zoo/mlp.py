"""Multi-layer perceptron: McMahan et al. 2017 (arXiv 1602.05629) call the default, two hidden layers of 200, "2NN"."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from pruning.groups import Group, Layout
from zoo.chain import BlockChain
from zoo.declare import classes, columns, declare_blocks, rows, scale_width


def mlp(
    num_classes: int, in_channels: int, image_size: int, *, hidden: Sequence[int] = (200, 200), width: float = 1.0
) -> tuple[BlockChain, Layout]:
    """Flatten, ``hidden`` layers with ReLU, classifier. Units: hidden neurons (``hidden0``, ``hidden1``, ...)."""
    widths = [scale_width(h, width) for h in hidden]
    if not widths:
        raise ValueError("mlp: hidden must name at least one layer width, got none, e.g. hidden=(200, 200)")
    inputs = [in_channels * image_size**2, *widths[:-1]]
    blocks = [
        nn.Sequential(OrderedDict(linear=nn.Linear(i, o), relu=nn.ReLU())) for i, o in zip(inputs, widths, strict=True)
    ]
    model = BlockChain(nn.Flatten(), blocks, [nn.Linear(widths[-1], num_classes)])
    names = [f"blocks.{i}.linear" for i in range(len(widths))] + ["heads.0"]
    groups = [
        Group(f"hidden{i}", size, rows(names[i], bias=True) + columns(names[i + 1])) for i, size in enumerate(widths)
    ]
    last = len(widths) - 1
    return model, Layout((*groups, classes(num_classes, "heads.0")), declare_blocks(len(widths), {last: 0}))
