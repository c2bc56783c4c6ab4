"""Plain semi-asynchronous rounds: a quorum or a deadline, and the late count later, less."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.loop import quorum_of
from strategies.semi_async import SemiAsyncConfig
from tests.strategies.scalar import Under, World
from wire.flat import ConfigError

seconds = st.floats(0.1, 10, allow_nan=False)


def test_three_clients_and_a_quorum_of_two_by_hand():
    """Times 1, 2 and 3 s. The first round closes at 2 s without client 2; it comes at 3 s, one version old, together
    with client 0, and counts its examples divided by the square root of 2."""
    world = World([0.0, 2.0, 5.0], lambda pid, dispatch: 1.0 + pid, examples=(10, 30, 20))
    values = world.values(2, "semi-async", quorum_ratio=0.5)
    assert world.arrivals() == [(0, 1.0, 0), (1, 2.0, 0), (0, 3.0, 0), (2, 3.0, 1)]
    first = (10 * 0.9 + 30 * 1.1) / 40
    weight = 20 * 2**-0.5
    second = first + (10 * -0.1 * first + weight * 0.4) / (10 + weight)
    assert values == pytest.approx([first, second], abs=1e-6)


def test_a_quorum_of_all_is_fedavg():
    world = World([0.0, 2.0, 5.0], lambda pid, dispatch: 1.0 + pid, examples=(10, 30, 20))
    assert world.values(4, "semi-async", quorum_ratio=1.0) == pytest.approx(world.values(4, "fedavg"), abs=1e-6)
    assert {age for _, _, age in world.arrivals()} == {0}


def reference(world: World, num_merges: int, quorum: int) -> tuple[list[float], list[tuple[int, float, int]]]:
    """The first ``quorum`` answers of each round, weighted by examples and age; those who answered start anew."""
    under, theta, values, arrivals = Under(world), 1.0, [], []
    idle, now_s = list(range(len(world.targets))), 0.0
    for version in range(num_merges):
        for pid in sorted(idle):
            under.ask(pid, now_s, version, theta)
        jobs = [under.next() for _ in range(quorum)]
        weights = [world.examples[job.pid] * (1 + version - job.version) ** -0.5 for job in jobs]
        steps = [world.pull(job.pid, job.start) - job.start for job in jobs]
        theta += sum(w * d for w, d in zip(weights, steps, strict=True)) / sum(weights)
        arrivals += [(job.pid, job.finish_s, version - job.version) for job in jobs]
        values.append(theta)
        idle, now_s = [job.pid for job in jobs], jobs[-1].finish_s
    return values, arrivals


@settings(max_examples=8)
@given(
    st.lists(st.floats(-5, 5, allow_nan=False), min_size=2, max_size=4),
    st.lists(seconds, min_size=5, max_size=5),
    st.lists(st.integers(1, 50), min_size=4, max_size=4),
    st.floats(0.1, 1),
)
def test_it_is_that_rule_for_any_targets_times_and_examples(where, times, examples, ratio):
    world = World(where, lambda pid, dispatch: times[pid] + times[dispatch % 5] / 7, examples)
    quorum = SemiAsyncConfig(quorum_ratio=ratio).loop_settings(len(where))["quorum"]
    values, arrivals = reference(world, 6, quorum)
    got = world.values(6, "semi-async", quorum_ratio=ratio, max_staleness=-1)
    assert got == pytest.approx(values, abs=1e-4)
    assert sorted(world.arrivals()) == sorted(arrivals)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quorum_ratio": 1.5}, r"quorum-ratio: got 1\.5, expected in \[0, 1\]"),
        ({"quorum_ratio": 0.0}, r"quorum-ratio: got 0\.0, expected > 0, or a deadline-s > 0"),
        ({"max_staleness": 0}, "max-staleness: got 0, expected > 0, or -1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SemiAsyncConfig(**changes)


@pytest.mark.parametrize(
    ("ratio", "num_clients", "quorum"),
    [(0.07, 100, 7), (0.28, 25, 7), (0.56, 25, 14), (0.5, 5, 3), (1.0, 7, 7), (1e-12, 5, 1), (0.0, 5, 0)],
)
def test_a_quorum_is_the_share_of_the_clients_whatever_the_last_bit_of_the_product(ratio, num_clients, quorum):
    """In floating point .07 times 100 is more than 7."""
    assert quorum_of(ratio, num_clients) == quorum
    assert SemiAsyncConfig(ratio, deadline_s=1.0).loop_settings(num_clients)["quorum"] == quorum
