"""Travel: what of a round trip was the link and what the engine, from nothing but round trips.

In deployment an answer takes ``elapsed_s`` from sending the request to receiving the answer, on the server's clock, of
which the client's process says it was busy for ``busy_s``, on the client's: two differences, so offsets of clocks do
not matter. The rest, the travel time, is engine overhead (polling, queues, the start of the process) and the link::

    travel_s = elapsed_s - busy_s = overhead_s + num_bytes / bytes_per_s + waiting_s,   waiting_s >= 0

Waiting is never negative and often close to zero, so the line that lies below all points and closest to them has the
link's speed as its slope: the maximum-likelihood fit under exponential waiting, a linear program in two variables
(Moon, Skelly, Towsley 1999 estimate clock skew in this way). Requests that carry nothing anchor it at zero bytes: they
are few, sent when a client joins, and where all its messages have one size nothing else tells overhead and link apart.
So they are kept however many messages follow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

SURE = 3
"""Messages of a client after which the line is believed; until then its worst empty round trip counts as overhead."""
WINDOW = 32
"""Loaded round trips remembered for each client, and as many empty ones: a link that becomes slower is believed after
so many messages, one that becomes faster at once."""


class TravelModel:
    """Learns the overhead and the link speed of every client."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._loaded: dict[int, deque[tuple[float, float]]] = {}
        self._empty: dict[int, deque[tuple[float, float]]] = {}  # not pushed out by messages

    def observe(self, partition_id: int, num_bytes: float, travel_s: float) -> None:
        """Note one round trip of ``num_bytes``, both ways together, that took ``travel_s`` beside the client's work."""
        kind = self._loaded if num_bytes > 0 else self._empty
        points = kind.setdefault(partition_id, deque(maxlen=self._window))
        points.append((float(num_bytes), max(0.0, travel_s)))

    def transfer_s(self, partition_id: int, num_bytes: float) -> float:
        """Seconds that ``num_bytes`` need on the client's link; 0 while nothing tells link and overhead apart."""
        loaded, empty = list(self._loaded.get(partition_id, ())), list(self._empty.get(partition_id, ()))
        if empty and len(loaded) < SURE:  # one unlucky round trip must not pass for a slow link
            empty = [max(empty)]
        return num_bytes * line_below([*empty, *loaded])[1]


def line_below(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(intercept, slope >= 0) of the line below all points (x, y) with the least sum of distances in y.

    With only one x the slope is 0.
    """
    if not points:
        return 0.0, 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    best = (min(y for _, y in points), 0.0)
    lowest: dict[float, float] = {}
    for x, y in points:
        lowest[x] = min(y, lowest.get(x, y))
    corners = sorted(lowest.items())
    for i, (left, low) in enumerate(corners):
        for right, high in corners[i + 1 :]:
            slope = (high - low) / (right - left)
            intercept = low - slope * left
            is_below = all(intercept + slope * x <= y + 1e-9 for x, y in corners)
            if slope > 0 and is_below and intercept + slope * mean_x > best[0] + best[1] * mean_x:
                best = intercept, slope
    return best
