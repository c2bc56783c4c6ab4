"""Instructions and reports as Flower records, and the transport over a grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.spec import FULL, SubModelSpec
from wire.grid import (
    GridTransport,
    NoClientsError,
    instruction_to_record,
    record_to_instruction,
    record_to_report,
    report_to_record,
)
from wire.message import CompressionConfig, DataConfig, Failure, Instruction, Job, ModelConfig, Report, TrainConfig
from wire.roster import HEAD, partition_record
from wire.spec import spec_from_json, spec_to_json

JOB = Job(
    ModelConfig("resnet8", 0.5), DataConfig(partition="iid"), TrainConfig(), 4, 9, 3, CompressionConfig("dgc"), "/x"
)
STATE = {
    "conv.weight": torch.randn(3, 2, 1, 1),
    "norm.num_batches_tracked": torch.tensor(7),
    "half": torch.randn(2).half(),
    "index": torch.tensor([1, 2], dtype=torch.int32),
}

specs = st.builds(
    SubModelSpec.of,
    st.dictionaries(st.text(min_size=1, max_size=8), st.sets(st.integers(0, 200), min_size=1), max_size=4),
    st.none() | st.integers(1, 50),
)


def same_states(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return list(first) == list(second) and all(
        torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first
    )


@settings(max_examples=30)
@given(specs)
def test_every_spec_comes_back_as_it_went(spec):
    assert spec_from_json(spec_to_json(spec)) == spec


def test_no_spec_comes_back_as_none():
    assert spec_from_json(spec_to_json(None)) is None


NO_TENSORS = {"state": 0, "companions": 0}


@settings(max_examples=30)
@given(specs, st.integers(0, 2**40), st.booleans())
def test_every_instruction_comes_back_as_it_went(spec, dispatch, wants_delta):
    settings = {"mask": True, "mu": 0.1, "name": "a", "k": 3}
    sent = Instruction("train", dispatch, 3, 5, 4, JOB, STATE, spec, "proximal", settings, 11, (7, 10), True)
    sent = replace(sent, wants_delta=wants_delta, companions=STATE)
    got = record_to_instruction(instruction_to_record(sent))
    assert same_states(got.state, STATE)
    assert same_states(got.companions, STATE)
    assert {**vars(got), **NO_TENSORS} == {**vars(sent), **NO_TENSORS}


@given(specs | st.none(), st.dictionaries(st.text(min_size=1, max_size=6), st.floats(), max_size=3))
def test_every_report_comes_back_as_it_went(narrowed, metrics):
    metrics.pop("num-examples", None)
    sent = Report(8, 3, STATE, 120, (5, 0, 7), 1e12, 0.25, 10**9, metrics, True, True, narrowed, STATE, 9)
    got = record_to_report(report_to_record(sent))
    assert same_states(got.state, STATE)
    assert same_states(got.companions, STATE)
    assert repr({**vars(got), **NO_TENSORS}) == repr({**vars(sent), **NO_TENSORS})


def test_an_evaluation_report_needs_no_tensors():
    sent = Report(8, 3, {}, 12, metrics={"accuracy": 0.5})
    assert record_to_report(report_to_record(sent)) == sent


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages belong to a task, which an engine would have set."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class FakeGrid:
    """A grid whose nodes are functions; node ids are not partition ids."""

    def __init__(self, nodes: dict[int, Any]) -> None:
        self.nodes, self.replies, self.ids = nodes, {}, itertools.count()
        self.extra: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            message_id = f"m{next(self.ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            pushed.append(message_id)
            node = self.nodes.get(message.metadata.dst_node_id)
            if node is None:
                pushed[-1] = ""
                continue
            reply = node(message)
            if reply is not None:
                self.replies[message_id] = reply
        return pushed

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        found, self.extra = [*self.extra], []
        return found + [self.replies.pop(i) for i in list(ids) if i in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(list(messages)))


def node(partition_id: int, work: Any) -> Any:
    """A client that knows its partition and does ``work`` on instructions."""

    def act(message: Message) -> Message | None:
        if message.metadata.message_type == "query":
            return Message(content=partition_record(partition_id), reply_to=message)
        content = work(record_to_instruction(message.content))
        if content is None:
            return None
        if isinstance(content, Error):
            return Message(content, reply_to=message)
        return Message(content=content, reply_to=message)

    return act


def works(instruction: Instruction) -> RecordDict:
    return report_to_record(Report(instruction.dispatch, instruction.partition_id, instruction.state, 5))


def instruction(dispatch: int, partition_id: int) -> Instruction:
    return Instruction("train", dispatch, partition_id, 1, 0, JOB, STATE, FULL)


def transport_of(nodes: dict[int, Any]) -> tuple[GridTransport, FakeGrid]:
    grid = FakeGrid(nodes)
    return GridTransport(grid, len(nodes), join_timeout_s=1.0, poll_s=0.0), grid  # type: ignore[arg-type]


def test_clients_are_addressed_by_partition_whatever_their_node_ids():
    transport, _ = transport_of({901: node(1, works), 17: node(0, works)})
    assert transport.clients() == [0, 1]
    for partition_id in (1, 0):
        transport.send(instruction(10 + partition_id, partition_id))
    answers = transport.receive(1.0)
    assert [(a.dispatch, a.partition_id) for a in answers] == [(11, 1), (10, 0)]
    assert all(same_states(a.state, STATE) for a in answers if isinstance(a, Report))
    assert transport.receive(1.0) == []


def test_what_a_client_raised_becomes_a_failure_with_the_last_line_of_its_trace():
    trace = "Traceback (most recent call last):\n  File x\nTrainingError: the loss became nan\n"
    transport, _ = transport_of({5: node(0, lambda instruction: Error(1, trace))})
    transport.send(instruction(3, 0))
    assert transport.receive(1.0) == [Failure(3, 0, "code 1: TrainingError: the loss became nan")]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({HEAD: ConfigRecord({"json": "{"})}),
        RecordDict({HEAD: ConfigRecord({"json": '{"label_counts": [], "narrowed": ""}'})}),
        RecordDict({HEAD: ConfigRecord({"json": "[]"})}),
    ],
)
def test_an_unreadable_reply_becomes_a_failure(content):
    transport, _ = transport_of({5: node(0, lambda instruction: content)})
    transport.send(instruction(3, 0))
    (answer,) = transport.receive(1.0)
    assert isinstance(answer, Failure)
    assert answer.reason.startswith("unreadable reply: ")


def test_a_client_that_is_not_connected_fails_at_once():
    transport, grid = transport_of({5: node(0, works)})
    transport.send(instruction(1, 9))
    assert transport.receive(1.0) == [Failure(1, 9, "the client is not connected")]
    grid.nodes.clear()
    transport.send(instruction(2, 0))
    assert transport.receive(1.0) == [Failure(2, 0, "the client is not connected")]
    assert transport.clients() == []


def test_replies_to_messages_of_others_are_ignored():
    transport, grid = transport_of({5: node(0, works)})
    transport.send(instruction(1, 0))
    foreign = Message(content=RecordDict(), dst_node_id=5, message_type="train")
    foreign.metadata.__dict__["_message_id"] = "foreign"
    grid.extra = [Message(content=works(instruction(1, 0)), reply_to=foreign)]
    assert [answer.dispatch for answer in transport.receive(1.0)] == [1]


@pytest.mark.parametrize(("dispatch", "partition_id"), [(2, 0), (1, 1), (-1, 0)])
def test_an_answer_signed_as_another_requests_fails_its_own_request(dispatch, partition_id):
    """A client cannot answer in the name of another."""
    transport, _ = transport_of({5: node(0, lambda i: report_to_record(Report(dispatch, partition_id, STATE, 5)))})
    transport.send(instruction(1, 0))
    (answer,) = transport.receive(1.0)
    assert isinstance(answer, Failure)
    assert (answer.dispatch, answer.partition_id) == (1, 0)
    assert "is signed as request" in answer.reason


def test_waiting_for_a_silent_client_ends_with_the_timeout():
    transport, _ = transport_of({5: node(0, lambda instruction: None)})
    transport.send(instruction(1, 0))
    assert transport.receive(0.01) == []


def test_too_few_clients_are_an_error_that_says_how_many_came():
    with pytest.raises(NoClientsError, match=r"only 1 of 3 clients connected within 0\.2 s"):
        GridTransport(FakeGrid({5: node(0, works)}), 3, join_timeout_s=0.2)  # type: ignore[arg-type]


def test_a_node_that_is_no_client_of_ours_is_left_alone():
    def stranger(message: Message) -> Message:
        return Message(content=RecordDict(), reply_to=message)

    grid = FakeGrid({5: node(0, works), 6: stranger})
    assert GridTransport(grid, 1, join_timeout_s=1.0).clients() == [0]  # type: ignore[arg-type]
