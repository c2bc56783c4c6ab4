"""ResNet-18 and VGG-16 as one writes them by hand for given widths: what a resized model has to be as fast as."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-activation block of HeteroFL's ResNet-18."""

    def __init__(self, before: int, inner: int, after: int, stride: int, project: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, after, 3, 1, 1, bias=False)
        if project:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, before, H, W] to [B, after, H / stride, W / stride]."""
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class ResNet18(nn.Module):
    """Four stages of two blocks; ``widths`` are their channels, the stem's those of the first."""

    def __init__(self, widths: Sequence[int], num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            for position in range(2):
                starts = stage > 0 and position == 0
                blocks.append(Block(before, width, width, 2 if starts else 1, starts))
                before = width
        self.layers = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(before)
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 32, 32] to logits [B, num_classes]."""
        out = F.relu(self.bn(self.layers(self.conv1(x))))
        return self.linear(out.mean((2, 3)))


def vgg16(widths: Sequence[int], num_classes: int = 10) -> nn.Module:
    """VGG-16 with batch norm for 32 x 32 images; ``widths`` are the channels of its five stages."""
    layers: list[nn.Module] = []
    before = 3
    for width, count in zip(widths, (2, 2, 3, 3, 3), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, num_classes))


def resnet18(width: float) -> nn.Module:
    """ResNet-18 at a share of 64-128-256-512 channels."""
    return ResNet18([round(width * channels) for channels in (64, 128, 256, 512)])


def narrow_vgg16(width: float) -> nn.Module:
    """VGG-16 at a share of 64-128-256-512-512 channels."""
    return vgg16([round(width * channels) for channels in (64, 128, 256, 512, 512)])


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Forward, backward and update on one batch."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
