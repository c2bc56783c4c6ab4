"""Availability and drift: functions of seed, client and time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.dynamics import Availability, Drift, OnlineTimes, Shift, Slowdown, generator
from fleet.names import FleetError

TIMES_S = st.lists(st.floats(0, 1e5), min_size=1, max_size=20)


@given(times_s=TIMES_S, seed=st.integers(0, 5))
def test_availability_does_not_depend_on_the_order_of_questions(times_s, seed):
    availability = Availability(0.6, mean_online_s=100)
    forwards, backwards = OnlineTimes(availability, seed, 3), OnlineTimes(availability, seed, 3)
    ahead = [forwards.is_online(time_s) for time_s in times_s]
    behind = [backwards.is_online(time_s) for time_s in reversed(times_s)]
    assert ahead == behind[::-1]


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_fraction_of_time_online_is_the_ratio_from_the_start(ratio):
    availability = Availability(ratio, mean_online_s=50)
    clients = [OnlineTimes(availability, 7, client) for client in range(1500)]
    for time_s in (0.0, 20.0, 500.0):
        assert abs(np.mean([client.is_online(time_s) for client in clients]) - ratio) < 0.05


def test_mean_stay_online_is_the_configured_one():
    times = OnlineTimes(Availability(0.5, mean_online_s=30), 0, 0)
    times.is_online(3e5)
    stays_s = np.diff([0, *times._switches_s])
    assert abs(stays_s.mean() - 30) < 2


def test_a_client_with_ratio_1_is_always_online():
    times = OnlineTimes(Availability(1.0), 0, 0)
    assert all(times.is_online(time_s) for time_s in (0, 1e3, 1e9))


@given(time_s=st.floats(0, 1e4), client=st.integers(0, 20))
def test_next_online_moment_is_online_and_nothing_before_it_is(time_s, client):
    times = OnlineTimes(Availability(0.3, mean_online_s=20), 1, client)
    next_s = times.next_online_s(time_s)
    assert next_s >= time_s
    assert times.is_online(next_s)
    assert not any(times.is_online(moment) for moment in np.linspace(time_s, next_s, 20)[:-1] if next_s > time_s)


@given(times_s=TIMES_S, seed=st.integers(0, 5))
def test_drift_does_not_depend_on_the_order_of_questions(times_s, seed):
    drift = Drift(step_ratio=0.2, interval_s=10)
    forwards, backwards = Slowdown(drift, seed, 0), Slowdown(drift, seed, 0)
    assert [forwards.at(t) for t in times_s] == [backwards.at(t) for t in reversed(times_s)][::-1]


@given(step_ratio=st.floats(0, 3), max_ratio=st.floats(1.01, 10), time_s=st.floats(0, 1e4))
def test_walk_stays_within_its_bounds(step_ratio, max_ratio, time_s):
    slowdown = Slowdown(Drift(step_ratio, 10, max_ratio), 0, 0).at(time_s)
    assert 1 / max_ratio * (1 - 1e-9) <= slowdown <= max_ratio * (1 + 1e-9)


def test_walk_starts_at_the_profile_and_holds_for_an_interval():
    slowdown = Slowdown(Drift(step_ratio=0.3, interval_s=10), 0, 0)
    assert slowdown.at(0) == pytest.approx(1)
    assert slowdown.at(9.99) == slowdown.at(0)
    assert slowdown.at(10) != slowdown.at(0)


def test_one_step_has_the_configured_spread():
    drift = Drift(step_ratio=0.1, interval_s=1, max_ratio=4)
    logs = np.log([Slowdown(drift, 0, client).at(1) for client in range(2000)])
    assert abs(logs.std() - 0.1) < 0.01
    assert abs(logs.mean()) < 0.01


def test_a_shift_changes_one_client_from_its_time_on_and_the_latest_holds():
    drift = Drift(shifts=(Shift(1, 20.0, 0.5), Shift(1, 10.0, 3.0)))
    assert [Slowdown(drift, 0, 1).at(time_s) for time_s in (0, 9.9, 10, 19, 20, 1e6)] == [1, 1, 3, 3, 0.5, 0.5]
    assert Slowdown(drift, 0, 0).at(100) == 1


def test_streams_of_different_keys_differ_even_when_one_continues_the_other_with_zero():
    draws = {generator(0, *key).random() for key in ((), (0,), (0, 0), (1,), (1, 0), (0, 1))}
    assert len(draws) == 6


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Availability(0), "online-ratio"),
        (lambda: Availability(1.1), "online-ratio"),
        (lambda: Availability(float("nan")), "online-ratio"),
        (lambda: Availability(0.5, 0), "mean-online-s"),
        (lambda: Drift(step_ratio=-1), "step-ratio"),
        (lambda: Drift(interval_s=0), "interval-s"),
        (lambda: Drift(max_ratio=1), "max-ratio"),
        (lambda: Shift(-1, 0, 1), "partition-id"),
        (lambda: Shift(0, -1, 1), "time-s"),
        (lambda: Shift(0, 0, 0), "slowdown"),
        (lambda: generator(-1), "seed"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(make, expected):
    with pytest.raises(FleetError, match=expected):
        make()
