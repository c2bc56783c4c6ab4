"""How many units, and which: widths under a ratio, the four ways to choose, and nested families."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.cost import measure_costs
from pruning.groups import Layout
from pruning.rolling import digits_of, lockstep_starts, staggered_starts
from pruning.select import (
    WIDE_LAYER,
    RetentionError,
    equal_widths,
    nested_family,
    select_prefix,
    select_random,
    select_top,
    select_window,
)
from pruning.spec import SubModelSpec
from zoo import get_model

RATIOS = st.floats(0.01, 1.0)
NAMES = st.sampled_from(["cnn", "resnet8", "vit_tiny"])


@cache
def priced(name, width=1.0):
    with torch.device("meta"):
        model, layout = get_model(name, 10, 3, 32, width=width)
        return layout, measure_costs(model, layout, torch.empty(1, 3, 32, 32))


def random_scores(layout, seed):
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.size) for group in layout.prunable}


@pytest.mark.parametrize(
    ("rate", "parameters"), [(1, 11_172_170), (0.5, 2_796_714), (0.25, 701_018), (0.125, 176_178), (0.0625, 44_510)]
)
def test_heterofl_levels_have_the_papers_numbers_of_parameters(rate, parameters):
    layout, cost = priced("resnet18")
    assert cost.of(select_prefix(layout, equal_widths(layout, cost, rate))).parameters == parameters


@given(name=NAMES, ratio=RATIOS, round_to=st.sampled_from([1, 4, 8]))
def test_every_exact_group_keeps_at_least_one_unit_and_its_share(name, ratio, round_to):
    layout, cost = priced(name)
    widths = equal_widths(layout, cost, ratio, round_to=round_to)
    assert widths.keys() == {group.name for group in layout.prunable}
    for group in layout.prunable:
        assert 1 <= widths[group.name] <= group.size
        assert widths[group.name] >= ratio * group.size - 1e-6
        if round_to > 1 and group.size >= WIDE_LAYER:
            assert widths[group.name] % round_to == 0 or widths[group.name] == group.size
        elif round_to == 1:
            assert widths[group.name] < ratio * group.size + 1


@given(name=NAMES, ratio=st.floats(0.05, 1.0), measure=st.sampled_from(["prunable", "parameters", "macs", "bytes"]))
@settings(deadline=None)
def test_a_ratio_of_a_quantity_is_not_exceeded_and_nearly_used_up(name, ratio, measure):
    layout, cost = priced(name)
    widths = equal_widths(layout, cost, ratio, measure)
    kept = cost.retention_ratio(select_prefix(layout, widths), measure)
    narrowest = dict.fromkeys(widths, 1)
    if kept > ratio + 1e-6:  # not even the narrowest cut is that small
        assert all(width <= max(1, np.ceil(layout.by_name[name].size / 1024)) for name, width in widths.items())
    assert kept >= cost.retention_ratio(select_prefix(layout, narrowest), measure) - 1e-9
    wider = {name: min(layout.by_name[name].size, width + 1) for name, width in widths.items()}
    assert ratio >= 1 or cost.retention_ratio(select_prefix(layout, wider), measure) >= min(ratio, 1 - 1e-9)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    layout, cost = priced("cnn")
    with pytest.raises(RetentionError):
        equal_widths(layout, cost, ratio)
    with pytest.raises(RetentionError):
        nested_family(layout, cost, random_scores(layout, 0)).member(ratio)


def test_groups_that_are_not_exact_are_never_narrowed():
    layout, cost = priced("cnn")
    assert "classes" not in equal_widths(layout, cost, 0.1)
    assert "classes" not in nested_family(layout, cost, random_scores(layout, 0)).member(0.1).units


@given(ratio=RATIOS, server_round=st.integers(0, 1000), seed=st.integers(0, 1000))
def test_all_four_ways_keep_exactly_the_widths_asked_for(ratio, server_round, seed):
    layout, cost = priced("cnn")
    widths = equal_widths(layout, cost, ratio)
    rng = np.random.default_rng(seed)
    for spec in (
        select_prefix(layout, widths),
        select_window(layout, widths, lockstep_starts(layout, server_round)),
        select_top(layout, widths, random_scores(layout, seed)),
        select_random(layout, widths, rng),
    ):
        spec.check(layout)
        assert {name: spec.width(layout, name) for name in widths} == widths


def test_a_prefix_is_the_first_units_and_a_full_width_is_left_out():
    layout, _ = priced("cnn")
    spec = select_prefix(layout, {"stage1": 3, "stage2": 64})
    assert spec.kept == (("stage1", (0, 1, 2)),)


def rolling(layout: Layout, turn: int, width: int = 3) -> SubModelSpec:
    return select_window(layout, {"stage1": width}, lockstep_starts(layout, turn))


def test_a_rolling_window_moves_on_by_one_unit_a_round_and_wraps_around():
    layout, _ = priced("cnn")
    assert rolling(layout, 0).units["stage1"] == (0, 1, 2)
    assert rolling(layout, 1).units["stage1"] == (1, 2, 3)
    assert rolling(layout, 31).units["stage1"] == (0, 1, 31)
    assert rolling(layout, 32) == rolling(layout, 0)


def test_over_one_turn_a_rolling_window_keeps_every_unit_equally_often():
    layout, _ = priced("cnn")
    seen = np.zeros(32, dtype=int)
    for server_round in range(32):
        seen[list(rolling(layout, server_round, 5).units["stage1"])] += 1
    assert (seen == 5).all()


def held_by(layout: Layout, key: str, shape: tuple[int, int], spec: SubModelSpec) -> np.ndarray:
    """Which entries of a matrix [rows, columns] a sub-model holds, by the layout's own words."""
    held = np.ones(shape, dtype=bool)
    for group, axis in layout.axes_of[key]:
        missing = np.setdiff1d(np.arange(group.size), spec.units.get(group.name, range(group.size)))
        held[missing if axis.dim == 0 else (slice(None), missing)] = False
    return held


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_staggered_windows_hold_every_entry_equally_often_and_the_papers_do_not(rate):
    layout = get_model("mlp", 10, 1, 8)[1]
    widths = {group.name: int(rate * group.size) for group in layout.prunable}
    key, shape = "blocks.1.linear.weight", (200, 200)
    staggered, lockstep = np.zeros(shape), np.zeros(shape)
    for turn in range(4**2):
        staggered += held_by(layout, key, shape, select_window(layout, widths, staggered_starts(layout, turn, 4)))
    for turn in range(200):
        lockstep += held_by(layout, key, shape, select_window(layout, widths, lockstep_starts(layout, turn)))
    assert (staggered == 16 * rate**2).all()
    assert lockstep.max() == 200 * rate
    assert lockstep.min() == 200 * max(0, 2 * rate - 1)
    assert (lockstep.sum(0) == lockstep.sum(0)[0]).all(), "units are held evenly all the same"
    assert (lockstep.sum(1) == lockstep.sum(1)[0]).all()


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8", "resnet18", "vit_tiny"])
def test_groups_that_share_an_entry_move_by_different_digits(name):
    layout = get_model(name, 10, 3, 32)[1]
    digits = digits_of(layout)
    assert digits.keys() == {group.name for group in layout.prunable}
    for pairs in layout.axes_of.values():
        names = {group.name for group, _ in pairs if group.exact}
        assert len({digits[n] for n in names}) == len(names)
    assert max(digits.values()) <= 2


