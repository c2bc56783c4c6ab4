"""MobileNetV2 (Sandler et al., arXiv 1801.04381)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from pruning.groups import Axis, Group, Layout
from zoo.chain import BlockChain, PooledHead
from zoo.declare import batch_norm, classes, columns, declare_blocks, rows, scale_width

# expansion, output channels, blocks, stride of the first block (table 2 of the paper)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM_CHANNELS, LAST_CHANNELS = 32, 1280


def _conv_norm_relu(before: int, after: int, kernel: int, stride: int = 1, depthwise: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=before if depthwise else 1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(after), relu=nn.ReLU6()))


class InvertedResidual(nn.Module):
    """1x1 expansion (none if ``inner`` is None), 3x3 depthwise, linear 1x1 projection, added to x if ``residual``."""

    def __init__(self, before: int, inner: int | None, after: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.expand = None if inner is None else _conv_norm_relu(before, inner, 1)
        inner = before if inner is None else inner
        self.depthwise = _conv_norm_relu(inner, inner, 3, stride, depthwise=True)
        self.project = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(inner, after, 1, bias=False), norm=nn.BatchNorm2d(after))
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C_before, H, W] to [B, C_after, H / stride, W / stride]."""
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


def mobilenet_v2(
    num_classes: int, in_channels: int, image_size: int, *, width: float = 1.0
) -> tuple[BlockChain, Layout]:
    """MobileNetV2; up to 64 pixels the stem and the second stage keep the resolution. Without dropout.

    Units: trunk channels (``stage2.trunk``), expanded channels (``stage2.block0.inner``), ``stem`` and ``last``.
    """
    small = image_size <= 64
    stem = scale_width(STEM_CHANNELS, width)
    groups: list[Group] = []
    trunk: list[Axis] = [*rows("stem.conv"), *batch_norm("stem.norm")]
    blocks: list[nn.Module] = []
    name, before = "stem", stem
    for stage, (expansion, channels, count, first_stride) in enumerate(STAGES, start=1):
        after = scale_width(channels, width)
        for position in range(count):
            stride = (1 if small and stage == 2 else first_stride) if position == 0 else 1
            # Scale the full model's expanded width, so that a sub-model and a narrow model agree.
            full_before = channels if position else (STAGES[stage - 2][1] if stage > 1 else STEM_CHANNELS)
            inner = None if expansion == 1 else scale_width(expansion * full_before, width)
            prefix, residual = f"blocks.{len(blocks)}", position > 0
            blocks.append(InvertedResidual(before, inner, after, stride, residual))
            depthwise = rows(f"{prefix}.depthwise.conv") + batch_norm(f"{prefix}.depthwise.norm")
            if inner is None:
                trunk += depthwise + columns(f"{prefix}.project.conv")
            else:
                trunk += columns(f"{prefix}.expand.conv")
            written = rows(f"{prefix}.project.conv") + batch_norm(f"{prefix}.project.norm")
            if residual:
                trunk += written
            else:
                groups.append(Group(name, before, tuple(trunk)))
                name, trunk = f"stage{stage}.trunk", [*written]
            if inner is not None:
                expand = rows(f"{prefix}.expand.conv") + batch_norm(f"{prefix}.expand.norm")
                axes = expand + depthwise + columns(f"{prefix}.project.conv")
                groups.append(Group(f"stage{stage}.block{position}.inner", inner, axes))
            before = after
    last = scale_width(LAST_CHANNELS, width)
    prefix = f"blocks.{len(blocks)}"
    blocks.append(_conv_norm_relu(before, last, 1))
    groups.append(Group(name, before, (*trunk, *columns(f"{prefix}.conv"))))
    axes = rows(f"{prefix}.conv") + batch_norm(f"{prefix}.norm") + columns("heads.0.linear")
    groups += [Group("last", last, axes), classes(num_classes, "heads.0.linear")]
    model = BlockChain(
        _conv_norm_relu(in_channels, stem, 3, 1 if small else 2), blocks, [PooledHead(last, num_classes)]
    )
    return model, Layout(tuple(groups), declare_blocks(len(blocks), {len(blocks) - 1: 0}))
