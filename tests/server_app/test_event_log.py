"""The event log is valid JSON, line by line, whatever happens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from server_app.event_log import EventLog


def test_rows_are_on_disk_as_soon_as_they_are_written_and_are_echoed(tmp_path):
    path, seen = tmp_path / "events.jsonl", []
    with EventLog(path, echo=seen.append) as log:
        log.write({"event": "merge", "server_round": 3, "time_s": 1.5})
        row = json.loads(path.read_text())
        assert (row["event"], row["server_round"], row["time_s"]) == ("merge", 3, 1.5)
        assert row["wall_s"] >= 0
        assert list(row)[:2] == ["event", "wall_s"]
        assert seen == [row]
        assert (log.num_rows, log.time_s, log.server_round) == (1, 1.5, 3)


def test_a_resumed_log_is_continued(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "run"}\n')
    with EventLog(path, num_rows=1) as log:
        log.write({"event": "end"})
        assert log.num_rows == 2
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["run", "end"]


def test_a_resumed_log_knows_where_the_run_is_before_its_first_row(tmp_path):
    with EventLog(tmp_path / "events.jsonl", num_rows=1, time_s=2.5, server_round=3) as log:
        log.write({"event": "warning", "message": "stopped again"})
        assert (log.num_rows, log.time_s, log.server_round) == (2, 2.5, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_numbers_that_json_lacks_become_null(value, tmp_path):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write(
            {
                "event": "evaluation",
                "server_round": 1,
                "loss": value,
                "family": [{"loss": value, "accuracy": np.float64(0.5)}],
            }
        )
    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row["loss"] is None
    assert row["family"] == [{"loss": None, "accuracy": 0.5}]
