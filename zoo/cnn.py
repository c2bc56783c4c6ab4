"""Two small convolutional networks: ``cnn`` (batch norm) and ``lenet`` (AdaSplit's five weight layers)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from pruning.groups import Group, Layout
from zoo.chain import BlockChain, PooledHead
from zoo.declare import batch_norm, classes, columns, declare_blocks, rows, scale_width


def cnn(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    channels: Sequence[int] = (32, 64, 128),
    width: float = 1.0,
    exits: bool = False,
) -> tuple[BlockChain, Layout]:
    """Three 3x3 convolutions with batch norm, global average pooling, linear: 94,762 parameters by default.

    All stages but the last halve the image; pooling is adaptive, so digits of 8 x 8 work as well. With exits, every
    stage has a pooled classifier behind it.
    Units: channels (``stage1``, ``stage2``, ``stage3``).
    """
    widths = [scale_width(c, width) for c in channels]
    smallest = 2 ** (len(widths) - 1)
    if not widths or image_size < smallest:
        raise ValueError(
            f"cnn: {len(widths)} stages need image-size >= {smallest} "
            f"and at least one stage, got image-size {image_size}"
        )
    blocks: list[nn.Module] = []
    before = in_channels
    for index, after in enumerate(widths):
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(before, after, 3, padding=1, bias=False), norm=nn.BatchNorm2d(after), relu=nn.ReLU()
        )
        if index < len(widths) - 1:
            layers["pool"] = nn.MaxPool2d(2)
        blocks.append(nn.Sequential(layers))
        before = after
    last = len(widths) - 1
    behind = {i: j for j, i in enumerate(range(len(widths)) if exits else [last])}
    heads = [PooledHead(widths[i], num_classes) for i in behind]
    model = BlockChain(nn.Identity(), blocks, heads, tuple(behind) if exits else ())
    groups = []
    for i, size in enumerate(widths):
        readers = [f"blocks.{i + 1}.conv"] if i < last else []
        readers += [f"heads.{behind[i]}.linear"] if i in behind else []
        axes = [axis for reader in readers for axis in columns(reader)]
        own = rows(f"blocks.{i}.conv") + batch_norm(f"blocks.{i}.norm")
        groups.append(Group(f"stage{i + 1}", size, (*own, *axes)))
    classifiers = classes(num_classes, *(f"heads.{j}.linear" for j in behind.values()))
    return model, Layout((*groups, classifiers), declare_blocks(len(widths), behind))


def lenet(num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0) -> tuple[BlockChain, Layout]:
    """The LeNet-like network of AdaSplit (arXiv 2112.01637): 20 and 50 channels (5x5), 800 and 500 neurons, classifier.

    Each weight layer but the classifier is one block, so that ``cut = k`` keeps k blocks on the client: for 32 x 32
    images 20 x 16 x 16 values a sample after the first, 800 after the third.
    Units: channels (``conv1``, ``conv2``) and neurons (``hidden1``, ``hidden2``).
    """
    if image_size < 4:
        raise ValueError(f"lenet: two poolings need image-size >= 4, got {image_size}")
    c1, c2, h1, h2 = (scale_width(units, width) for units in (20, 50, 800, 500))
    positions = (image_size // 4) ** 2

    def convolution(before: int, after: int) -> nn.Module:
        conv = nn.Conv2d(before, after, 5, padding=2)
        return nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU(), pool=nn.MaxPool2d(2)))

    blocks = [
        convolution(in_channels, c1),
        convolution(c1, c2),
        nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(c2 * positions, h1), relu=nn.ReLU())),
        nn.Sequential(OrderedDict(linear=nn.Linear(h1, h2), relu=nn.ReLU())),
    ]
    model = BlockChain(nn.Identity(), blocks, [nn.Linear(h2, num_classes)])
    groups = (
        Group("conv1", c1, rows("blocks.0.conv", bias=True) + columns("blocks.1.conv")),
        Group("conv2", c2, rows("blocks.1.conv", bias=True) + columns("blocks.2.linear", repeat=positions)),
        Group("hidden1", h1, rows("blocks.2.linear", bias=True) + columns("blocks.3.linear")),
        Group("hidden2", h2, rows("blocks.3.linear", bias=True) + columns("heads.0")),
        classes(num_classes, "heads.0"),
    )
    return model, Layout(groups, declare_blocks(len(blocks), {len(blocks) - 1: 0}))
