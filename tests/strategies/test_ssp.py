"""SSP: everybody at their own pace, at most s clocks apart."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.loop import LoopConfig
from strategies.ssp import SSPConfig
from tests.runs import select, tiny_run
from tests.strategies.scalar import Under, World
from wire.flat import ConfigError

seconds = st.floats(0.1, 10, allow_nan=False)


def test_two_clients_by_hand():
    """Times 1 and 3.5 s, s = 1: client 0 answers at 1 s and at 2 s, is two ahead and waits until 3.5 s."""
    world = World([0.0, 2.0], lambda pid, dispatch: (1.0, 3.5)[pid])
    values = world.values(4, "ssp", max_lead=1)
    assert world.arrivals() == [(0, 1.0, 0), (0, 2.0, 0), (1, 3.5, 2), (0, 4.5, 0)]
    first, second = 0.95, 0.95 * 0.95  # half of a tenth of the way to 0
    third = second + 0.1 / 2  # client 1 went from 1 to 1.1
    assert values == pytest.approx([first, second, third, 0.95 * third], abs=1e-6)


def reference(world: World, num_merges: int, lead: int) -> tuple[list[float], list[tuple[int, float, int]]]:
    """Steps added one by one; who is more than ``lead`` clocks ahead of the slowest waits."""
    number = len(world.targets)
    under, theta, values, arrivals = Under(world), 1.0, [], []
    clocks, idle = [0] * number, set(range(number))
    now_s = 0.0
    for version in range(num_merges):
        for pid in sorted(idle):
            if clocks[pid] <= min(clocks) + lead:
                under.ask(pid, now_s, version, theta)
                idle.remove(pid)
        job = under.next()
        now_s = job.finish_s
        theta += (world.pull(job.pid, job.start) - job.start) / number
        clocks[job.pid] += 1
        idle.add(job.pid)
        values.append(theta)
        arrivals.append((job.pid, job.finish_s, version - job.version))
    return values, arrivals


@settings(max_examples=8)
@given(
    st.lists(st.floats(-5, 5, allow_nan=False), min_size=2, max_size=4),
    st.lists(seconds, min_size=5, max_size=5),
    st.integers(0, 4),
)
def test_it_is_the_papers_rule_for_any_targets_times_and_bounds(where, times, lead):
    world = World(where, lambda pid, dispatch: times[pid] + times[dispatch % 5] / 7)
    values, arrivals = reference(world, 12, lead)
    assert world.values(12, "ssp", max_lead=lead) == pytest.approx(values, abs=1e-4)
    assert world.arrivals() == arrivals


def test_without_slack_it_is_a_synchronous_round_of_equal_weights():
    """Model and clock, after every round of three answers."""
    world = World([0.0, 2.0, 5.0], lambda pid, dispatch: 1.0 + pid, examples=(3, 7, 2))
    each = world.values(9, "ssp", max_lead=0)
    times = [row["time_s"] for row in select(world.rows, "merge")]
    together = world.values(3, loop=LoopConfig(client_weight="equal"))
    assert each[2::3] == pytest.approx(together, abs=1e-6)
    assert times[2::3] == [row["time_s"] for row in select(world.rows, "merge")] == [3.0, 6.0, 9.0]


@pytest.mark.parametrize("lead", [0, 1, 3])
def test_nobody_ever_begins_more_than_the_bound_ahead_of_the_slowest(lead):
    world = World([0.0, 2.0, 5.0], lambda pid, dispatch: (1.0, 1.7, 9.0)[pid])
    world.run(30, "ssp", max_lead=lead)
    answered: dict[int, list[float]] = defaultdict(list)
    for row in select(world.rows, "arrival"):
        clocks = [sum(t <= row["start_s"] for t in answered[pid]) for pid in range(3)]
        assert clocks[row["partition_id"]] - min(clocks) <= lead
        answered[row["partition_id"]].append(row["finish_s"])
    assert len(answered[0]) - len(answered[2]) >= lead, "nobody used the slack: the test shows nothing"


def test_the_slowest_being_offline_holds_the_others_up_but_not_the_clock(tmp_path):
    """Devices that lose requests are asked again; the run completes and the bound holds."""
    rows = tiny_run(tmp_path / "run", strategy="ssp", num_rounds=20, fleet__drop_out_ratio=0.3, ssp__max_lead=1)
    assert select(rows, "arrival", status="failed")
    counts = [len(select(rows, "arrival", status="merged", partition_id=pid)) for pid in range(4)]
    assert max(counts) - min(counts) <= 2
    assert len(select(rows, "merge")) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_lead": -1}, "max-lead: got -1, expected >= 0"), ({"mixing_rate": -0.1}, r"mixing-rate: got -0\.1")],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SSPConfig(**changes)
