"""Pruned-rate learning: what it asks of clients whose times are known functions, and every guard."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import KroghInterpolator

from pruning.rates import (
    ClientRate,
    RateError,
    RateParams,
    _next_ratio,
    _with_point,
    newton_ratio,
    record_time,
    update_rates,
)

TIMING = RateParams(min_retention_ratio=0.02, max_step=0.5, min_timed_rounds=3)
WORK = RateParams(direction="hold", spare_time="work", min_retention_ratio=0.2, min_timed_rounds=2)


def simulate(sigma, params=TIMING, num_rounds=150, interval=10, noise=0.02, seed=0, fixed=0.0, num_clients=10):
    """Clients whose update times are base * (fixed + (1 - fixed) * gamma); returns speed-up, decisions, ratios."""
    rng = np.random.default_rng(seed)
    base, ratios, state = np.linspace(1, sigma, num_clients), np.ones(num_clients), {}
    total, unpruned, aligned_after, floored = 0.0, 0.0, None, []
    for server_round in range(num_rounds):
        jitter = 1 + noise * rng.standard_normal(num_clients)
        times = base * (fixed + (1 - fixed) * ratios) * jitter
        total, unpruned = total + times.max(), unpruned + (base * jitter).max()
        for client in range(num_clients):
            state = record_time(state, client, float(times[client]))
        if (server_round + 1) % interval == 0:
            state, decision = update_rates(state, params)
            floored += decision.newly_floored
            ratios = np.array([state[client].retention_ratio for client in range(num_clients)])
            aligned = base * (fixed + (1 - fixed) * ratios)
            if aligned_after is None and ((aligned >= 0.9) & (aligned <= 1.1)).all():
                aligned_after = (server_round + 1) // interval
    return unpruned / total, aligned_after, ratios, floored


@pytest.mark.parametrize(("sigma", "speed_up", "decisions"), [(2, 1.75, 3), (5, 3.3, 4), (10, 4.4, 6)])
def test_the_timing_model_reaches_its_speed_up_within_its_decisions(sigma, speed_up, decisions):
    for seed in range(3):
        got, aligned_after, ratios, _ = simulate(sigma, seed=seed)
        assert got >= speed_up
        assert aligned_after is not None
        assert aligned_after <= decisions
        assert ratios[0] == 1.0


def with_and_without_newton(monkeypatch, sigma, **timing):
    """Share of the time saved and decisions until aligned: by Newton's rule, and by the linear one in its place."""
    speed_up, decisions, *_ = simulate(sigma, **timing)
    monkeypatch.setattr("pruning.rates.newton_ratio", lambda points, phi: float("nan"))
    linear_speed_up, linear_decisions, *_ = simulate(sigma, **timing)
    return (1 - 1 / speed_up, decisions), (1 - 1 / linear_speed_up, linear_decisions)


def test_newton_saves_what_the_linear_rule_saves_where_times_are_proportional_to_the_model(monkeypatch):
    newton, linear = with_and_without_newton(monkeypatch, 5)
    assert newton == (pytest.approx(0.717, abs=0.001), 3)
    assert linear == (pytest.approx(0.717, abs=0.001), 3)


def test_newton_aligns_sooner_where_a_part_of_the_time_does_not_shrink(monkeypatch):
    newton, linear = with_and_without_newton(monkeypatch, 3, fixed=0.2, noise=0.0, num_clients=5, num_rounds=80)
    assert newton == (pytest.approx(0.542, abs=0.001), 3)
    assert linear == (pytest.approx(0.526, abs=0.001), 4)


def test_newton_saves_71_per_cent_and_the_linear_rule_70_at_sigma_five_with_a_tenth_fixed(monkeypatch):
    newton, linear = with_and_without_newton(monkeypatch, 5, fixed=0.1)
    assert newton == (pytest.approx(0.708, abs=0.001), 3)
    assert linear == (pytest.approx(0.703, abs=0.001), 4)


