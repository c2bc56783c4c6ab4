"""Extraction, embedding and resizing keep what they promise, for every zoo model and any spec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.extract import StateError, embed, extract, resize, selection, shapes_of
from pruning.groups import Axis, Group, Layout, LayoutError
from pruning.prove import proof_error, prove, random_spec
from pruning.rows import gather
from pruning.spec import FULL, SpecError, SubModelSpec
from tests.pruning.conftest import randomized
from zoo import get_model

SMALL = [("mlp", 8, {}), ("cnn", 16, {}), ("lenet", 32, {}), ("resnet8", 16, {}), ("resnet18", 16, {"width": 0.125})]


def test_the_four_channel_example_cuts_rows_and_columns(four_channels):
    model, layout = four_channels
    state = model.state_dict()
    sub = extract(state, layout, SubModelSpec.of({"inner": [0, 2]}))
    assert torch.equal(sub["0.weight"], state["0.weight"][[0, 2]])
    assert torch.equal(sub["3.weight"], state["3.weight"][:, [0, 2]])
    assert torch.equal(sub["1.running_var"], state["1.running_var"][[0, 2]])
    assert torch.equal(sub["3.bias"], state["3.bias"])


def test_repeat_and_offset_address_heads_of_a_fused_qkv():
    state = {"qkv.weight": torch.arange(12.0)[:, None].repeat(1, 2)}
    axes = tuple(Axis("qkv.weight", 0, repeat=2, offset=4 * part) for part in range(3))
    sub = extract(state, Layout((Group("heads", 2, axes),)), SubModelSpec.of({"heads": [1]}))
    assert sub["qkv.weight"][:, 0].tolist() == [2, 3, 6, 7, 10, 11]


def test_where_a_spec_lies_is_worked_out_once_for_all_clients_that_hold_it(four_channels):
    model, layout = four_channels
    shapes = shapes_of(model.state_dict())
    first, second = (selection(layout, SubModelSpec.of({"inner": [0, 2]}), shapes) for _ in range(2))
    assert second is first


@pytest.mark.parametrize(("name", "size", "options"), SMALL)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_sub_model_loads_strictly_and_equals_the_silenced_full_model(name, size, options, seed):
    model, layout = get_model(name, 10, 3, size, **options)
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    spec = random_spec(layout.prunable, np.random.default_rng(seed))
    torch.manual_seed(seed)
    assert proof_error(model, layout, spec, example) is None


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_embedding_what_was_extracted_gives_back_the_original(seed):
    model, layout = get_model("resnet8", 10, 3, 16)
    state = {key: tensor.clone() for key, tensor in randomized(model, seed).state_dict().items()}
    spec = random_spec(layout.prunable, np.random.default_rng(seed))
    back, coverage = embed(extract(state, layout, spec), layout, spec, state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    put, _ = embed(extract(state, layout, spec), layout, spec, zeros)
    assert all(torch.equal(put[key][~coverage[key]], zeros[key][~coverage[key]]) for key in state)
    assert all(torch.equal(put[key][coverage[key]], state[key][coverage[key]]) for key in state)


def test_depth_drops_whole_blocks_and_nothing_else():
    model, layout = get_model("resnet8", 10, 3, 16)
    spec = SubModelSpec(depth=len(layout.blocks) - 1)
    sub = extract(model.state_dict(), layout, spec)
    dropped = set(model.state_dict()) - set(sub)
    assert dropped
    assert all(key.startswith(layout.blocks[-1].prefixes) for key in dropped)


def test_resize_works_without_storage():
    with torch.device("meta"):
        model, layout = get_model("resnet8", 10, 3, 16)
    spec = random_spec(layout.prunable, np.random.default_rng(1))
    real, _ = get_model("resnet8", 10, 3, 16)
    small = resize(model, layout, spec)
    small.load_state_dict(extract(real.state_dict(), layout, spec), strict=True, assign=True)
    assert small(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_the_full_spec_returns_the_entries_themselves():
    model, layout = get_model("cnn", 10, 3, 16)
    state = model.state_dict()
    assert all(tensor.data_ptr() == state[key].data_ptr() for key, tensor in extract(state, layout, FULL).items())


@pytest.mark.parametrize(
    ("kept", "depth"),
    [({"no such group": [0]}, None), ({"inner": []}, None), ({"inner": [4]}, None), ({"inner": [-1]}, None), ({}, 1)],
)
def test_a_spec_that_does_not_fit_is_refused(four_channels, kept, depth):
    model, layout = four_channels
    with pytest.raises(SpecError):
        extract(model.state_dict(), layout, SubModelSpec.of(kept, depth))


def test_embedding_a_state_of_another_shape_is_refused(four_channels):
    model, layout = four_channels
    state = model.state_dict()
    with pytest.raises(StateError, match="shape"):
        embed(state, layout, SubModelSpec.of({"inner": [0]}), state)
    with pytest.raises(StateError, match="missing"):
        embed({}, layout, FULL, state)


def test_a_declared_layout_that_is_wrong_is_an_error_and_a_traced_one_keeps_the_group_whole(four_channels, caplog):
    model, layout = four_channels
    wrong = Layout((Group("inner", 4, layout.groups[0].axes[:-1]),))
    example = torch.randn(2, 2, 8, 8)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(LayoutError, match="inner"):
        prove(model, wrong, example, declared=True)
    assert prove(model, wrong, example, declared=False).groups == ()
    assert "inner" in caplog.text
    assert prove(model, layout, example, declared=True) == layout
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_overlapping_or_missing_axes_are_refused(four_channels):
    model, _ = four_channels
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for axes in ((Axis("nope", 0),), (Axis("0.weight", 0), Axis("0.weight", 0)), (Axis("0.weight", 0, repeat=2),)):
        with pytest.raises(LayoutError):
            Layout((Group("inner", 4, axes),)).check(shapes)


@pytest.mark.parametrize("units", [[0, 1], [0, 2]], ids=["contiguous", "scattered"])
def test_gathered_entries_pass_gradients_back_to_where_they_lie(units):
    weight = torch.randn(4, 3, 2, 2, requires_grad=True)
    gather(weight, (np.array(units), np.array([0, 2]), None, None)).sum().backward()
    expected = torch.zeros(4, 3, 2, 2)
    expected[np.ix_(units, [0, 2])] = 1
    assert torch.equal(weight.grad, expected)
