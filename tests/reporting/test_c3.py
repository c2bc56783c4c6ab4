"""The C3-Score against the figures that its authors published, and what it may not be asked."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reporting.c3 import Budgets, C3Error, Spending, budgets_of, c3_score, scores, spending_of
from reporting.compare import compare
from reporting.log import read_events
from tests.reporting.test_compare import tiny

MIXED_CIFAR = {
    "FedAvg": (0.9161, 2.39, 11.77, 0.800),
    "FedProx": (0.9255, 2.39, 11.77, 0.808),
    "SL-basic": (0.7093, 25.98, 1.66, 0.624),
    "SplitFed": (0.6576, 29.51, 1.66, 0.570),
    "AdaSplit": (0.9163, 3.63, 2.38, 0.880),
}
MIXED_NONIID = {
    "FedAvg": (0.8421, 2.39, 17.13, 0.741),
    "FedProx": (0.8509, 2.39, 17.13, 0.748),
    "SL-basic": (0.8465, 84.64, 3.76, 0.727),
    "SplitFed": (0.8464, 84.54, 3.76, 0.727),
    "AdaSplit": (0.8888, 9.71, 5.38, 0.842),
}
"""Method -> accuracy, GB, client TMAC, C3 as published (budgets: the largest of the table)."""


@pytest.mark.parametrize("table", [MIXED_CIFAR, MIXED_NONIID])
def test_the_published_scores_follow_from_the_published_accuracies_and_costs(table):
    budgets = budgets_of([Spending(a, gigabytes, gigabytes, tmac) for a, gigabytes, tmac, _ in table.values()])
    for accuracy, gigabytes, tmac, published in table.values():
        assert c3_score(accuracy, gigabytes, tmac, budgets) == pytest.approx(published, abs=6e-4)


finite = st.floats(0, 1e12)


@given(st.floats(0, 1), finite, finite, st.floats(0.1, 100))
def test_a_score_lies_between_zero_and_the_accuracy_and_falls_with_every_cost(accuracy, num_bytes, macs, temperature):
    budgets = Budgets(1e12, 1e12)
    score = c3_score(accuracy, num_bytes, macs, budgets, temperature)
    assert 0 <= score <= accuracy
    assert c3_score(accuracy, 2 * num_bytes, macs, budgets, temperature) <= score
    assert c3_score(accuracy, num_bytes, 2 * macs, budgets, temperature) <= score


def test_a_large_temperature_leaves_the_accuracy():
    assert c3_score(0.9, 1, 1, Budgets(1, 1), 1e9) == pytest.approx(0.9)
    assert c3_score(0.9, 1, 1, Budgets(1, 1), 1) == pytest.approx(0.9 * math.exp(-2))


def test_budgets_that_are_given_count_and_the_others_are_the_largest_of_the_runs():
    runs = [Spending(0.5, 10, 10, 100), Spending(0.5, 40, 20, 50)]
    assert budgets_of(runs) == Budgets(40, 100, 20)
    assert budgets_of(runs, max_bytes=7) == Budgets(7, 100)
    assert budgets_of(runs, max_macs=8) == Budgets(40, 8, 20)


def test_counted_bytes_are_measured_against_a_budget_of_counted_bytes():
    runs = [Spending(0.5, 10, 10, 100), Spending(0.5, 40, 20, 50)]
    found = scores(runs[1], budgets_of(runs))
    assert found["c3_t8"] == pytest.approx(0.5 * math.exp(-(40 / 40 + 50 / 100) / 8))
    assert found["c3_counted_t8"] == pytest.approx(0.5 * math.exp(-(20 / 20 + 50 / 100) / 8))


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: Budgets(0, 1), "max-bytes: got 0"),
        (lambda: Budgets(1, math.inf), "max-macs: got inf"),
        (lambda: Budgets(1, 1, 0), "max-counted-bytes: got 0"),
        (lambda: c3_score(90, 1, 1, Budgets(1, 1)), "for 90 % give 0.9"),
        (lambda: c3_score(0.9, -1, 1, Budgets(1, 1)), "numbers >= 0"),
        (lambda: c3_score(0.9, 1, 1, Budgets(1, 1), 0), "temperature"),
    ],
)
def test_impossible_numbers_are_refused(call, what):
    with pytest.raises(C3Error, match=what):
        call()


def rows_of(accuracy: float, num_bytes: int, counted: float | None, clients: dict[str, float] | None) -> list[dict]:
    rows = tiny("adasplit", [accuracy], 1.0, num_bytes)
    for row in rows:
        if row["event"] == "arrival" and counted is not None:
            row["counted_bytes"] = counted
        if row["event"] == "evaluation" and clients is not None:
            row |= {"where": "federated", "clients": clients}
    return rows


def test_accuracy_is_the_plain_mean_over_clients_and_bytes_are_known_both_ways(make_run):
    log = read_events(make_run("a", rows=rows_of(0.9, 100, 25.0, {"0": 0.5, "1": 1.0})))
    assert spending_of(log) == Spending(0.75, 100, 25, 10)
    weights = read_events(make_run("b", rows=rows_of(0.9, 100, None, None)))
    assert spending_of(weights) == Spending(0.9, 100, 100, 10)


def test_a_run_without_accuracy_has_no_score(make_run):
    assert spending_of(read_events(make_run("a", rows=[{"event": "run", "strategy": "x"}]))) is None


def test_compare_shows_the_score_under_explicit_budgets_at_three_temperatures(make_run, tmp_path: Path):
    runs = [
        make_run("a", rows=tiny("fedavg", [0.8], 1.0, 100)),
        make_run("b", rows=rows_of(0.8, 50, 5.0, None)),
    ]
    _, text = compare(runs, tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "C3" in text
    assert (numbers["c3_max_bytes"], numbers["c3_max_macs"]) == (100, 10)
    assert numbers["runs"][0]["c3"]["c3_t8"] == pytest.approx(0.8 * math.exp(-2 / 8))
    assert numbers["runs"][1]["c3"]["c3_t8"] == pytest.approx(0.8 * math.exp(-1.5 / 8))
    page = (tmp_path / "out" / "comparison.html").read_text()
    (panel,) = re.findall(r"<section><h2>C3-Score</h2>.*?</section>", page, re.DOTALL)
    cells = [tuple(re.findall(r"<td[^>]*>([^<]*)</td>", row)) for row in re.findall(r"<tr>.*?</tr>", panel, re.DOTALL)]
    for run, wire, counted in ((cells[-2], 100, 100), (cells[-1], 50, 5)):
        expected = [
            0.8 * math.exp(-(num_bytes / 100 + 1) / temperature)
            for num_bytes in (wire, counted)
            for temperature in (1, 8, 64)
        ]
        assert run[1:3] == (f"{wire} B", f"{counted} B")
        assert run[4:] == tuple(f"{score:.3f}" for score in expected)
    compare(runs, tmp_path / "given", max_bytes=1000.0, max_macs=20.0)
    numbers = json.loads((tmp_path / "given" / "comparison.json").read_text())
    expected = scores(Spending(0.8, 50, 5, 10), Budgets(1000, 20))
    assert numbers["runs"][1]["c3"] == pytest.approx(dict(expected))
