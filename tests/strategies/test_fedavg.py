"""FedAvg, and smallest-everywhere, its narrow form."""

from __future__ import annotations

import pytest

from tests.runs import select, tiny_run


def test_everybody_trains_the_full_model(tmp_path):
    rows = tiny_run(tmp_path / "run", strategy="fedavg", num_rounds=1)
    assert {row["retention_ratio"] for row in select(rows, "arrival")} == {1.0}
    assert all(row["widths"] == {"hidden0": 200, "hidden1": 200, "classes": 10} for row in select(rows, "arrival"))
    assert all(row["merge_weight"] == row["num_examples"] for row in select(rows, "arrival"))
    assert (select(rows, "merge")[0]["n_star"], select(rows, "merge")[0]["uncovered_ratio"]) == (4, 0.0)
    assert "family" not in select(rows, "evaluation")[-1]


@pytest.mark.parametrize("measure", ["width", "prunable", "parameters", "macs", "bytes"])
def test_smallest_everywhere_gives_everybody_the_same_part_and_evaluates_it(measure, tmp_path):
    rows = tiny_run(
        tmp_path / "run", strategy="fedavg", num_rounds=1, fedavg__retention_ratio=0.5, fedavg__measure=measure
    )
    arrivals = select(rows, "arrival")
    assert len({tuple(row["widths"].items()) for row in arrivals}) == 1
    if measure == "prunable":
        assert 0.45 < arrivals[0]["retention_ratio"] <= 0.5
    if measure == "width":
        assert arrivals[0]["widths"] == {"hidden0": 104, "hidden1": 104, "classes": 10}, (
            "wide layers keep multiples of 8"
        )
    assert 0 < select(rows, "merge")[0]["uncovered_ratio"] < 1
    family = select(rows, "evaluation")[-1]["family"]
    assert [member["name"] for member in family] == [f"{arrivals[0]['retention_ratio']:.2f}", "base"]
