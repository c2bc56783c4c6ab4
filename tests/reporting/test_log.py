"""Reading event logs, whole, cut short, resumed and wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reporting.log import read_events
from reporting.rows import LogError

MakeRun = Callable[..., Path]
RUN = {"event": "run", "strategy": "fedavg", "wall_s": 0.0}


def write(path: Path, *rows: object, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def test_every_row_of_a_run_is_read_as_its_kind(make_run: MakeRun) -> None:
    log = read_events(make_run(num_clients=4, num_rounds=6))
    assert (len(log.clients), len(log.arrivals), len(log.merges), len(log.decisions)) == (4, 24, 6, 1)
    assert len(log.evaluations) == 14
    assert log.evaluations[1].clients.keys() == {"0", "1", "2", "3"}
    assert (log.status, log.num_rounds, log.problems) == ("completed", 6, ())


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 60))
def test_a_log_cut_anywhere_in_its_last_line_is_read_and_the_cut_reported(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    last = json.dumps({"event": "merge", "server_round": 1, "time_s": 2.5, "num_merged": 3, "n_star": 1, "wall_s": 9.0})
    path = write(tmp_path_factory.mktemp("cut") / "events.jsonl", RUN, tail=last[:cut])
    log = read_events(path)
    assert log.merges == ()
    assert "line 2" in log.problems[0]
    assert log.status == "unfinished"


def test_a_last_line_without_newline_counts_when_it_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", RUN, tail=json.dumps({"event": "merge", "server_round": 1, "time_s": 2.5}))
    assert len(read_events(path).merges) == 1


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", RUN, tail='{"event": "mer\n' + json.dumps({"event": "end", "status": "x"}))
    with pytest.raises(LogError, match="line 2 is not a JSON object"):
        read_events(path)


def test_rounds_that_a_resumed_run_played_again_count_once(make_run: MakeRun, tmp_path: Path) -> None:
    whole = [json.loads(line) for line in (make_run(num_clients=3, num_rounds=6) / "events.jsonl").open()]
    first = [row for row in whole if row.get("server_round", 0) <= 4 and row["event"] != "end"]
    again = [row for row in whole if row.get("server_round", 9) > 2 or row["event"] in ("run", "end")]
    cut = '{"event": "arrival", "server_round": 5, "par\n'
    path = write(tmp_path / "events.jsonl", *first, tail=cut + "".join(json.dumps(row) + "\n" for row in again))
    log, expected = read_events(path), read_events(make_run("whole", rows=whole))
    assert log.num_resumes == 1
    assert "cut short before the run was resumed" in log.problems[0]
    assert [row.time_s for row in log.merges] == [row.time_s for row in expected.merges]
    assert sum(row.upload_bytes for row in log.arrivals) == sum(row.upload_bytes for row in expected.arrivals)
    assert len(log.evaluations) == len(expected.evaluations)
    assert log.status == "completed"


def test_null_counts_as_absent_and_unknown_fields_are_ignored(tmp_path: Path) -> None:
    row = {"event": "arrival", "server_round": 1, "partition_id": 7, "status": "failed", "start_s": None, "new": 1}
    log = read_events(write(tmp_path / "events.jsonl", RUN, row))
    assert (log.arrivals[0].finish_s, log.arrivals[0].train_macs) == (None, 0.0)
    assert [client.partition_id for client in log.clients] == [7]


def test_unknown_events_are_left_out_and_reported_with_the_nearest_name(tmp_path: Path) -> None:
    log = read_events(write(tmp_path / "events.jsonl", RUN, {"event": "evaluatoin", "server_round": 1}))
    assert "nearest known event: 'evaluation'" in log.problems[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"event": "merge", "server_round": 1}, "line 2 .merge.: field 'time_s' is missing"),
        ({"event": "merge", "server_round": 1, "time_s": "soon"}, "field 'time_s' must be a number, got 'soon'"),
        ({"event": "merge", "server_round": 1.5, "time_s": 1}, "field 'server_round' must be a whole number"),
        ({"event": "clients", "clients": {}}, "field 'clients' must be a list"),
        ({"event": "evaluation", "server_round": 1, "time_s": 1, "family": [{}]}, "'retention_ratio' is missing"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(row: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(LogError, match=message):
        read_events(write(tmp_path / "events.jsonl", RUN, row))


def test_a_missing_file_and_a_file_that_is_no_log_say_so(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"cannot read .*give a run folder"):
        read_events(tmp_path)
    with pytest.raises(LogError, match="no 'run' row"):
        read_events(write(tmp_path / "events.jsonl", {"event": "end", "status": "completed"}))


def test_a_log_whose_clock_starts_anew_is_that_of_a_resumed_run_and_real_times_add_up(tmp_path: Path) -> None:
    merges = [
        {"event": "merge", "server_round": i, "time_s": i, "wall_s": w} for i, w in ((1, 4.0), (2, 9.0), (3, 1.5))
    ]
    log = read_events(write(tmp_path / "events.jsonl", RUN, *merges))
    assert (log.num_resumes, log.wall_s) == (1, 10.5)
