"""What clients say ends up in a page that people open: nothing of it is taken for markup or script."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from client_app.handler import handle
from reporting.report import write_report
from tests.runs import tiny_run
from wire.message import Instruction, Report

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


def hostile(instruction: Instruction) -> Report:
    """Fails with words of its own in one round and reports a metric named so in the others."""
    if instruction.partition_id == 1 and instruction.server_round == 1:
        raise RuntimeError(HOSTILE)
    report = handle(instruction)
    return replace(report, metrics={**report.metrics, HOSTILE: 0.5, f"{HOSTILE}-2": 1e29})


@pytest.mark.slow
def test_words_of_clients_are_escaped_in_the_report(tmp_path):
    rows = tiny_run(tmp_path / "run", hostile, strategy="adaptcl")
    assert any(HOSTILE in str(row.get("reason", "")) for row in rows)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "onerror" not in re.sub(r"&lt;img src=x onerror=alert\(1\)&gt;", "", page)