def test_the_best_units_are_kept_and_ties_go_to_the_lower_index():
    layout, _ = priced("cnn")
    scores = np.zeros(32)
    scores[[7, 20]] = 1.0
    assert select_top(layout, {"stage1": 4}, {"stage1": scores}).units["stage1"] == (0, 1, 7, 20)


def test_random_units_follow_the_generator_and_are_not_always_the_same():
    layout, _ = priced("cnn")
    one, same, other = (select_random(layout, {"stage1": 8}, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


# --- nested families --------------------------------------------------------------------------------------------------

SCOPES = st.sampled_from(["global", "per-layer", "bounded"])


@settings(deadline=None, max_examples=40)
@given(
    name=NAMES,
    seed=st.integers(0, 100),
    scope=SCOPES,
    round_to=st.sampled_from([1, 8]),
    ratios=st.lists(RATIOS, min_size=2),
)
def test_a_smaller_member_is_part_of_every_larger_one(name, seed, scope, round_to, ratios):
    layout, cost = priced(name)
    family = nested_family(layout, cost, random_scores(layout, seed), scope, round_to=round_to)
    members = [family.member(ratio) for ratio in sorted(ratios)]
    for smaller, larger in pairwise(members):
        smaller.check(layout)
        assert smaller.is_subset_of(larger, layout)


@settings(deadline=None, max_examples=40)
@given(name=NAMES, seed=st.integers(0, 100), scope=SCOPES, ratio=RATIOS)
def test_a_member_keeps_what_was_asked_for_and_hardly_more(name, seed, scope, ratio):
    layout, cost = priced(name)
    family = nested_family(layout, cost, random_scores(layout, seed), scope)
    kept = cost.retention_ratio(family.member(ratio))
    assert kept >= ratio - 1e-6
    below = family.retention[family.retention < kept - 1e-9]
    assert not len(below) or below[-1] < ratio  # the next smaller member would be too small
    if name != "vit_tiny" and ratio > family.retention[0]:
        assert kept <= ratio + 0.05


@settings(deadline=None, max_examples=40)
@given(name=NAMES, seed=st.integers(0, 100), scope=SCOPES, ratio=RATIOS)
def test_the_achievable_ratio_names_its_own_member(name, seed, scope, ratio):
    layout, cost = priced(name)
    family = nested_family(layout, cost, random_scores(layout, seed), scope)
    achievable = family.achievable(ratio)
    assert achievable <= max(ratio, family.retention[0]) + 1e-6
    assert cost.retention_ratio(family.member(achievable)) == pytest.approx(achievable)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 100), ratio=RATIOS, scope=SCOPES)
