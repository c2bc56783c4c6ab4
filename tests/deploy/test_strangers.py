"""A device that sends what it likes, over real processes: each answer is turned away, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.hosts import ROOT, rows_of
from server_app.bundle import copy_app
from tests.deploy.conftest import LIMIT_S, SMALL
from tests.runs import final_state, select

pytestmark = pytest.mark.slow

CULPRIT = 1
MISBEHAVIOUR = '''

import pickle
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

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
    return report_to_record(report)
'''
EXPECTED = {
    1: ("rejected", "NaN or infinity"),
    2: ("failed", "unreadable reply: WireError"),
    3: ("failed", "bytes of tensors, at most 1000000 allowed"),
    4: ("rejected", "shape"),
    5: ("failed", "is signed as request"),
}


def test_answers_of_a_device_that_misbehaves_are_turned_away_one_by_one(plain, tmp_path: Path):
    app_dir = tmp_path / "app"
    copy_app(ROOT, app_dir)
    path = app_dir / "client_app" / "app.py"
    honest = "Message(content=report_to_record(replace(report, busy_s=_busy_s(began_s))), reply_to=message)"
    text = path.read_text()
    assert honest in text
    ours = "Message(content=spoil(replace(report, busy_s=_busy_s(began_s)), asked.server_round), reply_to=message)"
    text = text.replace(honest, ours).replace(
        "report = handle(record_to_instruction(message.content),",
        "asked = record_to_instruction(message.content)\n    report = handle(asked,",
    )
    path.write_text(text + MISBEHAVIOUR)
    run_dir = tmp_path / "run"
    settings = ("strategy=fedavg", "num-rounds=6", "limits.max-reply-bytes=1000000", *SMALL)
    run = plain.submit(run_dir, *settings, app_dir=app_dir)
    assert run.popen.wait(timeout=LIMIT_S) == 0, run.text()
    rows = rows_of(run_dir)
    for row in select(rows, "arrival"):
        if row["partition_id"] == CULPRIT and row["server_round"] in EXPECTED:
            status, reason = EXPECTED[row["server_round"]]
            assert row["status"] == status
            assert reason in row["reason"]
        else:
            assert row["status"] == "merged"
    assert [row["num_merged"] for row in select(rows, "merge")] == [1, 1, 1, 1, 1, 2]
    assert all(tensor.isfinite().all() for tensor in final_state(run_dir).values())
    assert "<script>alert(1)" not in (run_dir / "report.html").read_text()