BENT = [(4.0, 1.0), (2.25, 0.75), (1.2, 0.55)]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (BENT, np.polyval(np.polyfit(*zip(*BENT, strict=True), 2), 1.0)),  # .508; the secant would say .512
        ([(9.0, 0.9), *BENT], np.polyval(np.polyfit(*zip(*BENT, strict=True), 2), 1.0)),  # the last three count
        ([(2.0, 1.0), (1.5, 0.8)], 0.6),
        ([(5.0, 1.0), (3.0, 0.4), (2.0, 0.3)], 0.2),  # the parabola would grow it to a third: the secant
        ([(2.0, 1.0), (3.0, 0.5)], 0.5 / 3),  # slower with a smaller model: in proportion
        ([(4.0, 1.0), (2.0, 0.4)], 0.4 - 0.3),
        ([(4.0, 1.0), (2.0, 0.3)], 0.3 / 2),  # the secant falls below nothing: in proportion
        ([(3.0, 1.0), (3.0, 0.5)], 0.5 / 3),  # equal times have no secant
        ([(2.0, 1.0)], 0.5),  # the linear rule
    ],
)
def test_the_next_ratio_is_newtons_or_the_secants_or_in_proportion(history, expected):
    phi, gamma = history[-1]
    assert _next_ratio(gamma, phi, 1.0, history, replace(TIMING, max_step=0.9)) == pytest.approx(expected, abs=1e-5)


def test_a_cut_is_neither_below_the_least_step_nor_beyond_the_largest_nor_under_the_floor():
    flat = [(2.0, 0.51), (1.2, 0.5)]  # .49875 at 1.1 s
    assert _next_ratio(0.5, 1.2, 1.1, flat, TIMING) == 0.5
    assert _next_ratio(0.5, 1.2, 1.1, flat, replace(TIMING, min_step=0.0)) == pytest.approx(0.49875)
    assert _next_ratio(1.0, 8.0, 1.0, [(8.0, 1.0)], TIMING) == 0.5
    assert _next_ratio(1.0, 8.0, 1.0, [(8.0, 1.0)], replace(TIMING, alpha=0.4)) == pytest.approx(0.65)
    assert _next_ratio(1.0, 8.0, 1.0, [(8.0, 1.0)], replace(TIMING, min_retention_ratio=0.7)) == 0.7


def test_a_point_replaces_those_of_the_same_ratio_and_of_a_time_within_one_per_cent():
    history = ((4.0, 1.0), (2.0, 0.5))
    assert _with_point(history, (1.0, 0.25)) == (*history, (1.0, 0.25))
    assert _with_point(history, (3.0, 1.0)) == ((2.0, 0.5), (3.0, 1.0))
    assert _with_point(history, (2.01, 0.4)) == ((4.0, 1.0), (2.01, 0.4))
    assert _with_point(history, (2.03, 0.4)) == (*history, (2.03, 0.4))


def test_bold_steps_give_six_times_at_sigma_ten():
    assert simulate(10, replace(TIMING, max_step=0.9))[0] >= 6


def test_equal_clients_are_never_pruned_over_a_whole_run():
    for seed in range(5):
        assert (simulate(1, seed=seed)[2] == 1.0).all()


@pytest.mark.parametrize("num_clients", [4, 10, 30])
def test_equal_clients_are_never_pruned_with_the_defaults_either(num_clients):
    for seed in range(20):
        ratios = simulate(1, RateParams(), num_rounds=40, interval=2, seed=seed, num_clients=num_clients)[2]
        assert (ratios == 1.0).all()


def test_a_device_a_ninth_slower_is_still_pruned_with_the_defaults():
    for seed in range(20):
        ratios = simulate(2, RateParams(), num_rounds=40, interval=2, seed=seed)[2]
        assert ratios[0] == 1.0
        assert (ratios[1:] < 1.0).all()


def test_where_times_scatter_by_a_tenth_a_third_timed_round_keeps_more_of_what_a_device_can_bear():
    can_bear = 1 / np.linspace(1, 5, 10)
    lost = {}
    for rounds in (2, 3):
        params = RateParams(min_timed_rounds=rounds)
        runs = [simulate(5, params, num_rounds=60, interval=2, noise=0.1, seed=seed)[2] for seed in range(20)]
        lost[rounds] = 1 - np.mean([ratios / can_bear for ratios in runs])
    assert lost[3] < 0.07 < lost[2] < 0.1


def test_a_floor_that_just_misses_the_target_is_reported_once():
    for seed in range(10):
        floored = simulate(5.25, RateParams(), num_rounds=100, interval=2, seed=seed)[3]
        assert len(floored) == len(set(floored))


def test_a_part_that_does_not_shrink_is_found_and_reported_once():
    _, _, ratios, floored = simulate(5, RateParams(min_retention_ratio=0.2), fixed=0.3)
    assert ratios.min() == 0.2
    assert 9 in floored
    assert len(floored) == len(set(floored))


