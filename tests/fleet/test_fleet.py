"""Named fleets."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.clock import DurationModel
from fleet.devices import PROFILES
from fleet.dynamics import Availability, Drift, Shift
from fleet.fleet import Fleet, make_fleet
from fleet.names import FleetError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["uniform", "linear:5", "two-tier", "two-tier:10", "jetson-16", "long-tail"]


def update_times_s(fleet: Fleet, macs: float, down_bytes: float, up_bytes: float) -> np.ndarray:
    model = DurationModel(fleet, seed=0, noise=0)
    return np.array([model.duration(i, 0, macs, down_bytes, up_bytes).update_time_s for i in range(len(fleet))])


@given(
    sigma=st.floats(1, 100),
    num_clients=st.integers(2, 40),
    macs=st.floats(0, 1e12),
    down_bytes=st.floats(0, 1e9),
    up_bytes=st.floats(1, 1e9),
)
def test_update_times_of_equal_work_are_spaced_evenly_between_1_and_sigma(
    sigma, num_clients, macs, down_bytes, up_bytes
):
    times_s = update_times_s(make_fleet(f"linear:{sigma!r}", num_clients), macs, down_bytes, up_bytes)
    np.testing.assert_allclose(times_s / times_s[0], np.linspace(1, sigma, num_clients), rtol=1e-9)


def test_links_of_a_linear_fleet_are_unequal():
    assert len({device.uplink_bytes_per_s for device in make_fleet("linear:5", 10).devices}) == 10


def test_a_linear_fleet_of_one_client_is_the_fastest_device():
    assert make_fleet("linear:5", 1).devices[0] is PROFILES["raspberry-pi-4"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_clients", [1, 2, 7, 16])
def test_every_named_fleet_has_the_asked_number_of_clients_and_nothing_switched_on(name, num_clients):
    fleet = make_fleet(name, num_clients, seed=3)
    assert len(fleet) == num_clients
    assert fleet.availability is None
    assert fleet.drift is None
    assert fleet.drop_out_ratio == 0


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_makes_the_same_fleet(name):
    assert make_fleet(name, 12, seed=5) == make_fleet(name, 12, seed=5)


def test_uniform_clients_take_the_same_time():
    assert np.ptp(update_times_s(make_fleet("uniform", 5), 1e9, 1e6, 1e6)) == 0


def test_second_half_of_two_tiers_is_slower_by_the_ratio():
    times_s = update_times_s(make_fleet("two-tier:3", 6), 1e9, 1e6, 1e6)
    np.testing.assert_allclose(times_s / times_s[0], [1, 1, 1, 3, 3, 3])


def test_jetson_16_has_four_of_each_kind():
    names = [device.name for device in make_fleet("jetson-16", 16).devices]
    assert {name: names.count(name) for name in names} == dict.fromkeys(
        ["jetson-nano", "jetson-tx2", "jetson-xavier-nx", "jetson-orin-nano"], 4
    )


def test_a_long_tail_has_most_clients_fast_and_a_few_very_slow_at_every_seed():
    for seed in range(5):
        speeds = np.array([device.train_flops for device in make_fleet("long-tail", 100, seed).devices])
        slowdowns = speeds.max() / speeds
        assert np.median(slowdowns) < 2
        assert slowdowns.max() > 20


def test_links_of_a_long_tail_are_dealt_out_independently_of_its_compute():
    devices = make_fleet("long-tail", 200).devices
    flops = np.argsort(np.argsort([device.train_flops for device in devices]))
    links = np.argsort(np.argsort([device.uplink_bytes_per_s for device in devices]))
    assert abs(np.corrcoef(flops, links)[0, 1]) < 0.2


def test_another_seed_deals_a_long_tail_out_otherwise():
    assert make_fleet("long-tail", 12, seed=0) != make_fleet("long-tail", 12, seed=1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("liner:5", "Did you mean 'linear'"),
        ("jetson", "Did you mean 'jetson-16'"),
        ("nothing-like-it", "Known: uniform"),
        ("linear", "linear:5"),
        ("linear:fast", "got 'fast'"),
        ("linear:0.5", "a number >= 1"),
        ("linear:nan", "a number >= 1"),
        ("linear:inf", "a number >= 1"),
        ("two-tier:", "got ''"),
        ("uniform:2", "takes no parameter"),
    ],
)
def test_a_name_that_cannot_be_served_is_an_error_that_says_what_would_be(name, expected):
    with pytest.raises(FleetError, match=expected):
        make_fleet(name, 4)


def test_fewer_than_one_client_is_an_error():
    with pytest.raises(FleetError, match="num-clients"):
        make_fleet("uniform", 0)


def test_dynamics_are_switched_on_by_keyword():
    availability, drift = Availability(0.5), Drift(shifts=(Shift(1, 10.0, 2.0),))
    fleet = make_fleet("uniform", 2, availability=availability, drop_out_ratio=0.1, drift=drift)
    assert (fleet.availability, fleet.drop_out_ratio, fleet.drift) == (availability, 0.1, drift)


def test_a_drop_out_ratio_outside_0_to_1_is_an_error():
    with pytest.raises(FleetError, match="drop-out-ratio"):
        make_fleet("uniform", 2, drop_out_ratio=1.5)


def test_a_shift_of_a_client_that_does_not_exist_is_an_error():
    with pytest.raises(FleetError, match="client 2"):
        make_fleet("uniform", 2, drift=Drift(shifts=(Shift(2, 0.0, 2.0),)))


def test_a_fleet_without_devices_is_an_error():
    with pytest.raises(FleetError, match="at least one device"):
        Fleet(())


@pytest.mark.parametrize("partition_id", [-1, 2])
def test_a_client_the_fleet_does_not_have_is_an_error(partition_id):
    with pytest.raises(FleetError, match="0 to 1"):
        make_fleet("uniform", 2)[partition_id]


def test_importing_the_fleet_loads_neither_torch_nor_flower():
    code = "import sys, fleet; print(sorted({'torch', 'flwr', 'sklearn', 'torchvision'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
