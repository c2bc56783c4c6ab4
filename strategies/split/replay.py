"""Replay: the server trains on uploads in the order of their steps, while the clients go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from strategies.split.server import SplitServer


@dataclass(frozen=True)
class Work:
    """One server step to make.

    Attributes
    ----------
    step, partition_id : in this order the server goes through them: round-robin over clients.
    activations, labels : of the batch.
    """

    step: int
    partition_id: int
    activations: Tensor
    labels: Tensor


class Replay:
    """At most one batch of work at a time: put, then start (in a thread) or not, then collect its losses.

    Nobody else may touch the server between ``start`` and ``finish``. A batch that was put and not started yet is part
    of a checkpoint.

    Attributes
    ----------
    gradients : where they are wanted, each client's last (step, gradient of its activations).
    """

    def __init__(self, server: SplitServer, seed: int, wants_gradients: bool = False) -> None:
        self.server, self.seed, self.wants_gradients = server, seed, wants_gradients
        self.gradients: dict[int, tuple[int, Tensor]] = {}
        self._job: deque[Work] | None = None
        self._rate, self._round = 0.0, 0
        self._losses: dict[int, list[float]] | None = None
        self._future: Future[dict[int, list[float]]] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._is_closed = False

    def put(self, work: Sequence[Work], learning_rate: float, server_round: int) -> None:
        """Queue work; what was put before must have been collected."""
        assert self._job is None
        assert self._losses is None
        self._job = deque(sorted(work, key=lambda item: (item.step, item.partition_id)))
        self._rate, self._round = learning_rate, server_round

    def start(self) -> None:
        """Begin beside the caller, who goes on."""
        if self._job is None or self._future is not None or self.server.is_random:
            return
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="replay")
        self._future = self._thread.submit(self._run, self._job)

    @property
    def is_running(self) -> bool:
        """Whether a thread is at work on the server."""
        return self._future is not None

    def finish(self) -> None:
        """Return when everything that was put is done."""
        if self._job is None:
            return
        self._losses = self._future.result() if self._future is not None else self._run(self._job)
        self._job = self._future = None

    def collect(self) -> dict[int, list[float]]:
        """Losses of the work by client, once."""
        self.finish()
        losses, self._losses = self._losses, None
        return losses or {}

    def close(self) -> None:
        """End the thread, after the step that it is at; the rest of its work is lost."""
        self._is_closed = True
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _run(self, job: deque[Work]) -> dict[int, list[float]]:
        losses: dict[int, list[float]] = {}
        while job and not self._is_closed:
            item = job.popleft()  # activations go as they are used: the next uploads are on their way
            place = (self.seed, self._round, item.step, item.partition_id)
            loss, gradient = self.server.step(
                item.partition_id, item.activations, item.labels, self._rate, place, self.wants_gradients
            )
            if gradient is not None:
                self.gradients[item.partition_id] = (item.step, gradient)
            losses.setdefault(item.partition_id, []).append(loss)
        return losses

    def export_state(self) -> dict[str, Any]:
        """What was put and not collected; work under way is finished first."""
        if self._future is not None:
            self.finish()
        work = [
            {"at": [w.step, w.partition_id], "activations": w.activations, "labels": w.labels} for w in self._job or ()
        ]
        losses = None if self._losses is None else {str(pid): values for pid, values in self._losses.items()}
        place = {"has_job": self._job is not None, "rate": self._rate, "round": self._round}
        return {**place, "work": work, "losses": losses}

    def import_state(self, raw: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        work = deque(Work(w["at"][0], w["at"][1], w["activations"], w["labels"]) for w in raw["work"])
        self._job = work if raw["has_job"] else None
        self._rate, self._round = raw["rate"], raw["round"]
        losses = raw["losses"]
        self._losses = None if losses is None else {int(pid): values for pid, values in losses.items()}


def mean_losses(losses: dict[int, list[float]]) -> dict[int, float]:
    """Client -> mean loss."""
    return {pid: sum(values) / len(values) for pid, values in losses.items()}


def as_work(partition_id: int, steps: Sequence[Any]) -> list[Work]:
    """The steps of one client's upload as work."""
    return [Work(item.step, partition_id, item.activations, item.labels) for item in steps]
