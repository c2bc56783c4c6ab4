"""Every method where the clock is the wall, as in deployment; without Flower's processes, so that it takes seconds."""

from __future__ import annotations

import pytest

from strategies import STRATEGIES
from tests.runs import select, tiny_run

NEEDS = {"only-capable": {"only-capable.clients": "0,2"}}
"""What nobody knows about real devices must be said."""


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_method_runs_on_measured_times_and_goes_on_from_its_checkpoint(name, tmp_path):
    settings = {"strategy": name, "fleet.name": "none", "num-clients": 3, "data.max-train": 240, **NEEDS.get(name, {})}
    rows = tiny_run(tmp_path / "run", num_rounds=3, **settings)
    assert select(rows, "end")[0]["status"] == "completed"
    merged = select(rows, "arrival", status="merged")
    assert merged
    assert all(row["compute_s"] > 0 and row["finish_s"] >= row["start_s"] for row in merged)
    resumed = tiny_run(tmp_path / "more", num_rounds=4, resume=str(tmp_path / "run"), **settings)
    assert resumed[: len(rows) - 1] == rows[:-1]
    assert select(resumed, "end")[0]["num_rounds"] == 4
