"""Pruned convolutional networks are those that Torch-Pruning makes for the same units."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pruning.extract import resize
from pruning.prove import random_spec
from tests.pruning.conftest import randomized
from zoo import get_model

torch_pruning = pytest.importorskip("torch_pruning")


def prune_with_torch_pruning(model, layout, spec, example):
    """Remove the units that ``spec`` leaves out, group by group, from the first weight that has them as rows."""
    pruned = copy.deepcopy(model)
    for name, kept in spec.kept:
        group = layout.by_name[name]
        removed = sorted(set(range(group.size)) - set(kept))
        if not removed:
            continue
        axis = next(
            a for a in group.axes if a.dim == 0 and a.key.endswith("weight") and model.state_dict()[a.key].dim() > 1
        )
        module = pruned.get_submodule(axis.key.removesuffix(".weight"))
        is_linear = isinstance(module, nn.Linear)
        prune = torch_pruning.prune_linear_out_channels if is_linear else torch_pruning.prune_conv_out_channels
        # The graph is traced anew: indices refer to what the module is by now, and groups do not share units.
        graph = torch_pruning.DependencyGraph().build_dependency(pruned, example_inputs=example)
        graph.get_pruning_group(module, prune, removed).prune()
    return pruned


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("mlp", 8, {}),
        ("cnn", 16, {}),
        ("lenet", 16, {}),
        ("resnet8", 16, {}),
        ("resnet18", 16, {"width": 0.125}),
        pytest.param("resnet50", 16, {"width": 0.0625}, marks=pytest.mark.slow),
        ("vgg11", 32, {"width": 0.125}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_pruned_network_is_the_one_torch_pruning_makes(name, size, options, seed):
    model, layout = get_model(name, 10, 3, size, **options)
    randomized(model, seed).eval()
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    spec = random_spec(layout.prunable, np.random.default_rng(seed))
    ours = resize(model, layout, spec).eval()
    theirs = prune_with_torch_pruning(model, layout, spec, example).eval()
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    with torch.no_grad():
        torch.testing.assert_close(ours(example), theirs(example))
