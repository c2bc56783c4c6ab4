"""What every zoo model promises, one table: models x properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pruning.cost import measure_costs
from pruning.extract import extract, resize
from pruning.groups import Layout
from pruning.prove import prove, random_spec
from pruning.spec import SubModelSpec
from zoo import get_model, model_names

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (24, 12)},
    "cnn": {"width": 0.5},
    "lenet": {"width": 0.2},
    "resnet8": {},
    "resnet20": {},
    "resnet18": {"width": 0.125},
    "resnet50": {"width": 0.125},
    "vgg11": {"width": 0.125},
    "vgg16": {"width": 0.125},
    "mobilenet_v2": {"width": 0.25},
    "vit_micro": {},
    "vit_tiny": {},
}
TOO_LARGE_OR_ALIKE = {"resnet32", "resnet56", "vit_86m", "vit_115m"}
"""The same builders as a model of the table, with more blocks."""

every_model = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[nn.Module, Layout]]:
    """Every model of the table, built once."""
    return {name: get_model(name, 10, 3, 32, **options) for name, options in SMALL.items()}


def test_the_table_names_every_zoo_model():
    assert set(model_names()) == SMALL.keys() | TOO_LARGE_OR_ALIKE


@every_model
def test_its_layout_is_proved(name, models):
    model, layout = models[name]
    assert prove(model, layout, torch.randn(2, 3, 32, 32), declared=True, trials=1) == layout


@every_model
def test_random_sub_models_load_strictly_train_and_cost_what_the_cost_model_says(name, models):
    model, layout = models[name]
    cost = measure_costs(model, layout, torch.zeros(2, 3, 32, 32))
    rng = np.random.default_rng(0)
    for depth in [None, *range(1, min(2, len(layout.blocks)))]:
        spec = SubModelSpec(random_spec(layout.prunable, rng).kept, depth)
        small = resize(model, layout, spec)
        state = extract(model.state_dict(), layout, spec)
        small.load_state_dict(state, strict=True)
        assert cost.of(spec).parameters == sum(p.numel() for p in small.parameters())
        assert cost.of(spec).bytes == sum(t.numel() * t.element_size() for t in state.values())
        if depth is None:
            assert (
                measure_costs(small, Layout(()), torch.zeros(2, 3, 32, 32)).of(SubModelSpec()).macs
                == cost.of(spec).macs
            )
            small.train()(torch.randn(2, 3, 32, 32)).sum().backward()
            assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@every_model
def test_it_can_be_built_without_storage(name):
    with torch.device("meta"):
        model, layout = get_model(name, 10, 3, 32, **SMALL[name])
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert layout == get_model(name, 10, 3, 32, **SMALL[name])[1]
