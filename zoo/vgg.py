"""VGG with batch norm (Simonyan and Zisserman, arXiv 1409.1556), global pooling and one linear layer for CIFAR."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pruning.groups import Group, Layout
from zoo.chain import BlockChain, PooledHead
from zoo.declare import batch_norm, classes, columns, declare_blocks, rows, scale_width

# Convolutions per stage; a 2x2 max-pooling ends every stage.
STAGES: dict[int, tuple[int, ...]] = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
CHANNELS = (64, 128, 256, 512, 512)


def vgg(
    num_classes: int, in_channels: int, image_size: int, *, num_layers: int, width: float = 1.0
) -> tuple[BlockChain, Layout]:
    """VGG-11 or VGG-16; every convolution is one block and one group (``conv1``, ``conv2``, ...)."""
    plan = [scale_width(c, width) for c, n in zip(CHANNELS, STAGES[num_layers], strict=True) for _ in range(n)]
    ends = {sum(STAGES[num_layers][: i + 1]) - 1 for i in range(len(CHANNELS))}
    blocks: list[nn.Module] = []
    before = in_channels
    for index, after in enumerate(plan):
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, norm=nn.BatchNorm2d(after), relu=nn.ReLU())
        if index in ends:
            # Rounding up changes nothing for 32 x 32 and lets images smaller than 32 through all five poolings.
            layers["pool"] = nn.MaxPool2d(2, ceil_mode=True)
        blocks.append(nn.Sequential(layers))
        before = after
    model = BlockChain(nn.Identity(), blocks, [PooledHead(before, num_classes)])
    readers = [f"blocks.{i}.conv" for i in range(1, len(plan))] + ["heads.0.linear"]
    groups = [
        Group(f"conv{i + 1}", size, rows(f"blocks.{i}.conv") + batch_norm(f"blocks.{i}.norm") + columns(readers[i]))
        for i, size in enumerate(plan)
    ]
    layout = Layout((*groups, classes(num_classes, "heads.0.linear")), declare_blocks(len(plan), {len(plan) - 1: 0}))
    return model, layout
