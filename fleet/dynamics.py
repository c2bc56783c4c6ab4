"""What changes about clients over time: whether they are there, and how fast they are.

Every model is a function of (seed, partition_id, time): the answer for a moment does not depend on which moments were
asked about before, so the order in which an event loop asks cannot change a run.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import exp, inf, isfinite, log

import numpy as np

from fleet.names import FleetError

# Which random stream is which; fixed numbers, since changing one changes every recorded run.
STREAM_NOISE, STREAM_DROP_OUT, STREAM_AVAILABILITY, STREAM_DRIFT = 1, 2, 3, 4


def generator(seed: int, *key: int) -> np.random.Generator:
    """Return the random stream of ``(seed, *key)``, independent of every other key's.

    Raises
    ------
    FleetError : the seed or a part of the key is negative.
    """
    if seed < 0 or any(part < 0 for part in key):
        raise FleetError(f"random stream: seed and key must be >= 0, got seed {seed} and key {key}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _check_range(what: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if not (isfinite(value) and (low < value if low_open else low <= value) and value <= high):
        bounds = (
            f"{'(' if low_open else '['}{low:g}, {high:g}]" if high < inf else f"{'>' if low_open else '>='} {low:g}"
        )
        raise FleetError(f"{what}: expected a finite number in range {bounds}, got {value!r}")


@dataclass(frozen=True)
class Availability:
    """Clients come and go: an alternating renewal process with exponential stays, in equilibrium from time 0.

    Attributes
    ----------
    online_ratio : long-run fraction of time a client is online, in (0, 1].
    mean_online_s : mean length of one stay online, seconds. The mean time offline is
        ``mean_online_s * (1 - online_ratio) / online_ratio``.
    """

    online_ratio: float
    mean_online_s: float = 600.0

    def __post_init__(self) -> None:
        _check_range("availability: online-ratio", self.online_ratio, 0, 1, low_open=True)
        _check_range("availability: mean-online-s", self.mean_online_s, 0, inf, low_open=True)

    @property
    def mean_offline_s(self) -> float:
        """Mean length of one stay offline, seconds."""
        return self.mean_online_s * (1 - self.online_ratio) / self.online_ratio


@dataclass(frozen=True)
class Shift:
    """One client changes its speed for good.

    Attributes
    ----------
    partition_id : the client.
    time_s : when, seconds.
    slowdown : how many times slower than its profile it is from then on; below 1 is faster.
    """

    partition_id: int
    time_s: float
    slowdown: float

    def __post_init__(self) -> None:
        _check_range("drift shift: partition-id", self.partition_id, 0, inf)
        _check_range("drift shift: time-s", self.time_s, 0, inf)
        _check_range("drift shift: slowdown", self.slowdown, 0, inf, low_open=True)


@dataclass(frozen=True)
class Drift:
    """Clients change their speed: a reflected random walk of the logarithm of the slowdown, and planned shifts.

    ``log slowdown`` starts at 0, gains a normal step every ``interval_s`` and is reflected at +-``log(max_ratio)``.

    Attributes
    ----------
    step_ratio : standard deviation of one step of the logarithm; .1 is about 10 % per interval, 0 leaves the shifts.
    interval_s : time between steps, seconds.
    max_ratio : the walk stays within ``[1 / max_ratio, max_ratio]``.
    shifts : planned changes; the latest one that has happened multiplies the walk.
    """

    step_ratio: float = 0.0
    interval_s: float = 60.0
    max_ratio: float = 4.0
    shifts: tuple[Shift, ...] = ()

    def __post_init__(self) -> None:
        _check_range("drift: step-ratio", self.step_ratio, 0, inf)
        _check_range("drift: interval-s", self.interval_s, 0, inf, low_open=True)
        _check_range("drift: max-ratio", self.max_ratio, 1, inf, low_open=True)


class OnlineTimes:
    """The stays of one client, made as far as they are asked for.

    Parameters
    ----------
    availability : the model.
    seed, partition_id : which random stream.
    """

    def __init__(self, availability: Availability, seed: int, partition_id: int) -> None:
        self._availability = availability
        self._rng = generator(seed, STREAM_AVAILABILITY, partition_id)
        self._starts_online = bool(self._rng.random() < availability.online_ratio)
        self._switches_s: list[float] = []

    def is_online(self, time_s: float) -> bool:
        """Whether the client is online at ``time_s``."""
        if self._availability.online_ratio == 1:
            return True
        return self._starts_online == (self._num_switches(time_s) % 2 == 0)

    def next_online_s(self, time_s: float) -> float:
        """The first moment at or after ``time_s`` at which the client is online, seconds."""
        return time_s if self.is_online(time_s) else self._switches_s[self._num_switches(time_s)]

    def _num_switches(self, time_s: float) -> int:
        while not self._switches_s or self._switches_s[-1] <= time_s:
            # An even number each time, so that every stretch begins with the same state.
            stays_s = self._rng.standard_exponential((32, 2))
            means_s = (self._availability.mean_online_s, self._availability.mean_offline_s)
            stays_s *= means_s if self._starts_online else means_s[::-1]
            last_s = self._switches_s[-1] if self._switches_s else 0.0
            self._switches_s.extend((last_s + np.cumsum(stays_s)).tolist())
        return bisect_right(self._switches_s, time_s)


class Slowdown:
    """How many times slower than its profile one client is, over time.

    Parameters
    ----------
    drift : the model.
    seed, partition_id : which random stream, and whose shifts.
    """

    def __init__(self, drift: Drift, seed: int, partition_id: int) -> None:
        self._drift = drift
        self._rng = generator(seed, STREAM_DRIFT, partition_id)
        self._walk = np.zeros(1)
        self._shifts = sorted(
            (shift for shift in drift.shifts if shift.partition_id == partition_id), key=lambda shift: shift.time_s
        )

    def at(self, time_s: float) -> float:
        """Slowdown at ``time_s``: 1 is the profile's speed, 2 half of it."""
        shifted = [shift.slowdown for shift in self._shifts if shift.time_s <= time_s]
        return (shifted[-1] if shifted else 1.0) * self._walked(time_s)

    def _walked(self, time_s: float) -> float:
        if self._drift.step_ratio == 0:
            return 1.0
        step = int(time_s // self._drift.interval_s)
        while len(self._walk) <= step:
            # Twice as long each time: a few allocations however far ahead somebody asks, and the same numbers.
            steps = self._rng.standard_normal(len(self._walk)) * self._drift.step_ratio
            self._walk = np.concatenate([self._walk, self._walk[-1] + np.cumsum(steps)])
        # Folding a free walk into the strip is the same in law as reflecting it at the strip's edges.
        bound = log(self._drift.max_ratio)
        folded = abs((self._walk[step] - bound) % (4 * bound) - 2 * bound) - bound
        return exp(float(folded))
