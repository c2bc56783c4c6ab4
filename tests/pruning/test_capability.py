"""Budgets become a depth and a width, and nothing that would not fit."""

from __future__ import annotations

from collections import OrderedDict
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruning.capability import (
    Capability,
    CapabilityError,
    Training,
    exit_depths,
    groups_within,
    inner_groups,
    peak_memory_bytes,
    solve_memory,
    solve_rate,
    sub_model_at,
    widths_at,
)
from pruning.cost import CostModel, measure_costs
from pruning.groups import Axis, Group, Layout
from tests.marks import slow_but
from tests.vits import small
from zoo import get_model

TRAINING = Training(batch_size=16, optimizer_slots=1, learns_masks=True)


def costs(model: nn.Module, layout: Layout, channels: int = 3) -> CostModel:
    return measure_costs(model, layout, torch.zeros(2, channels, 32, 32))


@pytest.fixture(scope="module")
def vit() -> tuple[Layout, CostModel, tuple[Group, ...]]:
    model, layout = small(10, 3, 32, exits=True)
    cost = costs(model, layout)
    return layout, cost, inner_groups(layout, cost.shapes)


@pytest.mark.parametrize(
    ("name", "options", "depths"),
    [
        ("vit_micro", {"exits": True}, (2, 4, 6, 8)),
        ("vit_micro", {}, (1, 2, 3, 4, 5, 6, 7, 8)),
        ("resnet20", {"exits": True}, (3, 6, 9)),
        ("resnet20", {}, (9,)),
        ("mlp", {}, (2,)),
    ],
)
def test_depths_end_where_a_head_stands(name, options, depths):
    assert exit_depths(get_model(name, 10, 3, 32, **options)[1]) == depths


@pytest.mark.parametrize(
    ("name", "kept_whole"),
    [
        ("resnet8", {"stage1.trunk", "stage2.trunk", "stage3.trunk"}),
        ("resnet18", {f"stage{n}.trunk" for n in (1, 2, 3, 4)}),
        ("vit_micro", set()),
        ("mlp", set()),
        ("cnn", set()),
    ],
)
def test_what_is_narrowed_touches_no_residual_stream(name, kept_whole):
    model, layout = get_model(name, 10, 3, 32)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    inner = {group.name for group in inner_groups(layout, shapes)}
    assert {group.name for group in layout.prunable} - inner == kept_whole


@given(rate=st.floats(0.001, 1), size=st.integers(1, 4000))
def test_the_kept_share_of_a_group_is_the_rate_to_one_unit_and_never_nothing(rate, size):
    width = widths_at([Group("g", size, (Axis("w", 0),))], rate)["g"]
    assert 1 <= width <= size
    assert abs(width - rate * size) <= 0.5 or width == 1


@pytest.mark.parametrize(("rate", "depth"), [(1, 4), (0.99, 3), (0.75, 3), (0.5, 2), (0.3, 1), (0.25, 1), (0.1, 1)])
def test_the_papers_preset_keeps_the_first_floor_of_rate_times_blocks_but_one_exit_at_least(vit, rate, depth):
    assert solve_rate(vit[0], rate) == Capability(depth, rate, rate)
    assert solve_rate(vit[0], rate).rate == pytest.approx(rate)


@pytest.mark.parametrize("rate", [0, -0.5, 1.01, float("nan")])
def test_a_rate_outside_zero_to_one_is_refused(vit, rate):
    with pytest.raises(CapabilityError, match=r"a rate must be in \(0, 1\]"):
        solve_rate(vit[0], rate)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(share=st.floats(0.2, 1.2), preset=st.sampled_from(["fit", "paper"]), learns=st.booleans())
