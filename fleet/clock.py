"""Virtual time: how long an update takes on a device, and what time it is.

The update time of a client is the sum of three parts (AdaptCL calls it phi)::

    download_s = download_bytes / downlink_bytes_per_s
    compute_s  = 2 * train_macs / train_flops + overhead_s         (1 MAC = 2 FLOP)
    upload_s   = upload_bytes / uplink_bytes_per_s

each times the client's slowdown at the start (drift) and one noise factor of the update, ``exp(noise * z)``, z standard
normal: log-normal with median 1. z belongs to (seed, partition_id, dispatch_index) and to nothing else, so neither the
order of events nor the number of processes changes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite

from fleet.dynamics import STREAM_DROP_OUT, STREAM_NOISE, OnlineTimes, Slowdown, generator
from fleet.fleet import Fleet
from fleet.names import FleetError

FLOP_PER_MAC = 2


@dataclass(frozen=True)
class Duration:
    """How long one update takes, in seconds.

    Attributes
    ----------
    download_s : receiving the sub-model.
    compute_s : training it.
    upload_s : sending it back.
    """

    download_s: float
    compute_s: float
    upload_s: float

    @property
    def update_time_s(self) -> float:
        """Receive + train + send, seconds."""
        return self.download_s + self.compute_s + self.upload_s


class DurationModel:
    """Durations, drop-outs and availability of a fleet.

    Parameters
    ----------
    fleet : the devices and their dynamics.
    seed : seed of every random stream, >= 0.
    noise : standard deviation of the logarithm of an update's duration, >= 0; .02 is about 2 %.

    Raises
    ------
    FleetError : a negative seed, or a noise that is not a finite number >= 0.
    """

    def __init__(self, fleet: Fleet, seed: int, noise: float = 0.02) -> None:
        if not (isfinite(noise) and noise >= 0):
            raise FleetError(f"duration model: noise must be a finite number >= 0, got {noise!r}")
        if seed < 0:
            raise FleetError(f"duration model: seed must be >= 0, got {seed!r}")
        self.fleet = fleet
        self.seed = seed
        self.noise = noise
        self._online_times: dict[int, OnlineTimes] = {}
        self._slowdowns: dict[int, Slowdown] = {}

    def duration(
        self,
        partition_id: int,
        dispatch_index: int,
        train_macs: float,
        download_bytes: float,
        upload_bytes: float,
        start_s: float = 0.0,
    ) -> Duration:
        """Return how long an update takes.

        Parameters
        ----------
        partition_id : the client.
        dispatch_index : number of this request in the whole run, the key of the noise.
        train_macs : multiply-accumulates of the whole update, forward and backward, all steps.
        download_bytes, upload_bytes : bytes on the wire each way.
        start_s : when it starts; matters under drift only (the speed at the start holds for the update).

        Raises
        ------
        FleetError : an unknown client, or an amount that is not a finite number >= 0.
        """
        device = self.fleet[partition_id]
        amounts = {"train_macs": train_macs, "download_bytes": download_bytes, "upload_bytes": upload_bytes}
        for name, amount in amounts.items():
            if not (isfinite(amount) and amount >= 0):
                raise FleetError(f"duration of client {partition_id}: {name} must be finite and >= 0, got {amount!r}")
        factor = self.slowdown(partition_id, start_s) * self._noise_factor(partition_id, dispatch_index)
        return Duration(
            download_s=factor * download_bytes / device.downlink_bytes_per_s,
            compute_s=factor * (FLOP_PER_MAC * train_macs / device.train_flops + device.overhead_s),
            upload_s=factor * upload_bytes / device.uplink_bytes_per_s,
        )

    def slowdown(self, partition_id: int, time_s: float) -> float:
        """How many times slower than its profile the client is at ``time_s`` (drift); 1 without drift."""
        _check_time(time_s)
        self.fleet[partition_id]
        if self.fleet.drift is None:
            return 1.0
        if partition_id not in self._slowdowns:
            self._slowdowns[partition_id] = Slowdown(self.fleet.drift, self.seed, partition_id)
        return self._slowdowns[partition_id].at(time_s)

    def drops_out(self, partition_id: int, dispatch_index: int) -> bool:
        """Whether this update is lost: the client never answers."""
        self.fleet[partition_id]
        if self.fleet.drop_out_ratio == 0:
            return False
        draw = generator(self.seed, STREAM_DROP_OUT, partition_id, dispatch_index).random()
        return bool(draw < self.fleet.drop_out_ratio)

    def is_available(self, partition_id: int, time_s: float) -> bool:
        """Whether the client is online at ``time_s``."""
        times = self._online(partition_id, time_s)
        return times is None or times.is_online(time_s)

    def next_available_s(self, partition_id: int, time_s: float) -> float:
        """The first moment at or after ``time_s`` at which the client is online, seconds."""
        times = self._online(partition_id, time_s)
        return time_s if times is None else times.next_online_s(time_s)

    def _online(self, partition_id: int, time_s: float) -> OnlineTimes | None:
        _check_time(time_s)
        self.fleet[partition_id]
        if self.fleet.availability is None:
            return None
        if partition_id not in self._online_times:
            self._online_times[partition_id] = OnlineTimes(self.fleet.availability, self.seed, partition_id)
        return self._online_times[partition_id]

    def _noise_factor(self, partition_id: int, dispatch_index: int) -> float:
        if self.noise == 0:
            return 1.0
        return exp(self.noise * generator(self.seed, STREAM_NOISE, partition_id, dispatch_index).standard_normal())


def _check_time(time_s: float) -> None:
    if not (isfinite(time_s) and time_s >= 0):
        raise FleetError(f"time must be a finite number of seconds >= 0, got {time_s!r}")


class VirtualClock:
    """The time of a simulated run: it moves when it is told to, and never backwards.

    Parameters
    ----------
    now_s : the time it starts at, seconds >= 0.
    """

    def __init__(self, now_s: float = 0.0) -> None:
        _check_time(now_s)
        self._now_s = float(now_s)

    @property
    def now_s(self) -> float:
        """The time, seconds since the run began."""
        return self._now_s

    def advance_to(self, time_s: float) -> None:
        """Move to ``time_s``; ``FleetError`` when that lies in the past."""
        _check_time(time_s)
        if time_s < self._now_s:
            raise FleetError(f"virtual clock: cannot go back from {self._now_s!r} s to {time_s!r} s")
        self._now_s = float(time_s)
