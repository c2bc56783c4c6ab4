"""What a person sees of a run's log on Flower's engine."""

from __future__ import annotations

import pytest

from server_app.stream import StreamFilter


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[92mINFO \x1b[0m:      round 3 of 20\n", "round 3 of 20"),
        ("\x1b[93mWARNING \x1b[0m:   a group is kept whole\n", "warning: a group is kept whole"),
        ("accuracy 0.93\n", "accuracy 0.93"),
        ("\x1b[92mINFO \x1b[0m:      \n", None),
        ("\x1b[93mWARNING \x1b[0m:   Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.\n", None),
        ("\x1b[92mINFO \x1b[0m:      \tflwr federation simulation-config @none/default <superlink>\n", None),
        ("\x1b[36m(ClientAppActor pid=123)\x1b[0m something\n", None),
        ("2026-11-21 05:19:04,100\tINFO worker.py:1942 -- Started a local Ray instance.\n", None),
        ("/a b/ray/_private/worker.py:2051: FutureWarning: Tip\n", None),
    ],
)
def test_a_person_sees_the_apps_lines_and_not_the_engines(line: str, shown: str | None) -> None:
    assert StreamFilter().keep(line) == shown


def test_of_a_traceback_on_the_way_the_error_itself_is_shown() -> None:
    lines = [
        "\x1b[91mERROR \x1b[0m:     Traceback (most recent call last):",
        '  File "x.py"',
        "    f()",
        "OSError: full",
    ]
    stream_filter = StreamFilter()
    assert [text for line in [*lines, "round 2"] if (text := stream_filter.keep(line))] == ["OSError: full", "round 2"]


def test_the_traceback_through_the_engine_is_left_to_the_log() -> None:
    stream_filter = StreamFilter()
    assert stream_filter.keep("ERROR :     Simulation raised an exception") is None
    assert stream_filter.keep("Traceback (most recent call last):") is None
