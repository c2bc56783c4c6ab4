"""Strided 1x1 convolutions of few channels, which end the process on some CPUs.

torch 2.13's oneDNN (``jit_1x1:avx2``, backward by weights) writes beyond its buffer, and sooner or later dies with a
segmentation fault, where a 1x1 convolution with stride 2 reads fewer than eight channels from a channels-last tensor.
Full networks do not do that; the shortcuts of a ResNet that was pruned to such a width do. Such a convolution reads
every second pixel and nothing else, so picking those first and convolving them with stride 1 is the same.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional

Model = TypeVar("Model", bound=nn.Module)

SAFE_CHANNELS = 8
"""A register of avx2 in float32: from here on oneDNN's kernel is right."""


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution with a stride and without padding."""

    def forward(self, input: Tensor) -> Tensor:
        """[batch, in_channels, height, width] -> [batch, out_channels, ceil(height / stride), ceil(width / stride)]."""
        if self.in_channels >= SAFE_CHANNELS or input.is_cuda:
            return super().forward(input)
        rows, columns = self.stride
        return functional.conv2d(input[..., ::rows, ::columns], self.weight, self.bias, groups=self.groups)


def protect_convolutions(model: Model) -> Model:
    """Make every such convolution of ``model`` one that may lose its channels; returns the same model."""
    for module in model.modules():
        is_pointwise = type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.padding == (0, 0)
        if is_pointwise and module.stride != (1, 1):
            module.__class__ = StridedPointwise
    return model
