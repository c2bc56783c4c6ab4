"""LocalTransport: the same instructions to the same client handler, in processes of one machine, without Flower."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch

from wire.message import Failure, Instruction, Report

Handler = Callable[[Instruction], Report]
_READY = "ready"


class LocalTransport:
    """Runs a handler in ``num_workers`` processes; with 0 workers, in this one.

    Parameters
    ----------
    handler : function of a module (worker processes import it by name).
    num_clients : clients that can be addressed.
    num_workers : processes.
    reply_timeout_s : a worker that is busy longer with one request is killed and replaced.
    """

    def __init__(
        self, handler: Handler, num_clients: int, num_workers: int = 0, reply_timeout_s: float = 600.0
    ) -> None:
        self.handler, self.num_clients, self.reply_timeout_s = handler, num_clients, reply_timeout_s
        self._waiting: deque[Instruction] = deque()
        self._workers = [_Worker(handler) for _ in range(num_workers)]

    @property
    def window(self) -> int:
        """Requests worth having under way at once; more would only take memory."""
        return max(1, 2 * len(self._workers))

    def clients(self) -> list[int]:
        """Partition ids that can be addressed."""
        return list(range(self.num_clients))

    def send(self, instruction: Instruction) -> None:
        """Queue one request."""
        self._waiting.append(instruction)
        self._feed()

    def receive(self, timeout_s: float) -> list[Report | Failure]:
        """Return the answers that are ready; wait up to ``timeout_s`` for the first."""
        if not self._workers:
            return [answer(self.handler, self._waiting.popleft())] if self._waiting else []
        busy = {worker.connection: worker for worker in self._workers if worker.current is not None}
        ready = [busy[link] for link in wait(list(busy), timeout=timeout_s) if isinstance(link, Connection)]
        answers = [worker.collect() for worker in ready]
        now = time.monotonic()
        for index, worker in enumerate(self._workers):
            if worker.current is not None and now - worker.started > self.reply_timeout_s:
                answers.append(
                    Failure(
                        worker.current.dispatch, worker.current.partition_id, f"no answer in {self.reply_timeout_s:g} s"
                    )
                )
                worker.close()
            if not worker.process.is_alive() and worker.current is None:
                self._workers[index] = _Worker(self.handler)
        self._feed()
        return answers

    def empty_trips(self) -> list[tuple[int, float]]:
        """None are made: there is no engine here whose overhead would have to be known."""
        return []

    def close(self) -> None:
        """End all worker processes."""
        self._waiting.clear()
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _feed(self) -> None:
        for worker in self._workers:
            if self._waiting and worker.current is None and worker.process.is_alive():
                worker.start(self._waiting.popleft())


class _Worker:
    """One process and the request it works on."""

    def __init__(self, handler: Handler) -> None:
        context = multiprocessing.get_context("forkserver")
        # The first optimiser imports torch._dynamo, two seconds of work: once for all workers instead of in each.
        context.set_forkserver_preload(["torch", "torch._dynamo", "numpy", handler.__module__])
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, handler), daemon=True)
        self.process.start()
        theirs.close()
        self.current: Instruction | None = None
        self.started = 0.0
        self._is_ready = False

    def start(self, instruction: Instruction) -> None:
        self.current = instruction
        try:
            if not self._is_ready:  # seconds of importing are not the client's time
                self._is_ready = self.connection.recv() == _READY
            self.started = time.monotonic()
            self.connection.send(_pack(instruction))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)

    def collect(self) -> Report | Failure:
        assert self.current is not None
        instruction, self.current = self.current, None
        try:
            message: Report | Failure = _unpack(self.connection.recv())
            return message
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            reason = f"worker process died with exit code {self.process.exitcode}"
            return Failure(instruction.dispatch, instruction.partition_id, reason)

    def close(self) -> None:
        self.current = None
        self.process.kill()
        self.process.join(5)
        self.connection.close()


def answer(handler: Handler, instruction: Instruction) -> Report | Failure:
    """Run the handler; what it raises becomes a ``Failure`` that says where."""
    try:
        return handler(instruction)
    except Exception as error:  # a client may raise anything; the server must go on
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"
        return Failure(instruction.dispatch, instruction.partition_id, reason)


def _serve(connection: Connection, handler: Handler) -> None:
    """A worker's life: one request after the other until the pipe closes."""
    torch.set_num_threads(1)
    try:
        connection.send(_READY)
        while True:
            connection.send(_pack(answer(handler, _unpack(connection.recv()))))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _pack(message: Any) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """Tensors travel as numpy arrays: no shared-memory file per tensor."""
    if isinstance(message, Failure):
        return message, {}
    tensors = {"state": message.state, "companions": message.companions}
    arrays = {name: {key: tensor.numpy() for key, tensor in held.items()} for name, held in tensors.items()}
    return replace(message, state={}, companions={}), arrays


def _unpack(packed: tuple[Any, dict[str, dict[str, np.ndarray]]]) -> Any:
    message, arrays = packed
    tensors = {name: {key: torch.from_numpy(array) for key, array in held.items()} for name, held in arrays.items()}
    return replace(message, **tensors) if tensors else message
