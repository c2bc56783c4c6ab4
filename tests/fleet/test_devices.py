"""What a device profile promises."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.devices import PROFILES, DeviceProfile
from fleet.names import FleetError


def test_every_device_of_the_specification_has_a_profile():
    assert set(PROFILES) == {
        "jetson-nano",
        "jetson-tx2",
        "jetson-xavier-nx",
        "jetson-orin-nano",
        "raspberry-pi-4",
        "raspberry-pi-5",
        "phone-low",
        "phone-mid",
        "phone-high",
        "laptop",
        "server",
    }


@pytest.mark.parametrize("name", PROFILES)
def test_source_says_which_part_of_which_peak_is_sustained_and_where_the_link_comes_from(name):
    profile = PROFILES[name]
    assert profile.name == name
    assert "of the FP32 peak" in profile.source
    assert "link:" in profile.source
    assert profile.memory_bytes >= 2**31


def test_jetsons_are_ordered_by_generation():
    speeds = [PROFILES[f"jetson-{name}"].train_flops for name in ("nano", "tx2", "xavier-nx", "orin-nano")]
    assert speeds == sorted(speeds)


def test_jetson_nano_is_three_tenths_of_128_cores_at_921_6_mhz():
    assert math.isclose(PROFILES["jetson-nano"].train_flops, 0.3 * 128 * 921.6e6 * 2, rel_tol=1e-3)


@given(factor=st.floats(0.01, 100))
def test_slowed_divides_every_throughput_and_keeps_the_memory(factor):
    device = replace(PROFILES["laptop"], overhead_s=0.5)
    slowed = device.slowed(factor)
    assert math.isclose(slowed.train_flops * factor, device.train_flops)
    assert math.isclose(slowed.uplink_bytes_per_s * factor, device.uplink_bytes_per_s)
    assert math.isclose(slowed.downlink_bytes_per_s * factor, device.downlink_bytes_per_s)
    assert math.isclose(slowed.overhead_s, 0.5 * factor)
    assert slowed.memory_bytes == device.memory_bytes


def test_links_can_be_slowed_by_a_factor_of_their_own():
    slowed = PROFILES["laptop"].slowed(2, link_factor=3)
    assert slowed.train_flops == PROFILES["laptop"].train_flops / 2
    assert slowed.uplink_bytes_per_s == PROFILES["laptop"].uplink_bytes_per_s / 3


@pytest.mark.parametrize("field", ["train_flops", "memory_bytes", "uplink_bytes_per_s", "downlink_bytes_per_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_throughput_that_is_not_positive_and_finite_is_an_error_that_names_it(field, value):
    figures = {"train_flops": 1.0, "memory_bytes": 1, "uplink_bytes_per_s": 1.0, "downlink_bytes_per_s": 1.0}
    with pytest.raises(FleetError, match=field):
        DeviceProfile(name="x", source="test", **(figures | {field: value}))


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_a_slowdown_that_is_not_positive_and_finite_is_an_error(factor):
    with pytest.raises(FleetError, match="slowdown"):
        PROFILES["laptop"].slowed(factor)
