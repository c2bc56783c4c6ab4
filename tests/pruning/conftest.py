"""Small models for the tests of pruning."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pruning.groups import Axis, Group, Layout
from pruning.prove import random_spec
from pruning.spec import SubModelSpec


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every entry, BatchNorm's included, a generic value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.8 + 0.1)
    return model


@pytest.fixture
def four_channels() -> tuple[nn.Module, Layout]:
    """The example of pruning/groups.py: conv - bn - relu - conv with four inner channels."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
    keys = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
    axes = (Axis("0.weight", 0), *(Axis(key, 0) for key in keys), Axis("3.weight", 1))
    return randomized(model), Layout((Group("inner", 4, axes),))


@pytest.fixture
def draw_spec() -> Callable[[Layout, int], SubModelSpec]:
    """Random sub-model of a layout by seed."""
    return lambda layout, seed: random_spec(layout.prunable, np.random.default_rng(seed))


def states_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
