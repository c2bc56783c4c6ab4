"""Importance scores against plain formulas, and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.groups import Axis, Group, Layout
from pruning.importance import ImportanceError, score_units
from tests.pruning.conftest import randomized
from zoo import get_model


def test_bn_scale_is_the_mean_absolute_scale_of_the_unit(four_channels):
    model, layout = four_channels
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.0, 1.0]))
    score = score_units(model.state_dict(), layout, "bn-scale", normalize=False)["inner"]
    assert score.tolist() == [0.5, 2.0, 0.0, 1.0]


def test_norms_cover_all_weights_of_a_unit_and_no_running_statistics(four_channels):
    model, layout = four_channels
    rows = model[0].weight.detach().double().flatten(1)
    columns = model[3].weight.detach().double().transpose(0, 1).flatten(1)
    scale, shift = model[1].weight.detach().double(), model[1].bias.detach().double()
    l1 = rows.abs().sum(1) + columns.abs().sum(1) + scale.abs() + shift.abs()
    l2 = (rows.square().sum(1) + columns.square().sum(1) + scale**2 + shift**2).sqrt()
    for method, expected in (("l1", l1), ("l2", l2)):
        score = score_units(model.state_dict(), layout, method, normalize=False)["inner"]
        np.testing.assert_allclose(score, expected.numpy(), rtol=1e-6)


def test_taylor_is_the_sum_of_gradient_times_weight(four_channels):
    model, layout = four_channels
    model.train()(torch.randn(3, 2, 8, 8)).square().mean().backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    weights = {key: p.detach() for key, p in model.named_parameters()}
    score = score_units(model.state_dict(), layout, "taylor", gradients, normalize=False)["inner"]
    for unit in range(4):
        expected = sum(
            float((gradients[key].select(dim, unit) * weights[key].select(dim, unit)).abs().sum())
            for key, dim in (("0.weight", 0), ("1.weight", 0), ("1.bias", 0), ("3.weight", 1))
        )
        assert score[unit] == pytest.approx(expected, rel=1e-5)


def test_a_group_without_batch_norm_falls_back_to_its_l2_norm():
    model, layout = get_model("lenet", 10, 3, 32)
    state = randomized(model).state_dict()
    one, other = score_units(state, layout, "bn-scale"), score_units(state, layout, "l2")
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["mlp", "vit_micro"])
def test_heads_and_neurons_with_scales_of_their_own_are_ranked_by_them(name):
    model, layout = get_model(name, 10, 1, 8, scales=True)
    state = randomized(model).state_dict()
    scores = score_units(state, layout, "bn-scale", normalize=False)
    keys = {g.name: next(a.key for a in g.axes if a.key.endswith(".scale.weight")) for g in layout.prunable}
    assert len(set(keys.values())) == len(keys) > 1
    for group, key in keys.items():
        np.testing.assert_allclose(scores[group], state[key].abs().double().numpy())


def test_units_of_several_positions_count_all_of_them():
    state = {"qkv.weight": torch.tensor([1.0, 2, 3, 4, 10, 20, 30, 40])[:, None]}
    axes = (Axis("qkv.weight", 0, repeat=2, offset=0), Axis("qkv.weight", 0, repeat=2, offset=4))
    layout = Layout((Group("heads", 2, axes),))
    assert score_units(state, layout, "l1", normalize=False)["heads"].tolist() == [33.0, 77.0]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), factor=st.floats(0.01, 100), method=st.sampled_from(["bn-scale", "l1", "l2"]))
def test_normalised_scores_have_mean_one_and_ignore_a_common_factor(seed, factor, method):
    model, layout = get_model("resnet8", 10, 3, 16)
    state = randomized(model, seed).state_dict()
    scaled = {k: t * factor if t.is_floating_point() else t for k, t in state.items()}
    one, other = score_units(state, layout, method), score_units(scaled, layout, method)
    for group in layout.prunable:
        assert one[group.name].shape == (group.size,)
        assert one[group.name].mean() == pytest.approx(1)
        np.testing.assert_allclose(one[group.name], other[group.name], rtol=1e-4)


def test_only_groups_that_may_be_narrowed_are_scored():
    model, layout = get_model("cnn", 10, 3, 16)
    assert score_units(model.state_dict(), layout).keys() == {"stage1", "stage2", "stage3"}


def test_a_group_of_zeros_has_scores_of_zero(four_channels):
    model, layout = four_channels
    state = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    assert score_units(state, layout, "l2")["inner"].tolist() == [0, 0, 0, 0]


def test_an_unknown_method_and_taylor_without_gradients_are_refused(four_channels):
    model, layout = four_channels
    with pytest.raises(ImportanceError, match="bn-scale"):
        score_units(model.state_dict(), layout, "magic")
    with pytest.raises(ImportanceError, match="gradients"):
        score_units(model.state_dict(), layout, "taylor")