def test_a_member_holds_the_best_units_of_every_group(seed, ratio, scope):
    layout, cost = priced("resnet8")
    scores = random_scores(layout, seed)
    member = nested_family(layout, cost, scores, scope).member(ratio)
    assert member == select_top(layout, {g.name: member.width(layout, g.name) for g in layout.prunable}, scores)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 100), ratio=st.floats(0.02, 1.0), bound=st.floats(0.2, 1.0))
def test_a_bounded_family_keeps_every_group_near_the_equal_cut(seed, ratio, bound):
    layout, cost = priced("resnet8")
    scores = {
        name: score ** np.random.default_rng(seed).integers(1, 9) for name, score in random_scores(layout, seed).items()
    }
    family = nested_family(layout, cost, scores, "bounded", bound)
    member = family.member(ratio)
    shares = [member.width(layout, g.name) / g.size for g in layout.prunable]
    one_unit = max(1 / g.size for g in layout.prunable)
    # All shares lie between bound and 1 / bound times one common share; rounding to whole units aside.
    assert min(shares) + one_unit >= bound * bound * (max(shares) - one_unit)


def test_a_layer_bound_of_one_is_the_equal_cut():
    layout, cost = priced("resnet8")
    scores = random_scores(layout, 3)
    for ratio in (0.1, 0.3, 0.7):
        bounded = nested_family(layout, cost, scores, "bounded", 1.0).member(ratio)
        equal = nested_family(layout, cost, scores, "per-layer").member(ratio)
        for group in layout.prunable:
            assert abs(bounded.width(layout, group.name) - equal.width(layout, group.name)) <= 1


def test_the_largest_member_is_the_full_model():
    layout, cost = priced("cnn")
    family = nested_family(layout, cost, random_scores(layout, 0))
    assert family.member(1.0).kept == ()
    assert family.retention[-1] == 1


def test_a_global_ranking_narrows_unimportant_layers_first_but_never_to_nothing():
    layout, cost = priced("cnn")
    scores = {"stage1": np.full(32, 9.0), "stage2": np.full(64, 0.1), "stage3": np.full(128, 9.0)}
    family = nested_family(layout, cost, scores, "global")
    member = family.member(float(family.retention[0]))
    assert min(member.widths(layout).values()) == 1
    half = family.member(0.5)
    assert half.width(layout, "stage1") == 32
    assert half.width(layout, "stage2") < 64
