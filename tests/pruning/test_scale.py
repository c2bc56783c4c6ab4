"""Sub-models in width and depth under a budget."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.cost import CostModel, measure_costs
from pruning.extract import resize
from pruning.groups import Layout
from pruning.scale import scale_down
from pruning.select import RetentionError, equal_widths
from pruning.spec import FULL, SubModelSpec
from zoo import get_model


@cache
def priced(name: str) -> tuple[Layout, CostModel]:
    model, layout = get_model(name, 10, 3, 32, exits=True)
    return layout, measure_costs(model, layout, torch.zeros(2, 3, 32, 32))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["mlp", "cnn", "resnet8", "resnet18", "vit_tiny"]),
    budget=st.floats(0.3, 1.0),
    measure=st.sampled_from(["parameters", "macs", "bytes"]),
)
def test_a_budget_is_met_behind_an_exit(name, budget, measure):
    layout, cost = priced(name)
    spec = scale_down(layout, cost, budget, measure)
    spec.check(layout)
    assert cost.retention_ratio(spec, measure) <= budget * (1 + 1e-6)
    assert (spec.depth or len(layout.blocks)) in layout.exits


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.5, 0.8])
def test_of_every_depths_widest_cut_within_the_budget_the_best_balanced_is_taken(budget):
    """Against all 3 x 128 cuts of the cnn (32, 64 and 128 channels), counted parameter by parameter."""
    layout, cost = priced("cnn")
    sizes = {group.name: group.size for group in layout.prunable}
    whole = cost.of(FULL).parameters
    candidates = []
    for depth in (1, 2, 3):
        cuts = [{name: -(-k * size // 128) for name, size in sizes.items()} for k in range(1, 129)]
        specs = [SubModelSpec.of({n: range(w) for n, w in cut.items() if w < sizes[n]}, depth) for cut in cuts]
        within = [
            (cut, spec) for cut, spec in zip(cuts, specs, strict=True) if cost.of(spec).parameters <= budget * whole
        ]
        if within:
            cut, spec = within[-1]
            width_ratio = sum(cut[name] / size for name, size in sizes.items()) / 3
            candidates.append((min(depth / 3, width_ratio), depth, spec.kept))
    spec = scale_down(layout, cost, budget, "parameters")
    assert (spec.depth or 3, spec.kept) == max(candidates)[1:]


def test_a_full_budget_keeps_everything():
    for name in ("mlp", "cnn", "resnet8", "vit_tiny"):
        layout, cost = priced(name)
        assert scale_down(layout, cost, 1.0, "parameters") == FULL


def test_depth_and_width_shrink_together():
    """By hand: of all exits, the one taken has the largest min(depth ratio, width ratio)."""
    layout, cost = priced("resnet18")
    spec = scale_down(layout, cost, 0.25, "parameters")
    balance = {}
    for depth in layout.exits:
        widths = equal_widths(layout, cost, 0.25, "parameters", depth=depth)
        width_ratio = sum(w / layout.by_name[name].size for name, w in widths.items()) / len(widths)
        balance[depth] = min(depth / 8, width_ratio)
    assert spec.depth == 6
    assert max(balance, key=lambda depth: balance[depth]) == 6
    assert 0.7 < spec.width(layout, "stage1.trunk") / 64 <= 1


def test_a_cut_in_depth_has_room_for_more_width():
    layout, cost = priced("resnet18")
    shallow = equal_widths(layout, cost, 0.2, "parameters", depth=6)
    whole = equal_widths(layout, cost, 0.2, "parameters")
    assert all(shallow[name] >= whole[name] for name in whole)
    assert shallow["stage1.trunk"] > whole["stage1.trunk"]


def test_the_price_is_that_of_the_physically_small_model():
    model, layout = get_model("cnn", 10, 3, 32, exits=True)
    _, cost = priced("cnn")
    spec = scale_down(layout, cost, 0.5, "parameters")
    small = resize(model, layout, spec)
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert share == pytest.approx(cost.retention_ratio(spec, "parameters"))
    assert 0.4 < share <= 0.5


def test_a_budget_that_nothing_meets_says_what_the_smallest_is():
    layout, cost = priced("vit_tiny")
    with pytest.raises(RetentionError, match=r"keeps at most 0\.001 of the parameters; the smallest .* 0\.0"):
        scale_down(layout, cost, 0.001, "parameters")
