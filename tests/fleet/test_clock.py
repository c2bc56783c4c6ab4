"""Durations and virtual time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.clock import Duration, DurationModel, VirtualClock
from fleet.devices import DeviceProfile
from fleet.dynamics import Availability, Drift, Shift
from fleet.fleet import Fleet, make_fleet
from fleet.names import FleetError

DEVICE = DeviceProfile("unit", 1e9, 2**30, 1e6, 4e6, "test", overhead_s=0.5)


def test_update_time_is_the_sum_of_its_parts():
    assert Duration(1.0, 2.0, 4.0).update_time_s == 7.0


def test_duration_is_bytes_over_link_and_two_flop_per_mac_over_throughput():
    model = DurationModel(Fleet((DEVICE,)), 0, noise=0)
    assert model.duration(0, 0, 3e9, 8e6, 5e6) == Duration(download_s=2.0, compute_s=6.5, upload_s=5.0)


def test_nothing_to_do_takes_the_overhead():
    assert DurationModel(Fleet((DEVICE,)), 0, noise=0).duration(0, 0, 0, 0, 0).update_time_s == 0.5


def test_noise_depends_on_seed_client_and_dispatch_only():
    fleet = make_fleet("linear:5", 4)
    keys = [(client, index) for client in range(4) for index in range(5)]
    one, other = DurationModel(fleet, 3), DurationModel(fleet, 3)
    in_order = {key: one.duration(*key, 1e9, 1e6, 1e6) for key in keys}
    reversed_order = {key: other.duration(*key, 1e9, 1e6, 1e6) for key in reversed(keys)}
    assert in_order == reversed_order
    assert len({duration.update_time_s for duration in in_order.values()}) == len(keys)


def test_another_seed_gives_other_noise():
    fleet = make_fleet("uniform", 1)
    assert DurationModel(fleet, 0).duration(0, 0, 1e9, 1, 1) != DurationModel(fleet, 1).duration(0, 0, 1e9, 1, 1)


def test_noise_has_median_1_and_the_configured_spread_and_scales_all_parts_alike():
    model = DurationModel(Fleet((DEVICE,)), 0, noise=0.1)
    exact = DurationModel(Fleet((DEVICE,)), 0, noise=0).duration(0, 0, 1e9, 1e6, 1e6)
    noisy = [model.duration(0, index, 1e9, 1e6, 1e6) for index in range(2000)]
    logs = np.log([duration.update_time_s / exact.update_time_s for duration in noisy])
    assert abs(np.median(logs)) < 0.01
    assert abs(logs.std() - 0.1) < 0.01
    ratios = np.array([[d.download_s / exact.download_s, d.upload_s / exact.upload_s] for d in noisy])
    np.testing.assert_allclose(ratios[:, 0], ratios[:, 1])


def test_drift_multiplies_the_duration_of_what_starts_after_it():
    fleet = Fleet((DEVICE, DEVICE), drift=Drift(shifts=(Shift(1, 10.0, 3.0),)))
    model = DurationModel(fleet, 0, noise=0)
    before, after = (model.duration(1, 0, 1e9, 1e6, 1e6, start_s=start_s) for start_s in (9.0, 10.0))
    assert after.update_time_s == pytest.approx(3 * before.update_time_s)
    assert model.duration(0, 0, 1e9, 1e6, 1e6, start_s=10.0) == before


def test_drop_outs_come_at_the_configured_ratio_and_do_not_depend_on_order():
    fleet = make_fleet("uniform", 2, drop_out_ratio=0.3)
    one, other = DurationModel(fleet, 0), DurationModel(fleet, 0)
    lost = [one.drops_out(1, index) for index in range(2000)]
    assert lost == [other.drops_out(1, index) for index in reversed(range(2000))][::-1]
    assert abs(np.mean(lost) - 0.3) < 0.03


def test_by_default_nobody_drops_out_or_goes_away_or_drifts():
    model = DurationModel(make_fleet("long-tail", 3), 0)
    assert not any(model.drops_out(2, index) for index in range(100))
    assert all(model.is_available(2, time_s) for time_s in range(100))
    assert model.next_available_s(2, 5.0) == 5.0
    assert model.slowdown(2, 1e6) == 1


def test_availability_follows_the_fleet():
    model = DurationModel(make_fleet("uniform", 1, availability=Availability(0.4, 10)), 0)
    seen = [model.is_available(0, time_s) for time_s in range(2000)]
    assert 0.3 < np.mean(seen) < 0.5
    away_s = float(seen.index(False))
    assert model.is_available(0, model.next_available_s(0, away_s))


@pytest.mark.parametrize("amount", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_amount_that_is_negative_or_not_finite_is_an_error_that_names_it(amount, position):
    amounts = [1.0, 1.0, 1.0]
    amounts[position] = amount
    with pytest.raises(FleetError, match=("train_macs", "download_bytes", "upload_bytes")[position]):
        DurationModel(Fleet((DEVICE,)), 0).duration(0, 0, *amounts)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.duration(1, 0, 1, 1, 1),
        lambda model: model.drops_out(1, 0),
        lambda model: model.is_available(1, 0),
        lambda model: model.slowdown(1, 0),
    ],
)
def test_a_client_the_fleet_does_not_have_is_an_error(ask):
    with pytest.raises(FleetError, match="no client 1"):
        ask(DurationModel(Fleet((DEVICE,)), 0))


@pytest.mark.parametrize(("seed", "noise"), [(-1, 0.0), (0, -0.1), (0, float("nan"))])
def test_a_bad_seed_or_noise_is_an_error(seed, noise):
    with pytest.raises(FleetError):
        DurationModel(Fleet((DEVICE,)), seed, noise)


@given(times_s=st.lists(st.floats(0, 1e12), min_size=1))
def test_the_clock_shows_the_latest_time_it_was_advanced_to(times_s):
    clock = VirtualClock()
    for time_s in sorted(times_s):
        clock.advance_to(time_s)
        assert clock.now_s == time_s


def test_the_clock_never_goes_back():
    clock = VirtualClock(5.0)
    with pytest.raises(FleetError, match="cannot go back"):
        clock.advance_to(4.9)
    assert clock.now_s == 5.0


@pytest.mark.parametrize("time_s", [-1, float("nan"), float("inf")])
def test_a_time_that_is_negative_or_not_finite_is_an_error(time_s):
    with pytest.raises(FleetError):
        VirtualClock().advance_to(time_s)
