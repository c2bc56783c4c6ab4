"""Who gets which level."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fleet.clock import DurationModel
from fleet.fleet import make_fleet
from pruning.cost import measure_costs
from strategies.levels import check_levels, level_of, read_ratios
from strategies.setting import Setting
from wire.flat import ConfigError
from wire.message import DataConfig, Job, ModelConfig, TrainConfig
from zoo import get_model


def setting_of(num_clients: int, fleet: str = "linear:5", seed: int = 0) -> Setting:
    model, layout = get_model("mlp", 10, 1, 8)
    job = Job(ModelConfig("mlp"), DataConfig(), TrainConfig(), num_clients, 5, seed)
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8))
    durations = None if fleet == "none" else DurationModel(make_fleet(fleet, num_clients, seed=seed), seed=seed)
    return Setting(job, layout, cost, durations=durations)


@given(num_clients=st.integers(1, 12), num_levels=st.integers(1, 5), seed=st.integers(0, 3))
def test_capability_gives_equal_parts_of_the_clients_each_level_and_never_a_faster_one_the_smaller(
    num_clients, num_levels, seed
):
    setting = setting_of(num_clients, "long-tail", seed)
    levels = [level_of(setting, "capability", num_levels, pid, 1) for pid in range(num_clients)]
    counts = Counter(levels)
    assert max(counts.values()) - min(counts[level] for level in range(num_levels)) <= 1
    assert setting.durations is not None
    speeds = [device.train_flops for device in setting.durations.fleet.devices]
    for first in range(num_clients):
        for second in range(num_clients):
            assert not (speeds[first] > speeds[second] and levels[first] > levels[second])


@pytest.mark.parametrize(("assignment", "fleet"), [("cycle", "linear:5"), ("capability", "none")])
def test_a_cycle_and_a_fleet_nobody_knows_go_by_the_clients_number(assignment, fleet):
    setting = setting_of(7, fleet)
    assert [level_of(setting, assignment, 3, pid, 4) for pid in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_dynamic_levels_depend_on_seed_round_and_client_and_reach_every_level():
    drawn = {
        (seed, server_round, pid): level_of(setting_of(4, "none", seed), "dynamic", 3, pid, server_round)
        for seed in (0, 1)
        for server_round in range(6)
        for pid in range(4)
    }
    assert set(drawn.values()) == {0, 1, 2}
    for fixed in ({(0, r, 1) for r in range(6)}, {(0, 2, pid) for pid in range(4)}, {(s, 2, 3) for s in (0, 1)}):
        assert len({drawn[key] for key in fixed}) > 1
    assert drawn[0, 3, 2] == level_of(setting_of(4, "none", 0), "dynamic", 3, 2, 3)


def test_ratios_are_read_widest_first():
    assert read_ratios("0.25,1,0.5") == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("ratios", ["", "1,", "0", "1.5", "half", "nan"])
def test_what_is_no_ratio_is_refused(ratios):
    with pytest.raises(ConfigError, match="rates: got"):
        check_levels("rates", ratios, "cycle")


def test_an_unknown_assignment_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'capability'"):
        check_levels("rates", "1", "capabilty")
