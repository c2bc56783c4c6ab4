"""When a round closes, and when a run has come to nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from strategies.exchange import Arrival, Exchange
from strategies.loop import LoopConfig


class RunStoppedError(RuntimeError):
    """The run cannot go on, or has come to nothing; the last checkpoint holds everything merged so far."""


class EmptyRounds:
    """Counts rounds without a usable answer.

    Parameters
    ----------
    most : stop at so many in a row.
    """

    def __init__(self, most: int) -> None:
        self._most, self._in_a_row, self._has_any = most, 0, False

    def note(self, num_merged: int | None) -> None:
        """Take in one round: the number of answers merged, None where nobody was asked by design.

        Raises
        ------
        RunStoppedError
            If it was one empty round too many.
        """
        self._in_a_row = 0 if num_merged or num_merged is None else self._in_a_row + 1
        self._has_any = self._has_any or self._in_a_row > 0
        if self._in_a_row >= self._most:
            raise RunStoppedError(
                f"no usable answer in {self._in_a_row} rounds in a row; the event log has the reasons, and the last "
                "checkpoint is kept"
            )

    def conclude(self, num_merged: int) -> None:
        """End the run, in all of which ``num_merged`` answers were merged.

        Raises
        ------
        RunStoppedError
            If rounds were empty and none brought anything: what would be called the result is the initial model.
        """
        if self._has_any and not num_merged:
            raise RunStoppedError(
                "nothing was merged in the whole run, the model is the one it began with; the event log has the reason "
                "of every answer that failed or was rejected"
            )


def arrivals(exchange: Exchange, loop: LoopConfig, began_s: float, num_merged: Callable[[], int]) -> Iterable[Arrival]:
    """Yield answers until the round that began at ``began_s`` closes; ``num_merged`` says how many counted so far."""
    if loop.is_barrier:
        while (arrival := exchange.next_in_dispatch_order()) is not None:
            yield arrival
        return
    deadline_s = loop.deadline_of(began_s)
    while not loop.is_closed(num_merged(), began_s, exchange.now_s):
        arrival = exchange.next_arrival(deadline_s)
        if arrival is None and math.isfinite(deadline_s):
            exchange.advance_to(deadline_s)
            if not num_merged():  # a deadline closes a round only once something has arrived
                arrival = exchange.next_arrival()
        if arrival is None:
            return
        yield arrival
