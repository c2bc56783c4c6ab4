"""When what crosses the network: the two phases of a run, and the stretches of a round."""

from __future__ import annotations

import math
from dataclasses import dataclass


def num_local_rounds(kappa: float, num_rounds: int) -> int:
    """floor(kappa R): rounds in which nothing crosses the network; never all of them, for kappa is below 1."""
    return min(math.floor(kappa * num_rounds + 1e-9), num_rounds - 1)


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of a round that clients make on one request.

    Attributes
    ----------
    start, stop : first step, and the one after the last.
    decides : whether it opens a segment: who may upload is decided anew.
    """

    start: int
    stop: int
    decides: bool


def stretch_at(start: int, num_steps: int | None, num_segments: int, max_steps: int) -> Stretch | None:
    """The stretch that begins at ``start``; None at the end of the round.

    Parameters
    ----------
    num_steps : of the client that makes most; None while nobody knows: then stretches go on without an end.
    num_segments : decisions a round; a segment has ``num_steps / num_segments`` steps, rounded up or down.
    max_steps : that one upload can hold; a longer segment is split, and its choice stands.
    """
    if num_steps is None:
        return Stretch(start, start + max_steps, start == 0)
    if start >= num_steps:
        return None
    bounds = [math.ceil(num_steps * m / num_segments) for m in range(num_segments + 1)]
    end = next(bound for bound in bounds if bound > start)
    return Stretch(start, min(end, start + max_steps), start in bounds)
