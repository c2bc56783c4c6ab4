"""Who is asked: the free, available clients whose turn it is, drawn by the run's seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from strategies.exchange import Exchange
from strategies.loop import LoopConfig


def choose(
    loop: LoopConfig,
    exchange: Exchange,
    clocks: Mapping[int, int],
    draw: tuple[int, ...],
    takes_part: Callable[[int], bool] = lambda partition_id: True,
) -> list[int]:
    """Return the clients to be asked now, sorted.

    Where nobody is at work and all that may be asked are offline, the virtual clock moves to the first that comes back.

    Parameters
    ----------
    clocks : each client's number of merged answers; who is not in it has none.
    draw : seed of this draw.
    takes_part : whether a client is ever asked.
    """
    durations, busy = exchange.durations, exchange.busy()
    clients = [pid for pid in exchange.transport.clients() if takes_part(pid)]
    free = [pid for pid in clients if pid not in busy]
    if loop.max_lead >= 0:
        slowest = min((clocks.get(pid, 0) for pid in clients), default=0)
        free = [pid for pid in free if clocks.get(pid, 0) - slowest <= loop.max_lead]
    if durations is not None:
        awake = [pid for pid in free if durations.is_available(pid, exchange.now_s)]
        if free and not awake and not busy:
            exchange.advance_to(min(durations.next_available_s(pid, exchange.now_s) for pid in free))
            awake = [pid for pid in free if durations.is_available(pid, exchange.now_s)]
        free = awake
    wanted = loop.clients_per_round or len(free)
    if loop.concurrency:
        wanted = min(wanted, max(0, loop.concurrency - len(busy)))
    if wanted >= len(free):
        return free
    rng = np.random.default_rng(draw)
    return sorted(int(pid) for pid in rng.choice(free, size=wanted, replace=False))