def test_missing_clients_keep_their_ratio_and_late_joiners_start_full():
    state = {0: ClientRate(times_s=(1.0,) * 4), 1: ClientRate(0.5, ())}
    state = record_time(state, 7, 9.0)
    updated, decision = update_rates(state, TIMING)
    assert updated[1].retention_ratio == 0.5
    assert updated[7].retention_ratio == 1.0
    assert decision.changed == ()


def test_the_first_round_after_a_change_is_not_counted():
    state = {0: ClientRate(times_s=(1.0,) * 4), 1: ClientRate(times_s=(50.0, 1.0, 1.0, 1.0))}
    assert update_rates(state, TIMING)[1].changed == ()


def test_regrow_widens_a_client_that_became_fast():
    slow_once = ClientRate(0.5, (0.5,) * 4, ((2.0, 1.0),))
    state = {0: ClientRate(times_s=(1.0,) * 4), 1: slow_once}
    assert update_rates(state, TIMING)[0][1].retention_ratio == 0.5
    grown = update_rates(state, replace(TIMING, regrow=True))[0][1].retention_ratio
    assert 0.5 < grown <= 0.75


def test_growing_aligns_everybody_with_the_slowest_at_the_floor():
    params = RateParams(direction="grow", min_retention_ratio=0.2, min_timed_rounds=2)
    rng, base, ratios, state = np.random.default_rng(0), np.linspace(1, 5, 10), np.full(10, 0.2), {}
    total = 0.0
    for server_round in range(1, 41):
        times = base * ratios * (1 + 0.02 * rng.standard_normal(10))
        total += times.max()
        for client in range(10):
            state = record_time(state, client, float(times[client]), first_ratio=0.2)
        if server_round % 2 == 0:
            state, decision = update_rates(state, params)
            assert decision.reference == 9
            ratios = np.array([state[client].retention_ratio for client in range(10)])
    assert (np.abs(base * ratios - 1) < 0.1).all()
    assert total < 1.1 * 40  # never longer than the slowest at the floor would take, noise aside


def test_who_joins_late_does_not_set_the_pace_with_a_first_round_alone():
    """Growing waits for the slowest: a cold start would make everybody grow too far."""
    params = RateParams(direction="grow", min_retention_ratio=0.2, min_timed_rounds=2)
    state = {0: ClientRate(0.2, (5.0,) * 3), 1: ClientRate(0.2, (9.0,)), 2: ClientRate(0.2, (2.0,) * 3)}
    updated, decision = update_rates(state, params)
    assert (decision.reference, decision.target_s) == (0, 5.0)
    assert updated[2].retention_ratio == pytest.approx(0.5)
    state = {**state, 1: ClientRate(0.2, (9.0, 6.0))}
    assert update_rates(state, params)[1].reference == 1
    assert update_rates({1: state[1]}, replace(params, min_timed_rounds=9))[1].reference == 1


def work_out(fixed, num_rounds=20, noise=0.0, params=WORK, sigma=5):
    """Ten held clients whose update times are base * (fixed + (1 - fixed) * work); returns work ratios and times."""
    rng, base, state = np.random.default_rng(0), np.linspace(1, sigma, 10), {}
    works, times = np.ones(10), base
    for server_round in range(1, num_rounds + 1):
        times = base * (fixed + (1 - fixed) * works) * (1 + noise * rng.standard_normal(10))
        for client in range(10):
            state = record_time(state, client, float(times[client]), 0.2, float(works[client]))
        if server_round % 2 == 0:
            state, decision = update_rates(state, params)
            assert decision.reference == 9
            assert all(client.retention_ratio == 0.2 for client in state.values())
            works = np.array([state[client].work_ratio for client in range(10)])
    return works, times


@pytest.mark.parametrize("fixed", [0.0, 0.3])
def test_spare_time_becomes_work_until_everybody_takes_as_long_as_the_slowest(fixed):
    params = replace(WORK, max_work_ratio=20.0)
    works, times = work_out(fixed, params=params)
    base = np.linspace(1, 5, 10)
    assert works == pytest.approx((5 / base - fixed) / (1 - fixed), rel=0.08)
    assert (times <= 5 + 1e-9).all(), "filled from below, never beyond the target"


def test_noise_does_not_ratchet_the_target_up_or_the_work_beyond_it():
    works, _ = work_out(0.0, num_rounds=200, noise=0.02)
    assert works[9] == 1
    assert works == pytest.approx(5 / np.linspace(1, 5, 10), rel=0.12)


def test_work_has_a_ceiling_and_none_is_added_where_spare_time_stays_idle():
    assert work_out(0.0, params=replace(WORK, max_work_ratio=2.0))[0].max() == 2.0
    assert (work_out(0.0, params=replace(WORK, spare_time="idle"))[0] == 1).all()


