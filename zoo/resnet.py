"""Residual networks: CIFAR ResNet-8/20/32/56, HeteroFL's pre-activation ResNet-18, and ResNet-50.

All three share one chain and one rule for the layout. A *trunk* is the residual stream of a stage: every block of the
stage adds to it, so its channels exist in all of them or in none. An *inner* group is one convolution inside one block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.groups import Axis, Group, Layout
from zoo.chain import BlockChain, PooledHead
from zoo.declare import batch_norm, classes, columns, declare_blocks, rows, scale_width


def _conv(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)


def _projection(before: int, after: int, stride: int) -> nn.Module | None:
    if before == after and stride == 1:
        return None
    return nn.Sequential(OrderedDict(conv=_conv(before, after, 1, stride), norm=nn.BatchNorm2d(after)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each followed by batch norm (He et al., arXiv 1512.03385, option B shortcuts)."""

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = _conv(inner, after, 3), nn.BatchNorm2d(after)
        self.shortcut = _projection(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C_before, H, W] to [B, C_after, H / stride, W / stride]."""
        residual = x if self.shortcut is None else self.shortcut(x)
        x = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(x)) + residual)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions, each followed by batch norm; ``after`` is four times ``inner``."""

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = _conv(inner, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = _conv(inner, after, 1), nn.BatchNorm2d(after)
        self.shortcut = _projection(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C_before, H, W] to [B, C_after, H / stride, W / stride]."""
        residual = x if self.shortcut is None else self.shortcut(x)
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return torch.relu(self.norm3(self.conv3(x)) + residual)


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each 3x3 convolution; a 1x1 shortcut without norm reads the activation (HeteroFL)."""

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), _conv(before, inner, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), _conv(inner, after, 3)
        self.shortcut = None if before == after and stride == 1 else _conv(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C_before, H, W] to [B, C_after, H / stride, W / stride]."""
        active = torch.relu(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(torch.relu(self.norm2(self.conv1(active)))) + residual


@dataclass(frozen=True)
class Shape:
    """What distinguishes one residual network from another.

    Attributes
    ----------
    block : module class, called with (channels before, inner channels, channels after, stride).
    num_blocks : blocks per stage.
    stem : channels of the stem.
    inner : inner channels per stage.
    trunk : channels of the residual stream per stage.
    """

    block: Callable[[int, int, int, int], nn.Module]
    num_blocks: tuple[int, ...]
    stem: int
    inner: tuple[int, ...]
    trunk: tuple[int, ...]

    def scaled(self, width: float) -> Shape:
        """The same network with every width multiplied."""
        inner, trunk = (tuple(scale_width(c, width) for c in channels) for channels in (self.inner, self.trunk))
        return Shape(self.block, self.num_blocks, scale_width(self.stem, width), inner, trunk)


def cifar_resnet(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    num_layers: int,
    width: float = 1.0,
    exits: bool = False,
) -> tuple[BlockChain, Layout]:
    """ResNet-8/20/32/56 (arXiv 1512.03385, section 4.2): 16-32-64 channels, projection shortcuts with norm."""
    per_stage = (num_layers - 2) // 6
    shape = Shape(BasicBlock, (per_stage,) * 3, 16, (16, 32, 64), (16, 32, 64))
    return _build(shape.scaled(width), num_classes, in_channels, exits=exits, large_images=False)


def resnet18(
    num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0, exits: bool = False
) -> tuple[BlockChain, Layout]:
    """HeteroFL's pre-activation ResNet-18 (arXiv 2010.01264): 11,172,170 parameters for 3 x 32 x 32 and 10 classes.

    Images above 64 pixels get the strided stem and max-pooling of ImageNet networks.
    """
    shape = Shape(PreActBlock, (2, 2, 2, 2), 64, (64, 128, 256, 512), (64, 128, 256, 512))
    return _build(shape.scaled(width), num_classes, in_channels, exits=exits, large_images=image_size > 64)


def resnet50(
    num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0, exits: bool = False
) -> tuple[BlockChain, Layout]:
    """ResNet-50 (arXiv 1512.03385, stride in the 3x3 convolution); a 3x3 stem without pooling up to 64 pixels."""
    shape = Shape(Bottleneck, (3, 4, 6, 3), 64, (64, 128, 256, 512), (256, 512, 1024, 2048))
    return _build(shape.scaled(width), num_classes, in_channels, exits=exits, large_images=image_size > 64)


def _build(
    shape: Shape, num_classes: int, in_channels: int, *, exits: bool, large_images: bool
) -> tuple[BlockChain, Layout]:
    pre_activation = shape.block is PreActBlock
    kernel, stride = (7, 2) if large_images else (3, 1)
    stem: OrderedDict[str, nn.Module] = OrderedDict(conv=_conv(in_channels, shape.stem, kernel, stride))
    if not pre_activation:
        stem.update(norm=nn.BatchNorm2d(shape.stem), relu=nn.ReLU())
    if large_images:
        stem["pool"] = nn.MaxPool2d(3, 2, padding=1)

    blocks: list[nn.Module] = []
    stage_ends: list[int] = []
    before = shape.stem
    for stage, count in enumerate(shape.num_blocks):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(shape.block(before, shape.inner[stage], shape.trunk[stage], stride))
            before = shape.trunk[stage]
        stage_ends.append(len(blocks) - 1)
    headed = list(range(len(shape.trunk))) if exits else [len(shape.trunk) - 1]
    heads = [PooledHead(shape.trunk[stage], num_classes, pre_activation) for stage in headed]
    model = BlockChain(nn.Sequential(stem), blocks, heads, stage_ends if exits else ())

    heads_behind = {stage_ends[stage]: j for j, stage in enumerate(headed)}
    groups = _declare_groups(model, shape, heads_behind)
    groups.append(classes(num_classes, *(f"heads.{j}.linear" for j in range(len(heads)))))
    return model, Layout(tuple(groups), declare_blocks(len(blocks), heads_behind))


def _declare_groups(model: BlockChain, shape: Shape, heads_behind: dict[int, int]) -> list[Group]:
    """Walk the chain once; a projection shortcut ends one trunk and begins the next."""
    groups: list[Group] = []
    name, size = "stem", shape.stem
    trunk: list[Axis] = [*rows("stem.conv")]
    if hasattr(model.stem, "norm"):
        trunk += batch_norm("stem.norm")
    index = 0
    for stage, count in enumerate(shape.num_blocks):
        for position in range(count):
            block, prefix = model.blocks[index], f"blocks.{index}"
            pre_activation = isinstance(block, PreActBlock)
            if pre_activation:
                trunk += batch_norm(f"{prefix}.norm1")
            trunk += columns(f"{prefix}.conv1")
            label = f"stage{stage + 1}.block{position}.inner"
            norms = ("norm2",) if pre_activation else ("norm1", "norm2")
            inner = _inner_groups(label, prefix, shape.inner[stage], norms, bottleneck=isinstance(block, Bottleneck))
            if not any(child == "shortcut" for child, _ in block.named_children()):
                # The first block of stage 1 may add straight onto the stem, which is then that stage's trunk.
                name = f"stage{stage + 1}.trunk"
            else:
                shortcut = f"{prefix}.shortcut" if pre_activation else f"{prefix}.shortcut.conv"
                trunk += columns(shortcut)
                groups += [Group(name, size, tuple(trunk))]
                name, size = f"stage{stage + 1}.trunk", shape.trunk[stage]
                trunk = [*rows(shortcut)]
                if not pre_activation:
                    trunk += batch_norm(f"{prefix}.shortcut.norm")
            last = "3" if isinstance(block, Bottleneck) else "2"
            trunk += rows(f"{prefix}.conv{last}")
            if not pre_activation:
                trunk += batch_norm(f"{prefix}.norm{last}")
            groups += inner
            if index in heads_behind:
                head = f"heads.{heads_behind[index]}"
                trunk += (*(batch_norm(f"{head}.norm") if pre_activation else ()), *columns(f"{head}.linear"))
            index += 1
    return [*groups, Group(name, size, tuple(trunk))]


def _inner_groups(label: str, prefix: str, size: int, norms: tuple[str, ...], *, bottleneck: bool) -> list[Group]:
    first = Group(
        f"{label}1" if bottleneck else label,
        size,
        rows(f"{prefix}.conv1") + batch_norm(f"{prefix}.{norms[0]}") + columns(f"{prefix}.conv2"),
    )
    if not bottleneck:
        return [first]
    second = rows(f"{prefix}.conv2") + batch_norm(f"{prefix}.{norms[1]}") + columns(f"{prefix}.conv3")
    return [first, Group(f"{label}2", size, second)]
