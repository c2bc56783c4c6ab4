"""Fleets from TOML files."""

from pathlib import Path

import pytest

from fleet import fleet_file
from fleet.devices import PROFILES
from fleet.dynamics import Availability, Drift, Shift
from fleet.fleet import make_fleet
from fleet.names import FleetError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def example() -> str:
    """The example in the module's own docstring."""
    doc = fleet_file.__doc__
    assert doc is not None
    return doc.split("::\n", 1)[1]


def test_the_documented_example_is_a_fleet(tmp_path):
    fleet = make_fleet(write(tmp_path, example()), 4)
    assert fleet.devices[0].train_flops == PROFILES["jetson-nano"].train_flops / 1.5
    assert fleet.devices[0].uplink_bytes_per_s == 500_000
    assert fleet.devices[0].source.endswith("uplink-bytes-per-s from the fleet file")
    assert fleet.devices[0] == fleet.devices[1] == fleet.devices[2]
    assert (fleet.devices[3].name, fleet.devices[3].train_flops, fleet.devices[3].overhead_s) == ("my board", 2e10, 0.5)
    assert isinstance(fleet.devices[3].memory_bytes, int)
    assert fleet.drop_out_ratio == 0.05
    assert fleet.availability == Availability(0.8, 600)
    assert fleet.drift == Drift(0.1, 60, 4, (Shift(2, 100, 3),))


def test_everything_but_the_devices_is_off_unless_the_file_says_otherwise(tmp_path):
    fleet = make_fleet(write(tmp_path, '[[devices]]\nprofile = "laptop"\ncount = 2\n'), 2)
    assert fleet.devices == (PROFILES["laptop"],) * 2
    assert (fleet.availability, fleet.drift, fleet.drop_out_ratio) == (None, None, 0)


def test_keywords_replace_what_the_file_says(tmp_path):
    fleet = make_fleet(write(tmp_path, example()), 4, availability=Availability(0.5), drop_out_ratio=0.0)
    assert fleet.availability == Availability(0.5)
    assert fleet.drop_out_ratio == 0
    assert fleet.drift is not None


def test_a_number_of_clients_that_the_file_does_not_describe_is_an_error_with_the_right_number(tmp_path):
    with pytest.raises(FleetError, match="num-clients = 4"):
        make_fleet(write(tmp_path, example()), 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("devices = 3", r"at least one \[\[devices\]\]"),
        ("x = [", "no valid TOML"),
        ('[[device]]\nprofile = "laptop"', "Did you mean 'devices'"),
        ('[[devices]]\nprofile = "labtop"', "Did you mean 'laptop'"),
        ('[[devices]]\nprofile = ["laptop"]', "profile must be a text, got \\['laptop'\\]"),
        ('[[devices]]\nprofile = "laptop"\ntrain-flop = 3', "Did you mean 'train-flops'"),
        ('[[devices]]\nprofile = "laptop"\ncount = 0', "count must be a whole number >= 1"),
        ('[[devices]]\nprofile = "laptop"\ncount = true', "count must be a whole number >= 1"),
        ('[[devices]]\nprofile = "laptop"\nslowdown = "much"', "slowdown must be a number"),
        ('[[devices]]\nprofile = "laptop"\nslowdown = 0', "slowdown must be a finite number > 0"),
        ('[[devices]]\nprofile = "laptop"\nmemory-bytes = 1.5', "memory-bytes must be a whole number"),
        ('[[devices]]\nprofile = "laptop"\nsource = 3', "source must be a text"),
        (
            '[[devices]]\nname = "x"\ntrain-flops = 1e9',
            "memory-bytes, uplink-bytes-per-s, downlink-bytes-per-s must be",
        ),
        ("devices = [3]", "expected a table"),
        ('[[devices]]\nprofile = "laptop"\n[availability]\nratio = 1', "Did you mean 'online-ratio'"),
        ('[[devices]]\nprofile = "laptop"\n[availability]\nonline-ratio = 0', r"\(0, 1\]"),
        ('[[devices]]\nprofile = "laptop"\n[availability]\nmean-online-s = 3', "online-ratio must be given"),
        ('[[devices]]\nprofile = "laptop"\n[drift]\nshifts = 3', "shifts must be a list"),
        ('[[devices]]\nprofile = "laptop"\n[drift]\nshifts = [{ time-s = 3 }]', "partition-id, slowdown must be given"),
        ('drop-out-ratio = "often"\n[[devices]]\nprofile = "laptop"', "drop-out-ratio must be a number"),
    ],
)
def test_a_bad_file_is_an_error_that_says_where_and_what(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(FleetError, match=expected) as caught:
        make_fleet(path, 1)
    assert path in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FleetError, match="cannot be read"):
        make_fleet(str(tmp_path / "none.toml"), 1)
