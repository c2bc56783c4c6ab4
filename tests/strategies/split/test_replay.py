"""The server's training beside its clients: how it ends."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from strategies.split.replay import Replay, Work


class Slow:
    """A server whose first step lasts until it is told to go on."""

    is_random = False

    def __init__(self) -> None:
        self.num_steps, self.began, self.may_go_on = 0, threading.Event(), threading.Event()

    def step(self, *arguments: Any) -> tuple[float, None]:
        self.num_steps += 1
        self.began.set()
        assert self.may_go_on.wait(10)
        return 0.0, None


def test_a_replay_that_is_closed_ends_its_thread_after_the_step_it_is_at(monkeypatch):
    server = Slow()
    replay = Replay(server, seed=0)  # type: ignore[arg-type]
    replay.put([Work(step, 0, torch.zeros(1), torch.zeros(1)) for step in range(50)], 0.1, 1)
    replay.start()
    thread = replay._thread
    assert thread is not None
    assert server.began.wait(10)
    shutdown = thread.shutdown

    def released() -> None:
        server.may_go_on.set()
        shutdown()

    monkeypatch.setattr(thread, "shutdown", released)
    replay.close()
    assert server.num_steps == 1
    assert not any(other.name.startswith("replay") for other in threading.enumerate())
    replay.close()  # once more does no harm


class Forgetful:
    """A server that counts, at each step, the earlier activations that somebody still holds."""

    is_random = False

    def __init__(self) -> None:
        self.seen: list[weakref.ref[torch.Tensor]] = []
        self.still_held: list[int] = []

    def step(self, partition_id: int, activations: torch.Tensor, *others: Any) -> tuple[float, None]:
        self.still_held.append(sum(ref() is not None for ref in self.seen))
        self.seen.append(weakref.ref(activations))
        return 0.0, None


def test_activations_are_released_as_they_are_used():
    server = Forgetful()
    replay = Replay(server, seed=0)  # type: ignore[arg-type]
    replay.put([Work(step, 0, torch.zeros(8), torch.zeros(1)) for step in range(5)], 0.1, 1)
    replay.finish()
    assert server.still_held == [0] * 5
    assert replay.export_state()["work"] == []
