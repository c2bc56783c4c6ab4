"""Budgets, weights and coverage of Co-S2P, by hand and against formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.capability import (
    Capability,
    CapabilityError,
    Training,
    inner_groups,
    peak_memory_bytes,
    sub_model_at,
)
from pruning.cost import measure_costs
from pruning.spec import FULL, SubModelSpec
from server_app.config import parse
from strategies.cos2p_rule import (
    Budget,
    Coverage,
    co_s2p_weight,
    covering_spec,
    full_depth_capabilities,
    l1_distance,
    num_trained,
    parse_budgets,
    published_weight,
)
from strategies.setting import Setting
from tests.vits import small
from wire.flat import ConfigError
from wire.message import Job


@pytest.fixture(scope="module")
def vit():
    model, layout = small(10, 3, 32, exits=True)
    return layout, inner_groups(layout, {key: tuple(t.shape) for key, t in model.state_dict().items()})


def test_each_budget_is_solved_once_however_many_clients_have_it(vit, monkeypatch):
    solved = []

    def solve(budget, *others):
        solved.append(budget.memory_bytes)
        if budget.memory_bytes < 2:
            raise CapabilityError("too small")
        return Capability(4, 1.0, budget.memory_bytes / 10)

    monkeypatch.setattr("strategies.cos2p_rule.solve_budget", solve)
    budgets = [Budget(memory_bytes=1.0 + pid % 3) for pid in range(600)]
    found = full_depth_capabilities(budgets, None, vit[1], 4)
    assert sorted(solved) == [1.0, 2.0, 3.0]
    assert found == {pid: Capability(4, 1.0, (1.0 + pid % 3) / 10) for pid in range(600) if pid % 3}


def test_whoever_takes_a_turn_needs_no_room_for_a_mask_phase():
    model, layout = small(10, 1, 8, exits=True)
    cost, run = measure_costs(model, layout, torch.zeros(2, 1, 8, 8)), parse({"strategy": "cos2p"}).run
    setting = Setting(Job(run.model, run.data, run.train, 1, 9, 0), layout, cost)
    groups = inner_groups(layout, cost.shapes)
    need = [
        peak_memory_bytes(layout, cost, groups, 4, 0.25, Training(run.train.batch_size, 1, learns_masks))
        for learns_masks in (False, True)
    ]
    assert need[0] < need[1]
    found = full_depth_capabilities([Budget(memory_bytes=sum(need) / 2)], setting, groups, 4)
    assert found[0].depth == 4


def test_budgets_are_rates_bytes_or_shares_of_a_device():
    assert parse_budgets("0.25,1, .5") == (Budget(1.0), Budget(0.5), Budget(0.25))
    assert parse_budgets("800MB,2GiB") == (Budget(memory_bytes=2 * 2**30), Budget(memory_bytes=800e6))
    assert parse_budgets("device:0.5") == (Budget(device_share=0.5),)


@pytest.mark.parametrize(
    "text", ["", "0", "1.5", "half", "1,", "-1", "2GiB,0.5", "device:2", "device:0.5,1", "0MB", "1e9", "device:1GB"]
)
def test_budgets_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="budgets: got"):
        parse_budgets(text)


@given(step=st.floats(0, 1e6), size=st.integers(1, 10**9), drift=st.floats(0, 1e6), further=st.floats(0.01, 1e3))
def test_a_client_weight_grows_with_the_step_and_falls_with_size_and_drift(step, size, drift, further):
    rate = size / 10**9
    cases = [
        (co_s2p_weight, size, (step / size) / (drift / step + 1) if step > 1e-100 else 0.0),
        (published_weight, rate, (step / rate) / (drift + 1)),
    ]
    for rule, divisor, expected in cases:
        weight = rule(step, divisor, drift)
        assert weight == pytest.approx(expected, rel=1e-12, abs=1e-100)
        assert rule(step, divisor, drift + further) <= weight
        assert rule(step + further, divisor, drift) >= weight


@given(step=st.floats(1e-3, 1e6), drift=st.floats(0, 1e6), size=st.integers(1, 10**6))
def test_what_an_answer_weighs_does_not_depend_on_how_many_entries_moved_alike(step, drift, size):
    assert co_s2p_weight(step * size, size, drift * size) == pytest.approx(co_s2p_weight(step, 1, drift), rel=1e-9)
    assert co_s2p_weight(step, size, drift) / co_s2p_weight(step, size, 0.0) == pytest.approx(step / (step + drift))


def test_distances_are_sums_over_what_is_trained():
    first = {"w": torch.tensor([[1.0, -2.0]]), "n": torch.tensor(3), "bn.running_var": torch.tensor([1.0])}
    second = {"w": torch.tensor([[0.5, 1.0]]), "n": torch.tensor(9), "bn.running_var": torch.tensor([100.0])}
    assert l1_distance(first, second) == 3.5
    assert num_trained(second) == 2


def test_coverage_remembers_when_each_unit_was_last_merged(vit):
    layout, groups = vit
    coverage = Coverage(layout, groups)
    assert coverage.starved(0)[1] == 4
    coverage.note(FULL, 1)
    assert coverage.starved(0) == ({}, 0)
    assert coverage.starved(1)[1] == 4
    coverage.note(SubModelSpec.of({"block0.mlp": range(3, 128), "block1.heads": [1, 2]}, depth=2), 2)
    units, depth = coverage.starved(1)
    assert depth == 4
    assert units["block0.mlp"].tolist() == [0, 1, 2]
    assert units["block1.heads"].tolist() == [0, 3]
    assert units["block2.heads"].tolist() == [0, 1, 2, 3]
    assert "block0.heads" not in units
    coverage.note(FULL, 3)
    again = Coverage(layout, groups)
    again.restore(coverage.export())
    assert again.export() == coverage.export()
    coverage.note(SubModelSpec.of({"block1.mlp": range(1, 128)}), 4)
    assert coverage.starved(3) == ({"block1.mlp": pytest.approx(np.array([0]))}, 2)


def test_whoever_rotates_holds_what_is_wanted_first_and_no_more_than_its_size(vit):
    layout, groups = vit
    capability = Capability(2, 0.5, 0.5)
    own = sub_model_at(layout, groups, 2, 0.5)
    wanted = {"block0.mlp": np.array([100, 127]), "block1.heads": np.array([3]), "block3.heads": np.array([0])}
    spec = covering_spec(layout, groups, capability, own, wanted)
    assert spec.depth == 2
    assert spec.widths(layout) == {**own.widths(layout)}
    assert spec.units["block0.mlp"] == (*range(62), 100, 127)
    assert spec.units["block1.heads"] == (0, 3)
    assert spec.units["block0.heads"] == own.units["block0.heads"]
    tall = covering_spec(layout, groups, Capability(4, 1.0, 0.25), own, wanted)
    assert tall.depth is None
    assert tall.units["block3.heads"] == (0,)
    assert tall.units["block0.mlp"] == (*range(30), 100, 127)