def test_what_is_solved_fits_and_a_step_more_would_not(vit, share, preset, learns):
    layout, cost, groups = vit
    training = Training(16, 1, learns)
    budget = share * peak_memory_bytes(layout, cost, groups, 4, 1.0, training)
    try:
        found = solve_memory(layout, cost, groups, budget, training, preset=preset)
    except CapabilityError:
        least = peak_memory_bytes(layout, cost, groups, 1, 0.25 if preset == "fit" else 1 / 256, training)
        assert least > budget
        return
    assert peak_memory_bytes(layout, cost, groups, found.depth, found.width_rate, training) <= budget
    if preset == "fit" and found.width_rate < 1:
        wider = found.width_rate + 1 / 256
        assert peak_memory_bytes(layout, cost, groups, found.depth, wider, training) > budget
    if preset == "fit" and found.depth < 4:
        assert peak_memory_bytes(layout, cost, groups, found.depth + 1, 0.25, training) > budget
    if preset == "paper":
        assert found.depth_rate == found.width_rate


@pytest.mark.parametrize(
    ("share", "preset"), slow_but([(0.8, "fit"), (0.4, "paper")], product([0.4, 0.8, 1.0], ["fit", "paper"]))
)
def test_halving_finds_what_trying_every_width_finds_in_few_estimates(vit, share, preset, monkeypatch):
    """Also where the whole model, which learns no mask, fits and a slightly narrower one does not."""
    layout, cost, groups = vit
    training = Training(64, 0, learns_masks=True)
    rates = [step / 256 for step in range(1, 257)]
    if preset == "fit":
        tried = [Capability(depth, depth / 4, rate) for depth in (1, 2, 3, 4) for rate in rates if rate >= 0.25]
    else:
        tried = [solve_rate(layout, rate) for rate in rates]

    def need(found: Capability) -> int:
        return peak_memory_bytes(layout, cost, groups, found.depth, found.width_rate, training)

    budget = share * need(tried[-1])
    expected = [found for found in tried if need(found) <= budget][-1]
    calls = []
    monkeypatch.setattr(
        "pruning.capability.peak_memory_bytes", lambda *items: calls.append(1) or peak_memory_bytes(*items)
    )
    assert solve_memory(layout, cost, groups, budget, training, preset=preset) == expected
    assert len(calls) <= 4 * 10


def test_a_budget_too_small_for_one_block_says_what_it_would_take(vit):
    layout, cost, groups = vit
    with pytest.raises(CapabilityError, match=r"0\.0 MiB are too small for the first 1 of 4 blocks, whose training"):
        solve_memory(layout, cost, groups, 1000, TRAINING)


def test_learning_a_mask_needs_room_for_all_units_but_no_gradients(vit):
    layout, cost, groups = vit
    small_only = peak_memory_bytes(layout, cost, groups, 4, 0.25, Training(16, 1, learns_masks=False))
    both = peak_memory_bytes(layout, cost, groups, 4, 0.25, TRAINING)
    whole = peak_memory_bytes(layout, cost, groups, 4, 1.0, TRAINING)
    assert small_only < both < whole


def test_a_sub_model_keeps_the_groups_of_its_blocks_only(vit):
    layout, _, groups = vit
    spec = sub_model_at(layout, groups, 2, 0.5)
    assert spec.depth == 2
    assert {name: len(units) for name, units in spec.units.items()} == {
        "block0.heads": 2,
        "block0.mlp": 64,
        "block1.heads": 2,
        "block1.mlp": 64,
    }
    assert [group.name for group in groups_within(groups, layout, 1)] == ["block0.heads", "block0.mlp"]


def test_a_head_that_is_no_exit_has_a_memory_too():
    """torchvision's vision transformers call theirs ``heads.head``."""
    head = nn.Sequential(OrderedDict(head=nn.Linear(8, 10)))
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), body=nn.Linear(3 * 32 * 32, 8), heads=head))
    group = Group("body", 8, (Axis("body.weight", 0), Axis("body.bias", 0), Axis("heads.head.weight", 1)))
    layout = Layout((group,))
    found = solve_memory(layout, costs(model, layout), (group,), 10**9, TRAINING)
    assert found.width_rate == 1
