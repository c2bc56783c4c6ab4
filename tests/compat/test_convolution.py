"""Strided 1x1 convolutions of few channels: the same function, and no process lost."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compat.convolution import SAFE_CHANNELS, StridedPointwise, protect_convolutions
from tests.marks import slow_but
from zoo import get_model

TRAIN_NARROW = """
import torch
from zoo import get_model
torch.set_num_threads(1)
for num_channels, images in ((4, 32), (3, 7), (7, 10)):
    model, _ = get_model("resnet8", 10, 3, 32, width=num_channels / 16)
    x = torch.randn(images, 3, 32, 32).to(memory_format=torch.channels_last)
    for _ in range(3):
        model(x).sum().backward()
print("alive")
"""


@pytest.mark.slow
def test_a_network_of_few_channels_trains_with_channels_last():
    """Without protection the process ends with SIGSEGV or a corrupted heap where oneDNN takes its avx2 kernel."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_NARROW], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr[-2000:]


@given(
    channels=st.integers(1, SAFE_CHANNELS + 1),
    out_channels=st.integers(1, 9),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)).filter(lambda stride: stride != (1, 1)),
    has_bias=st.booleans(),
)
def test_it_is_the_convolution_that_it_replaces_with_its_gradients(channels, out_channels, size, stride, has_bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, out_channels, 1, stride, bias=has_bias, dtype=torch.float64)
    images = torch.randn(2, channels, *size, dtype=torch.float64)  # in this layout and precision plain is right
    found = []
    for layer in (plain, protect_convolutions(nn.Sequential(plain))):
        x = images.clone().requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), [x, *plain.parameters()])
        found.append((y, *gradients))
    assert isinstance(plain, StridedPointwise)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(4, 8, 1, 2, 1)])
def test_other_convolutions_are_left_as_they_are(layer):
    protect_convolutions(layer)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("name", slow_but(("resnet8",), ("resnet8", "torchvision:resnet18")))
def test_every_model_by_name_is_protected(name):
    model, _ = get_model(name, 10, 3, 32)
    strided = [
        m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (2, 2)
    ]
    assert strided
    assert all(isinstance(layer, StridedPointwise) for layer in strided)
