"""Runs on devices that come, go and change their pace, from a fleet file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleet.clock import DurationModel
from fleet.fleet import make_fleet
from tests.runs import select, tiny_run

DEVICES = """
[[devices]]
profile = "raspberry-pi-4"
count = 4
"""


def fleet_file(folder: Path, more: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fleet.toml"
    path.write_text(DEVICES + more)
    return str(path)


def test_only_who_is_online_is_asked_and_the_clock_moves_on_while_nobody_is(tmp_path):
    """Stays of a few rounds: whoever is asked is online then, and a moment without anybody is passed over."""
    name = fleet_file(tmp_path, "[availability]\nonline-ratio = 0.3\nmean-online-s = 0.5\n")
    rows = tiny_run(tmp_path / "run", strategy="fedavg", num_rounds=12, fleet__name=name)
    model = DurationModel(make_fleet(name, 4), seed=0, noise=0.0)
    arrivals = select(rows, "arrival")
    assert all(model.is_available(row["partition_id"], row["start_s"]) for row in arrivals)
    merges = select(rows, "merge")
    assert len(merges) == 12
    assert {row["num_merged"] for row in merges} != {4}, "everybody was there all the time: the test shows nothing"
    ends = [0.0, *(row["time_s"] for row in merges)]
    begins = [min(r["start_s"] for r in arrivals if r["server_round"] == row["server_round"]) for row in merges]
    waits = [(end, begin) for end, begin in zip(ends, begins, strict=False) if begin > end]
    assert waits, "there was always somebody: the test shows nothing"
    for end, begin in waits:
        assert not any(model.is_available(pid, end) for pid in range(4))
        assert begin == pytest.approx(min(model.next_available_s(pid, end) for pid in range(4)))


@pytest.mark.slow
def test_a_device_that_becomes_faster_gets_its_units_back_if_regrowing_is_asked_for(tmp_path):
    """Client 3 is four times slower until the middle of the run."""
    shifts = "{ partition-id = 3, time-s = 0, slowdown = 4 }, { partition-id = 3, time-s = %s, slowdown = 1 }"
    settings: dict[str, Any] = {
        "strategy": "adaptcl",
        "adaptcl.pruning-interval": 1,
        "adaptcl.round-to": 1,
        "evaluation.every": 1000,
        "num-rounds": 24,
    }

    def ratios(folder: Path, moment_s: float, regrow: bool) -> tuple[list[float], list[float]]:
        name = fleet_file(folder, f"[drift]\nshifts = [{shifts % moment_s}]\n")
        rows = tiny_run(folder / "run", fleet__name=name, **settings, **{"adaptcl.rates.regrow": regrow})
        mine = select(rows, "arrival", partition_id=3)
        return [row["retention_ratio"] for row in mine], [row["time_s"] for row in select(rows, "merge")]

    slow, times_s = ratios(tmp_path / "slow", 1e9, True)
    assert slow[-1] < 0.6
    freed, _ = ratios(tmp_path / "freed", times_s[11], True)
    assert min(freed) < 0.6
    assert freed[-1] > min(freed) + 0.2
    kept, _ = ratios(tmp_path / "kept", times_s[11], False)
    assert kept[-1] == min(kept)
