"""What our SuperNode does otherwise than Flower's."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from deploy.supernode import Clock, answer_for_the_dead

RUN = 7


class State(InMemoryNodeState):
    """A class of its own, for what is changed is the class."""


def asked(run_id: int) -> Message:
    """A message as a SuperNode keeps it."""
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    message.metadata.__dict__.update(_run_id=run_id, _message_id=f"m{run_id}")
    return message


def replies(state: InMemoryNodeState) -> list[Error]:
    return [message.error for message in state.get_messages_legacy(is_reply=True)]


def test_a_client_that_dies_before_it_takes_its_message_is_answered_for_once(monkeypatch: pytest.MonkeyPatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, RUN)
    task = Task(type=TaskType.CLIENT_APP, run_id=RUN)
    plain = InMemoryNodeState(ObjectStoreFactory().store())
    plain.store_message(asked(RUN))
    plain._on_task_tokens_expired([task])
    assert replies(plain) == []  # where this fails, Flower does it itself

    answer_for_the_dead(State)
    state = State(ObjectStoreFactory().store())
    state.store_message(asked(RUN))
    state.store_message(asked(RUN + 1))
    state._on_task_tokens_expired([task])
    assert [error.code for error in replies(state)] == [ErrorCode.CLIENT_APP_CRASHED]
    assert [message.metadata.run_id for message in state.get_messages_legacy(is_reply=False)] == [RUN + 1]
    state._on_task_tokens_expired([task])
    assert replies(state) == []


def test_the_clock_sleeps_no_longer_than_it_is_told(monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    clock = Clock(0.5)
    clock.sleep(3)
    clock.sleep(0.1)
    assert slept == [0.5, 0.1]
    assert clock.monotonic() > 0
