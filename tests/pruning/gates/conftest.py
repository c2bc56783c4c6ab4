"""Small gated networks with generic weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pruning.gates import gates_of
from pruning.groups import Layout
from zoo import get_model

SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "mlp": (8, {}),
    "cnn": (8, {}),
    "lenet": (8, {"width": 0.5}),
    "resnet8": (8, {}),
    "resnet18": (8, {"width": 0.25}),
    "resnet50": (8, {"width": 0.25}),
    "vgg11": (8, {"width": 0.25}),
    "mobilenet_v2": (8, {"width": 0.5}),
}
"""Image size and options of every family of CNNs, and of the MLP."""

QUICK = ("mlp", "cnn", "resnet8", "vgg11")
"""What the fast suite takes of them."""

MakeGated = Callable[..., tuple[nn.Module, Layout]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums do not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_gated() -> MakeGated:
    """A function (name, density, dtype) -> gated model and its layout, normalisations far from the identity."""

    def make(name: str, density: float = 0.5, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Layout]:
        torch.manual_seed(0)
        size, options = SMALL[name]
        model, layout = get_model(name, 10, 3, size, gates=True, **options)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
        gates_of(model).set_density(density)
        return model.to(dtype), layout

    return make


def images_for(name: str, num: int = 6, seed: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random images that a network of ``SMALL`` reads."""
    size = SMALL[name][0]
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
