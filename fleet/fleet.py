"""Fleets: who the clients are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fleet.devices import PROFILES, DeviceProfile
from fleet.dynamics import Availability, Drift, generator
from fleet.fleet_file import read_fleet_file
from fleet.names import FleetError, parse_number, unknown_name

BASE_PROFILE = "raspberry-pi-4"
"""The fastest device of the made-up fleets (uniform, linear, two-tier, long-tail)."""

JETSON_PATTERN = ("jetson-nano", "jetson-tx2", "jetson-xavier-nx", "jetson-orin-nano")
LONG_TAIL_SHAPE = 1.5
_STREAM_LONG_TAIL = 10


@dataclass(frozen=True)
class Fleet:
    """The devices, one per partition, and what changes about them over time.

    Attributes
    ----------
    devices : device of each partition id, [num_clients].
    availability : when clients are online; None: always.
    drop_out_ratio : probability that an update that was begun never arrives, in [0, 1].
    drift : how clients' speeds change; None: not at all.
    name : the name it was made from.

    Raises
    ------
    FleetError : no device, a drop-out ratio outside [0, 1], or a shift of a client the fleet does not have.
    """

    devices: tuple[DeviceProfile, ...]
    availability: Availability | None = None
    drop_out_ratio: float = 0.0
    drift: Drift | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        if not self.devices:
            raise FleetError(f"fleet {self.name!r}: needs at least one device, got none")
        if not 0 <= self.drop_out_ratio <= 1:
            raise FleetError(f"fleet {self.name!r}: drop-out-ratio must lie in [0, 1], got {self.drop_out_ratio!r}")
        for shift in self.drift.shifts if self.drift else ():
            if shift.partition_id >= len(self.devices):
                raise FleetError(
                    f"fleet {self.name!r}: drift shifts client {shift.partition_id}, but partition ids are "
                    f"0 to {len(self.devices) - 1}"
                )

    def __len__(self) -> int:
        return len(self.devices)

    @cached_property
    def speed_ranks(self) -> tuple[int, ...]:
        """Rank of every client by the speed of its device, [num_clients]: the fastest 0, the lower id among equals."""
        order = sorted(range(len(self)), key=lambda pid: (-self.devices[pid].train_flops, pid))
        return tuple(int(rank) for rank in np.argsort(order))

    def __getitem__(self, partition_id: int) -> DeviceProfile:
        """Return the device of ``partition_id``; ``FleetError`` when there is none."""
        if not 0 <= partition_id < len(self.devices):
            raise FleetError(
                f"fleet {self.name!r}: no client {partition_id!r}; partition ids are 0 to {len(self.devices) - 1}"
            )
        return self.devices[partition_id]


def make_fleet(
    name: str,
    num_clients: int,
    seed: int = 0,
    *,
    availability: Availability | None = None,
    drop_out_ratio: float | None = None,
    drift: Drift | None = None,
) -> Fleet:
    """Make a fleet by name.

    ==================  ============================================================================================
    ``uniform``         every client the same device (Raspberry Pi 4)
    ``linear:SIGMA``    client i is ``1 + (SIGMA - 1) * i / (num_clients - 1)`` times slower than the fastest, in
                        compute and on both links: update times of equal work are spaced evenly between 1 and SIGMA
    ``two-tier:RATIO``  the second half RATIO times slower than the first (4 where RATIO is left out)
    ``jetson-16``       Nano, TX2, Xavier NX, Orin Nano in turn: with 16 clients four of each. The testbed of Co-S2P
                        (arXiv 2410.08457) has 16 unequal Jetsons; this mix is ours
    ``long-tail``       most clients fast, a few very slow: slowdowns are the quantiles of a Pareto distribution of
                        shape 1.5, dealt out at random, and independently so for the links
    ``PATH.toml``       a fleet file, see ``fleet/fleet_file.py``
    ==================  ============================================================================================

    Parameters
    ----------
    name : one of the above.
    num_clients : number of devices; a fleet file must name exactly as many.
    seed : which random deal (``long-tail`` only).
    availability, drop_out_ratio, drift : off unless given; given ones replace those of a fleet file.

    Raises
    ------
    FleetError : unknown name, bad parameter, fewer than one client, or a fleet file that cannot be read or is unfit.
    """
    if num_clients < 1:
        raise FleetError(f"fleet {name!r}: num-clients must be >= 1, got {num_clients!r}")
    if name.endswith(".toml"):
        content = read_fleet_file(Path(name))
        if len(content.devices) != num_clients:
            raise FleetError(
                f"fleet file {name}: describes {len(content.devices)} devices, but num-clients is {num_clients}. "
                f"Set num-clients = {len(content.devices)}, or change the counts in the file"
            )
        devices = content.devices
        availability = availability or content.availability
        drop_out_ratio = content.drop_out_ratio if drop_out_ratio is None else drop_out_ratio
        drift = drift or content.drift
    else:
        devices = _named_devices(name, num_clients, seed)
    return Fleet(devices, availability, drop_out_ratio or 0.0, drift, name)


def _named_devices(name: str, num_clients: int, seed: int) -> tuple[DeviceProfile, ...]:
    head, colon, parameter = name.partition(":")
    if head not in _MAKERS:
        raise FleetError(f"{unknown_name('fleet', head, _MAKERS)}, or the path of a .toml file")
    takes, maker = _MAKERS[head]
    if colon and not takes:
        raise FleetError(f"fleet {name!r}: {head} takes no parameter; write {head!r}")
    if head == "linear" and not parameter:
        raise FleetError(f"fleet {name!r}: linear needs the ratio of slowest to fastest, such as 'linear:5'")
    value = parse_number(f"fleet {name!r}", parameter, 1) if colon else 4.0
    return maker(num_clients, value, seed)


def _uniform(num_clients: int, _: float, __: int) -> tuple[DeviceProfile, ...]:
    return (PROFILES[BASE_PROFILE],) * num_clients


def _linear(num_clients: int, sigma: float, _: int) -> tuple[DeviceProfile, ...]:
    return tuple(PROFILES[BASE_PROFILE].slowed(float(factor)) for factor in np.linspace(1, sigma, num_clients))


def _two_tier(num_clients: int, ratio: float, _: int) -> tuple[DeviceProfile, ...]:
    num_fast = (num_clients + 1) // 2
    base = PROFILES[BASE_PROFILE]
    return (base,) * num_fast + (base.slowed(ratio),) * (num_clients - num_fast)


def _jetson(num_clients: int, _: float, __: int) -> tuple[DeviceProfile, ...]:
    return tuple(PROFILES[JETSON_PATTERN[index % len(JETSON_PATTERN)]] for index in range(num_clients))


def _long_tail(num_clients: int, _: float, seed: int) -> tuple[DeviceProfile, ...]:
    # Quantiles instead of draws: a small fleet, too, has its tail, and every seed has the same set of speeds.
    quantiles = (np.arange(num_clients) + 0.5) / num_clients
    slowdowns = (1 - quantiles) ** (-1 / LONG_TAIL_SHAPE)
    rng = generator(seed, _STREAM_LONG_TAIL)
    computes, links = rng.permutation(slowdowns), rng.permutation(slowdowns)
    base = PROFILES[BASE_PROFILE]
    return tuple(base.slowed(float(c), float(k)) for c, k in zip(computes, links, strict=True))


_MAKERS: dict[str, tuple[bool, Callable[[int, float, int], tuple[DeviceProfile, ...]]]] = {
    "uniform": (False, _uniform),
    "linear": (True, _linear),
    "two-tier": (True, _two_tier),
    "jetson-16": (False, _jetson),
    "long-tail": (False, _long_tail),
}
"""Fleet name -> (takes a parameter, maker of its devices)."""
