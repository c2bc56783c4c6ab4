"""Pictures of dynamic pruning."""

from __future__ import annotations

from typing import Any

import pytest

from reporting.gates import MAX_LAYERS, MAX_NAMES, draw_gates, draw_plan
from reporting.log import LogError, read_events
from reporting.style import style
from reporting.view import View

RUN = {"event": "run", "strategy": "adp"}


def gates(**changes: Any) -> dict[str, Any]:
    layers = {"stage1": {"entropy": 0.9, "overlap": 0.5, "never_used_ratio": 0.25, "agreement": 0.8}}
    return {
        "event": "gates",
        "server_round": 3,
        "density": 0.5,
        "layers": layers,
        "overlaps": [[1, 0.4], [0.4, 1]],
        **changes,
    }


def plan(partition_id: int, dense_s: float, gated_s: float) -> dict[str, Any]:
    times = {"stage1": {"dense_s": dense_s, "gated_s": gated_s}}
    return {"event": "plan", "server_round": 1, "partition_id": partition_id, "layers": times}


def view_of(make_run: Any, *rows: dict[str, Any]) -> View:
    return View(read_events(make_run(rows=[RUN, *rows])))


def test_a_run_without_gates_has_no_picture_of_them(make_run):
    view = view_of(make_run, gates(layers={}, overlaps=[]))
    with style():
        assert draw_gates(view) is None
        assert draw_plan(view) is None


def test_the_picture_says_how_many_units_never_won_and_how_classes_overlap(make_run):
    with style():
        picture = draw_gates(view_of(make_run, gates()))
    assert picture is not None
    assert "25.0 % of the units won for no sample" in picture.svg
    assert "overlap of classes, mean 40 %" in picture.svg


def test_without_classes_and_with_many_layers_a_part_is_drawn_and_it_says_so(make_run):
    layers = {f"layer{i}": {"entropy": 0.5} for i in range(MAX_LAYERS + 5)}
    with style():
        picture = draw_gates(view_of(make_run, gates(layers=layers, overlaps=[])))
    assert picture is not None
    assert f"The first {MAX_LAYERS} of {MAX_LAYERS + 5} layers" in picture.note


def test_plans_are_shown_as_the_median_over_clients(make_run):
    rows = [plan(0, 1.0, 0.5), plan(1, 1.0, 0.6), plan(2, 1.0, 9.0)]
    with style():
        picture = draw_plan(view_of(make_run, *rows))
    assert picture is not None
    assert "less time in 1 of 1 layers" in picture.note


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([gates(dense=[])], "gates all of them"),
        ([gates(dense=["stage1"])], "leaves 1 of 1 layers dense: stage1."),
        ([gates(dense=["stage1"]), gates(server_round=4, dense=[])], "gates all of them"),
        ([gates()], "Where it does not pay, layers are left dense."),  # an older log
        ([], "Where it does not pay, layers are left dense."),
    ],
)
def test_the_plan_in_force_at_the_end_is_named(make_run, rows, sentence):
    """What was chosen, not what one client's times would have chosen."""
    with style():
        picture = draw_plan(view_of(make_run, plan(0, 1.0, 0.97), *rows))
    assert picture is not None
    assert "less time in 1 of 1 layers" in picture.note
    assert sentence in picture.note


def test_a_plan_that_names_many_layers_says_how_many_more(make_run):
    many = [f"layer{i}" for i in range(MAX_NAMES + 3)]
    with style():
        picture = draw_plan(view_of(make_run, plan(0, 1.0, 2.0), gates(dense=many)))
    assert picture is not None
    assert f"layer{MAX_NAMES - 1} and 3 more." in picture.note


@pytest.mark.parametrize("dense", ["stage1", [1]])
def test_a_plan_that_is_no_list_of_names_is_refused_with_its_line(make_run, dense):
    with pytest.raises(LogError, match=r"line 2 \(gates\): field 'dense'"):
        view_of(make_run, gates(dense=dense))


def test_overlaps_of_rows_that_differ_in_length_are_drawn(make_run):
    with style():
        assert draw_gates(view_of(make_run, gates(overlaps=[[1.0], [0.4, 1.0]]))) is not None


@pytest.mark.parametrize(
    ("overlaps", "mean"),
    [
        ([[1, 0, -1], [0, 1, 0.4], [-1, 0.4, 1]], "20 %"),
        ([[1, -1], [-1, 1]], None),
        ([[1, 0], [0, 1]], "0 %"),
        ([[1, 0.4, 0], [0.4, 1, 0], [0, 0, 0]], "40 %"),  # an older log
    ],
)
def test_classes_without_a_common_winner_count_and_classes_that_no_client_has_together_do_not(make_run, overlaps, mean):
    with style():
        picture = draw_gates(view_of(make_run, gates(overlaps=overlaps)))
    assert picture is not None
    assert (f"overlap of classes, mean {mean}" if mean else "overlap of classes<") in picture.svg.replace(" -->", "<")


def test_a_statistic_that_is_no_number_is_refused_with_its_line(make_run):
    with pytest.raises(LogError, match=r"line 2 \(gates\): field 'layers'"):
        view_of(make_run, gates(layers={"stage1": {"entropy": "high"}}))
