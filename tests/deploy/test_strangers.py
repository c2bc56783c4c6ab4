"""A device that sends what it likes and when it likes, over real processes: it is turned away, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.hosts import ROOT, rows_of
from server_app.bundle import copy_app
from tests.deploy.conftest import LIMIT_S, SMALL
from tests.deploy.test_processes import check_whole
from tests.runs import final_state, select

pytestmark = pytest.mark.slow

CULPRIT = 1
MISBEHAVIOUR = '''

import pickle

import torch
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Array, ArrayRecord
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import NodeAuthHttpInterceptor
from flwr.supernode.runtime.run_clientapp import push_message

from wire.message import Report


def spoil(report: Report, server_round: int):
    """What is sent in the place of an honest answer."""
    if report.partition_id != 1:
        return report_to_record(report)
    key = next(key for key, tensor in report.state.items() if tensor.dim() > 1)
    if server_round == 1:
        return report_to_record(replace(report, state={**report.state, key: report.state[key] * float("nan")}))
    if server_round == 2:
        record = report_to_record(report)
        record["state"] = ArrayRecord({"block": Array("uint8", (9,), "numpy.ndarray", pickle.dumps(print))})
        return record
    if server_round == 3:
        return report_to_record(replace(report, state={**report.state, "more": torch.zeros(2**20)}))
    if server_round == 4:
        return report_to_record(replace(report, state={**report.state, key: report.state[key][:-1]}))
    if server_round == 5:
        return report_to_record(replace(report, partition_id=0))
    if server_round == 6:
        return report_to_record(replace(report, metrics={"<script>alert(1)</script>": 1.0, "loss": 1.0}))
    if server_round == 7:
        while not any(word in EVENTS.read_text() for word in GIVEN_UP):
            time.sleep(0.1)
    return report_to_record(report)


class Direct:
    """The SuperLink as a SuperNode reaches it, for a client that has the device's key."""

    def __init__(self, node_id: int) -> None:
        key = load_ssh_private_key(KEY.read_bytes(), None)
        signed = NodeAuthHttpInterceptor(key, key.public_key())
        checks = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), signed]
        self.node = Node(node_id=node_id)
        self.client = FleetHttpClient.from_server_address(ADDRESS, False, CA.read_bytes(), interceptors=checks)
        self.PushObject = self.client.PushObject

    def PushMessages(self, request):
        trees = request.message_object_trees
        return self.client.PushMessages(
            PushMessagesRequest(node=self.node, messages_list=request.messages_list, message_object_trees=trees)
        )


def send_now(report: Report, server_round: int, message: Message, context: Context) -> None:
    """An answer beside the one that the node sends when this client has ended."""
    if report.partition_id == 1 and server_round == 8:
        answer = Message(content=report_to_record(report), reply_to=message)
        push_message(Direct(context.node_id), answer, context)
'''
GIVEN_UP = ("no answer in 40 s", "may have expired")
"""What a late answer is called in the log: by the server, or by its SuperLink if that is first."""
EXPECTED = {
    1: ("rejected", "NaN or infinity"),
    2: ("failed", "unreadable reply: WireError"),
    3: ("failed", "bytes of tensors, at most 1000000 allowed"),
    4: ("rejected", "shape"),
    5: ("failed", "is signed as request"),
    7: ("failed", ""),
}


def test_answers_of_a_device_that_misbehaves_are_turned_away_one_by_one(secure, tmp_path: Path):
    """The answer of round 7 comes in round 8, for which the device then answers twice."""
    app_dir, run_dir = tmp_path / "app", tmp_path / "run"
    copy_app(ROOT, app_dir)
    path = app_dir / "client_app" / "app.py"
    honest = "Message(content=report_to_record(replace(report, busy_s=_busy_s(began_s))), reply_to=message)"
    text = path.read_text()
    assert honest in text
    ours = "Message(content=spoil(replace(report, busy_s=_busy_s(began_s)), asked.server_round), reply_to=message)"
    text = text.replace(
        f"return {honest}", f"send_now(report, asked.server_round, message, context)\n    return {ours}"
    )
    text = text.replace(
        "report = handle(record_to_instruction(message.content),",
        "asked = record_to_instruction(message.content)\n    report = handle(asked,",
    )
    files = {
        "KEY": secure.folder / "n1" / "key",
        "CA": secure.folder / "certificates" / "ca.crt",
        "EVENTS": run_dir / "events.jsonl",
    }
    constants = [f"{name} = Path({str(file)!r})" for name, file in files.items()]
    constants.append(f"GIVEN_UP = {GIVEN_UP}")
    constants.append(f'ADDRESS = "{secure.host}:{secure.port}"')
    path.write_text("\n".join([text, MISBEHAVIOUR, *constants, ""]))
    settings = ("strategy=fedavg", "num-rounds=9", "limits.max-reply-bytes=1000000", "reply-timeout-s=40", *SMALL)
    before, before_node = len(secure.superlink.text()), len(secure.nodes["n1"].text())
    run = secure.submit(run_dir, *settings, app_dir=app_dir)
    assert run.popen.wait(timeout=LIMIT_S) == 0, run.text()
    rows = rows_of(run_dir)
    for row in select(rows, "arrival"):
        if row["partition_id"] == CULPRIT and row["server_round"] in EXPECTED:
            status, reason = EXPECTED[row["server_round"]]
            assert row["status"] == status
            assert reason in row["reason"]
        else:
            assert row["status"] == "merged"
    assert [row["num_merged"] for row in select(rows, "merge")] == [1, 1, 1, 1, 1, 2, 1, 2, 2]
    said = secure.superlink.text()[before:]
    num_by_node = secure.nodes["n1"].text()[before_node:].count("Sending: ")
    assert said.count(f"Push replies from node_id={secure.node_id('n1')}") > num_by_node  # one was sent beside it
    assert len(select(rows, "arrival", partition_id=CULPRIT, server_round=8)) == 1
    (late,) = select(rows, "arrival", partition_id=CULPRIT, server_round=7)
    assert any(words in late["reason"] for words in GIVEN_UP)
    check_whole(run_dir, rows)
    assert all(tensor.isfinite().all() for tensor in final_state(run_dir).values())
    assert "<script>alert(1)" not in (run_dir / "report.html").read_text()
