"""Progress on the terminal."""

from __future__ import annotations

import io

import pytest

from reporting.progress import Progress
from reporting.units import MISSING
from tests.reporting.conftest import make_rows


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_one_plain_line_per_evaluated_round_beside_the_clients_spread() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for row in make_rows(num_rounds=6, num_clients=4):
        progress.on_event(row)
    lines = stream.getvalue().splitlines()
    rounds = [line for line in lines if line.startswith("round")]
    assert [line.split()[1] for line in rounds] == [f"{number}/6" for number in range(7)]
    assert sum(line.lstrip().startswith("clients") for line in lines) == 7
    assert "\r" not in stream.getvalue()
    assert lines[-1].startswith("completed after 6 rounds")
    assert all(word in rounds[3] for word in ("accuracy", "time", "real", "left", "merged"))


def test_rounds_that_are_not_evaluated_have_a_line_too_before_the_next_one_ends() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for row in make_rows(num_rounds=6, num_clients=4):
        if row["event"] == "evaluation" and row["server_round"] % 3:
            continue
        progress.on_event(row)
        if row["event"] == "arrival":  # of the next round: the one before has been told
            last = [line for line in stream.getvalue().splitlines() if line.startswith("round")][-1]
            assert last.startswith(f"round {row['server_round'] - 1}/6")
    rounds = [line for line in stream.getvalue().splitlines() if line.startswith("round")]
    assert [line.split()[1] for line in rounds] == [f"{number}/6" for number in range(7)]
    assert [line.split()[3] == MISSING for line in rounds] == [number % 3 > 0 for number in range(7)]
    assert all(" left   merged 4" in line or "lost" in line for line in rounds[1:-1])


def test_an_evaluation_that_comes_after_the_rounds_line_is_told_below_it() -> None:
    stream = io.StringIO()
    progress = Progress(num_rounds=2, stream=stream)
    progress.on_event({"event": "merge", "server_round": 1, "time_s": 1.0, "wall_s": 1.0})
    progress.on_event({"event": "arrival", "server_round": 2, "status": "merged", "wall_s": 1.5})
    progress.on_event({"event": "evaluation", "server_round": 1, "accuracy": 0.5, "where": "central", "wall_s": 1.6})
    assert [line.split()[:2] for line in stream.getvalue().splitlines()] == [["round", "1/2"], ["central", "50.0"]]


def test_a_terminal_sees_replies_as_they_arrive_and_keeps_the_same_lines() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    shown, plain = Progress(stream=terminal), Progress(stream=pipe)
    for row in make_rows(num_rounds=3, num_clients=3):
        shown.on_event(row)
        plain.on_event(row)
    assert "\r" in terminal.getvalue()
    kept = [line.rsplit("\r", 1)[-1] for line in terminal.getvalue().split("\n")]
    assert kept == pipe.getvalue().split("\n")


def test_the_estimate_is_exact_for_rounds_of_equal_length_and_leaves_out_the_start() -> None:
    progress = Progress(num_rounds=10, stream=io.StringIO())
    progress.on_event({"event": "evaluation", "server_round": 0, "wall_s": 5.0, "accuracy": 0.1})
    for number in range(1, 5):
        wall_s = 100.0 + 3.0 * (number - 1)  # the first round takes long: processes start, models are compiled
        progress.on_event({"event": "merge", "server_round": number, "wall_s": wall_s})
        progress.on_event({"event": "evaluation", "server_round": number, "wall_s": wall_s, "accuracy": 0.5})
    assert progress.remaining_s(4, 109.0) == pytest.approx(6 * 3.0)


def test_a_resumed_run_estimates_from_where_it_resumed() -> None:
    progress = Progress(stream=io.StringIO())
    progress.on_event({"event": "run", "config": {"num-rounds": 100}, "wall_s": 0.0})
    progress.on_event({"event": "arrival", "server_round": 91, "status": "merged", "wall_s": 1.0})
    progress.on_event({"event": "merge", "server_round": 91, "wall_s": 2.0})
    progress.on_event({"event": "merge", "server_round": 95, "wall_s": 10.0})
    assert progress.remaining_s(95, 10.0) == pytest.approx(10.0)


def test_lost_replies_are_counted_and_control_characters_never_reach_the_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(num_rounds=2, stream=stream)
    progress.on_event({"event": "arrival", "server_round": 1, "status": "failed", "wall_s": 1.0})
    progress.on_event({"event": "arrival", "server_round": 1, "status": "merged", "wall_s": 1.0})
    progress.on_event({"event": "warning", "message": "\x1b[2Jgone", "wall_s": 1.0})
    progress.on_event({"event": "evaluation", "server_round": 1, "accuracy": None, "time_s": 3.0, "wall_s": 1.0})
    assert "\x1b" not in stream.getvalue()
    assert "merged 1, lost 1" in stream.getvalue()


def test_a_closed_pipe_silences_progress_but_not_the_run() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream)
    stream.close()
    progress.on_event({"event": "evaluation", "server_round": 1, "accuracy": 0.5, "time_s": 1.0, "wall_s": 1.0})


def test_rows_it_does_not_know_are_ignored() -> None:
    stream = io.StringIO()
    Progress(stream=stream).on_event({"event": "decision", "server_round": 1})
    assert stream.getvalue() == ""
