"""Multi-layer perceptron: McMahan et al. 2017 (arXiv 1602.05629) call the default, two hidden layers of 200, "2NN"."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from pruning.groups import Group, Layout
from pruning.unit_scale import UnitScale
from zoo.chain import BlockChain
from zoo.declare import classes, columns, declare_blocks, rows, scale_width, unit_scale


def mlp(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    hidden: Sequence[int] = (200, 200),
    width: float = 1.0,
    exits: bool = False,
    scales: bool = False,
) -> tuple[BlockChain, Layout]:
    """Flatten, ``hidden`` layers with ReLU, classifier; with exits, a classifier behind every layer; with
    scales, a learnable factor for every neuron.

    Units: hidden neurons (``hidden0``, ``hidden1``, ...).
    """
    widths = [scale_width(h, width) for h in hidden]
    if not widths:
        raise ValueError("mlp: hidden must name at least one layer width, got none, e.g. hidden=(200, 200)")
    inputs = [in_channels * image_size**2, *widths[:-1]]
    blocks = []
    for num_inputs, size in zip(inputs, widths, strict=True):
        layers = OrderedDict[str, nn.Module](linear=nn.Linear(num_inputs, size), relu=nn.ReLU())
        blocks.append(nn.Sequential(layers | ({"scale": UnitScale(size)} if scales else {})))
    last = len(widths) - 1
    behind = {i: j for j, i in enumerate(range(len(widths)) if exits else [last])}
    heads = [nn.Linear(widths[i], num_classes) for i in behind]
    model = BlockChain(nn.Flatten(), blocks, heads, tuple(behind) if exits else ())
    groups = []
    for i, size in enumerate(widths):
        readers = ([f"blocks.{i + 1}.linear"] if i < last else []) + ([f"heads.{behind[i]}"] if i in behind else [])
        axes = [axis for reader in readers for axis in columns(reader)]
        own = rows(f"blocks.{i}.linear", bias=True) + (unit_scale(f"blocks.{i}") if scales else ())
        groups.append(Group(f"hidden{i}", size, (*own, *axes)))
    classifiers = classes(num_classes, *(f"heads.{j}" for j in behind.values()))
    return model, Layout((*groups, classifiers), declare_blocks(len(widths), behind))
