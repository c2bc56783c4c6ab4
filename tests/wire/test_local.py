"""The pool of processes: what a handler does wrong costs one answer."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from tests import faulty  # noqa: F401  (worker processes are forked from one that has it)
from wire.local import LocalTransport
from wire.message import DataConfig, Failure, Instruction, Job, ModelConfig, Report, TrainConfig

JOB = Job(ModelConfig(), DataConfig(), TrainConfig(), 4, 9, 3)


def obeys(instruction: Instruction) -> Report:
    """Do what the objective says."""
    if instruction.objective == "raise":
        raise KeyError("no such thing")
    if instruction.objective == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if instruction.objective == "hang":
        threading.Event().wait()
    state = {key: tensor + 1 for key, tensor in instruction.state.items()}
    return Report(instruction.dispatch, instruction.partition_id, state, 1, metrics={"pid": os.getpid()})


def ask(dispatch: int, objective: str = "") -> Instruction:
    state = {"a": torch.arange(6.0).view(2, 3), "scalar": torch.tensor(3)}
    return Instruction("train", dispatch, dispatch % 4, 1, 0, JOB, state, objective=objective)


def answers(transport: LocalTransport, number: int) -> dict[int, Report | Failure]:
    """Wait for ``number`` answers, at most half a minute."""
    got: dict[int, Report | Failure] = {}
    deadline = time.monotonic() + 30
    while len(got) < number and time.monotonic() < deadline:
        got |= {answer.dispatch: answer for answer in transport.receive(0.5)}
    return got


@pytest.fixture(scope="module")
def pool():
    transport = LocalTransport(obeys, 4, num_workers=2, reply_timeout_s=20)
    yield transport
    transport.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_request_is_answered_once(num_workers, pool):
    transport = pool if num_workers else LocalTransport(obeys, 4)
    for dispatch in range(9):
        transport.send(ask(dispatch))
    got = answers(transport, 9)
    assert sorted(got) == list(range(9))
    for answer in got.values():
        assert isinstance(answer, Report)
        assert torch.equal(answer.state["a"], torch.arange(6.0).view(2, 3) + 1)
        assert answer.state["scalar"].dim() == 0
    assert transport.receive(0.0) == []


def test_a_raising_handler_says_what_and_where(pool):
    for transport in (pool, LocalTransport(obeys, 4)):
        transport.send(ask(0, "raise"))
        answer = answers(transport, 1)[0]
        assert isinstance(answer, Failure)
        assert answer.reason.startswith("KeyError: 'no such thing' (test_local.py:")


def test_a_worker_that_dies_is_replaced(pool):
    for dispatch, objective in enumerate(["die", "", "die", "", "die", ""]):
        pool.send(ask(dispatch, objective))
    got = answers(pool, 6)
    assert [isinstance(got[d], Failure) for d in range(6)] == [True, False] * 3
    assert "died with exit code -9" in got[0].reason


def test_a_worker_that_dies_between_two_requests_is_replaced(pool):
    pool.send(ask(0))
    answers(pool, 1)
    for worker in pool._workers:
        worker.process.kill()
        worker.process.join(5)
    for dispatch in (1, 2):
        pool.send(ask(dispatch))
    assert all(isinstance(answer, Report) for answer in answers(pool, 2).values())


def test_a_worker_that_hangs_is_killed_after_the_timeout_and_replaced():
    transport = LocalTransport(obeys, 4, num_workers=1, reply_timeout_s=0.3)
    try:
        for dispatch, objective in enumerate(["hang", "", ""]):
            transport.send(ask(dispatch, objective))
        got = answers(transport, 3)
        assert got[0] == Failure(0, 0, "no answer in 0.3 s")
        assert isinstance(got[1], Report)
        assert isinstance(got[2], Report)
    finally:
        transport.close()


def test_closing_ends_all_processes_even_busy_ones():
    transport = LocalTransport(obeys, 4, num_workers=1)
    processes = [worker.process for worker in transport._workers]
    transport.send(ask(0, "hang"))
    transport.close()
    assert not any(process.is_alive() for process in processes)
