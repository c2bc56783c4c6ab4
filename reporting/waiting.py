"""Who waited for whom.

A client whose reply has arrived waits until the merge that closes its round; with semi-asynchronous strategies that is
the merge that empties the buffer, unless the client was given new work before. The last arrival before a merge is its
straggler. An arrival that came after its round was closed waits for nobody.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from reporting.log import RunLog
from reporting.rows import Arrival, Merge


@dataclass(frozen=True)
class Wait:
    """One arrival and the seconds it waited; ``straggler``: the partition it waited for, None for the last one."""

    arrival: Arrival
    wait_s: float
    straggler: int | None


@dataclass(frozen=True)
class Closing:
    """One merge, its straggler, and by how much that straggler alone held the merge up (against the second last)."""

    merge: Merge
    straggler: int | None
    held_up_s: float
    wait_s: float
    busy_s: float

    @property
    def wait_ratio(self) -> float:
        """Share of the participants' time between dispatch and merge that went into waiting."""
        return self.wait_s / (self.wait_s + self.busy_s) if self.wait_s + self.busy_s > 0 else 0.0


def find_waits(log: RunLog) -> tuple[tuple[Wait, ...], tuple[Closing, ...]]:
    """Return the wait of every arrival that has a finish time, and one ``Closing`` per merge."""
    merges = sorted(log.merges, key=lambda row: row.time_s)
    times = [row.time_s for row in merges]
    starts: dict[int, list[float]] = {}
    for arrival in log.arrivals:
        if arrival.start_s is not None:
            starts.setdefault(arrival.partition_id, []).append(arrival.start_s)
    for own in starts.values():
        own.sort()
    held: list[list[Arrival]] = [[] for _ in merges]
    waits: list[Wait] = []
    for arrival in log.arrivals:
        if arrival.finish_s is None:
            continue
        index = bisect_left(times, _just_before(arrival.finish_s))
        if arrival.status == "late" or index == len(merges):
            waits.append(Wait(arrival, 0.0, None))
        else:
            held[index].append(arrival)
    closings = []
    for merge, arrivals in zip(merges, held, strict=True):
        merged = [row for row in arrivals if row.status == "merged"] or arrivals
        finishes = sorted((row.finish_s or 0.0, row.partition_id) for row in merged)
        last = finishes[-1] if finishes else None
        here = []
        for row in arrivals:
            finish_s, own = row.finish_s or 0.0, starts.get(row.partition_id, [])
            index = bisect_left(own, _just_before(finish_s))
            until_s = min(merge.time_s, own[index]) if index < len(own) else merge.time_s
            wait_s = max(0.0, until_s - finish_s) if row.update_time_s > 0 else 0.0
            is_last = last is not None and row.partition_id == last[1]
            here.append(Wait(row, wait_s, None if is_last or last is None else last[1]))
        held_up_s = finishes[-1][0] - finishes[-2][0] if len(finishes) > 1 else 0.0
        busy_s = sum(row.update_time_s for row in arrivals)
        closings.append(Closing(merge, last[1] if last else None, held_up_s, sum(w.wait_s for w in here), busy_s))
        waits += here
    waits.sort(key=lambda wait: wait.arrival.line)
    return tuple(waits), tuple(closings)


def _just_before(time_s: float) -> float:
    """Times are sums of floats: what happens at one moment may lie an ulp apart in the log."""
    return time_s - 1e-9 * max(1.0, abs(time_s))