def test_only_a_client_whose_ratio_is_settled_works_longer():
    params = RateParams(direction="grow", spare_time="work", min_retention_ratio=0.2, min_timed_rounds=2)
    state = {0: ClientRate(0.2, (1.0,) * 3), 1: ClientRate(0.2, (0.5,) * 3), 2: ClientRate(1.0, (0.5,) * 3)}
    updated, _ = update_rates(state, params)
    assert updated[1].retention_ratio > 0.2
    assert updated[1].work_ratio == 1
    assert (updated[2].retention_ratio, updated[2].work_ratio) == (1.0, 2.0)


@pytest.mark.parametrize("work_ratio", [1.04, 1.5])
def test_a_client_that_worked_longer_and_becomes_slow_is_pruned_however_little_longer_it_worked(work_ratio):
    params = RateParams(spare_time="work")
    state = {0: ClientRate(times_s=(1.0,) * 3), 1: ClientRate(0.5, (4.0,) * 3, work_ratio=work_ratio)}
    state = update_rates(state, params)[0]
    assert state[1].work_ratio == 1
    state = {**state, 1: replace(state[1], times_s=(4.0,) * 3)}
    assert update_rates(state, params)[1].changed == (1,)


def test_a_little_more_work_within_the_dead_band_stays():
    state = {0: ClientRate(times_s=(1.0,) * 3), 1: ClientRate(0.5, (1.045,) * 3, work_ratio=1.04)}
    assert update_rates(state, RateParams(spare_time="work"))[0] == state


def test_a_time_of_another_amount_of_work_is_left_out():
    state = {0: ClientRate(0.2, (1.0,), work_ratio=2.0)}
    assert record_time(state, 0, 9.0, work_ratio=1.0)[0].times_s == (1.0,)
    assert record_time(state, 0, 1.1, work_ratio=2.0)[0].times_s == (1.0, 1.1)


def test_the_learner_believes_in_the_ratio_that_a_client_really_gets():
    def steps(client, ratio):
        return np.floor(ratio * 4) / 4

    state = {0: ClientRate(times_s=(1.0,) * 4), 1: ClientRate(times_s=(1.6,) * 4)}
    updated, decision = update_rates(state, TIMING, steps)
    assert updated[1].retention_ratio == 0.5
    assert decision.changed == (1,)
    again = {**updated, 1: replace(updated[1], times_s=(1.04,) * 4)}
    assert update_rates({**again, 0: state[0]}, TIMING, steps)[1].changed == ()


def test_slack_raises_the_target():
    state = {0: ClientRate(times_s=(1.0,) * 4), 1: ClientRate(times_s=(1.4,) * 4)}
    assert update_rates(state, replace(TIMING, slack=0.5))[1].changed == ()
    assert update_rates(state, TIMING)[1].changed == (1,)


@given(
    st.lists(st.tuples(st.floats(1, 100), st.floats(0.02, 1)), min_size=1, max_size=3, unique_by=lambda p: round(p[0]))
)
def test_newton_is_the_interpolating_polynomial(points):
    times, ratios = zip(*points, strict=True)
    expected = KroghInterpolator(times, ratios)(1.5)
    assert newton_ratio(points, 1.5) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


@given(
    st.lists(st.floats(0.01, 1000), min_size=2, max_size=8),
    st.lists(st.tuples(st.floats(0.01, 1000), st.floats(0.02, 1)), max_size=5),
    st.floats(0.02, 1),
)
def test_whatever_was_seen_ratios_stay_between_floor_and_where_they_were(times, history, gamma):
    state = {i: ClientRate(times_s=(time,) * 4) for i, time in enumerate(times)}
    state[99] = ClientRate(gamma, (max(times) * 2,) * 4, tuple(history))
    updated, _ = update_rates(state, TIMING)
    for client, rate in updated.items():
        assert 0.02 <= rate.retention_ratio <= state[client].retention_ratio
        assert rate.retention_ratio >= 0.5 * state[client].retention_ratio * (1 - 1e-12)


@pytest.mark.parametrize("time_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_update_time_is_refused(time_s):
    with pytest.raises(RateError):
        record_time({}, 0, time_s)


@pytest.mark.parametrize("bad", [{"alpha": 0}, {"max_step": 1}, {"min_retention_ratio": 0}, {"dead_band": -1}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(RateError, match="expected"):
        RateParams(**bad)
