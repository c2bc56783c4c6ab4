"""CPU seconds of rivals that take turns within one process, so that other work on the machine touches them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from bench.common import settle

Step = Callable[[], object]


def take_turns(steps: Mapping[str, Step], least: int, budget_s: float = 0.0) -> dict[str, list[float]]:
    """CPU seconds of every step, by name: ``least`` turns or more, until ``budget_s`` of wall time are spent.

    Turns go back and forth, and one before them warms up: what is allocated once is nobody's cost.
    """
    for step in steps.values():
        step()
    settle()
    times: dict[str, list[float]] = {name: [] for name in steps}
    began, forth = time.perf_counter(), list(steps)
    while len(times[forth[0]]) < least or time.perf_counter() - began < budget_s:
        for name in forth:
            started = time.process_time()
            steps[name]()
            times[name].append(time.process_time() - started)
        forth.reverse()
    return times


def typical_s(times: Sequence[float]) -> float:
    """Mean of the fastest half: whatever else a machine does makes a step slower, never faster."""
    return statistics.fmean(sorted(times)[: max(1, len(times) // 2)])
