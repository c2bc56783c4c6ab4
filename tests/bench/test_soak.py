"""The soak's summary: what was lost, and what grew, from a real run's folders and made-up samples."""

from __future__ import annotations

import os
import shutil

import pytest

from bench.soak import WEIGHTS, Injuries, Injury, longest_life, losses, summary
from tests.runs import tiny_run


def test_a_summary_counts_answers_and_rounds_and_compares_early_memory_with_late(tmp_path):
    rows = tiny_run(tmp_path / "run", strategy="fedavg", num_rounds=3)
    continued = tmp_path / "run-2"  # began anew, and was killed before its first checkpoint
    continued.mkdir()
    shutil.copy(tmp_path / "run" / "events.jsonl", continued)
    newest = (tmp_path / "run").stat().st_mtime + 10
    os.utime(continued, (newest, newest))
    samples = [{"s": float(s), "life": 1.0, "mib": 100.0 + s, "nodes_files": 5} for s in range(0, 100, 10)]
    found = summary(tmp_path, samples, [Injury(0.0, "node killed", 1)] * 2, 100.0)
    assert found["injected"] == {"node killed": 2}
    assert (found["runs"], found["rounds_merged"]) == (2, 3), "the last checkpoint's, in whichever folder it lies"
    assert found["answers"] == {"merged": sum(row["event"] == "arrival" for row in rows)}
    assert found["early_mib"] == 135.0, "median of the second quarter: 130 and 140"
    assert found["late_mib"] == 185.0
    assert found["early_nodes_files"] == found["late_nodes_files"] == 5


def test_growth_is_looked_for_within_the_superlinks_longest_life():
    """A SuperLink that was started again is small again: that is no leak that went away."""
    lives = [1.0] * 2 + [2.0] * 3 + [3.0] * 5
    samples = [{"s": 10.0 * number, "life": life, "mib": life} for number, life in enumerate(lives)]
    begin, end, kept = longest_life(samples, 100.0)
    assert (begin, end) == (50.0, 100.0)
    assert [row["mib"] for row in kept] == [3.0] * 5


def test_an_answer_that_failed_is_laid_to_what_was_last_done_to_its_node(tmp_path):
    (tmp_path / "config.toml").touch()
    os.utime(tmp_path / "config.toml", (1000.0, 1000.0))
    taken_over = {"event": "arrival", "status": "failed", "partition_id": 3, "wall_s": 99.0}
    failed = [{"event": "arrival", "status": "failed", "partition_id": pid, "wall_s": 50.0} for pid in (0, 1, 2)]
    whole = {"event": "arrival", "status": "merged", "partition_id": 1, "wall_s": 50.0}
    done = [
        Injury(1010.0, "node frozen", 0),
        Injury(1020.0, "client killed", 0),
        Injury(1060.0, "node killed", 0),  # after the round was closed
        Injury(1030.0, "node killed", 1),
        Injury(500.0, "node killed", 2),  # long ago
        Injury(1040.0, "SuperLink killed"),
    ]
    found = losses({tmp_path: [taken_over, {"event": "resume"}, *failed, whole]}, done)
    assert found == {"client killed": 1, "node killed": 1, "nothing done to its node": 1}


@pytest.mark.parametrize("seed", range(5))
def test_each_kind_comes_once_before_any_comes_twice_and_the_superlink_lives_through_the_second_half(seed):
    injuries = Injuries(None, seed)  # type: ignore[arg-type]
    for name in ("_kill_client", "_kill_node", "_freeze", "_kill_server", "_kill_superlink"):
        setattr(injuries, name, lambda: "")
    for _ in WEIGHTS:
        injuries.one(is_late=False)
    assert {injury.kind for injury in injuries.done} == set(WEIGHTS)
    for _ in range(200):
        injuries.one(is_late=True)
    assert [injury.kind for injury in injuries.done].count("SuperLink killed") == 1


def test_a_kind_for_which_there_is_nobody_comes_as_soon_as_there_is_somebody():
    injuries = Injuries(None, 0)  # type: ignore[arg-type]
    for found in (None, "n1"):
        for name in ("_kill_client", "_kill_node", "_freeze", "_kill_server", "_kill_superlink"):
            setattr(injuries, name, lambda found=found: found)
        for _ in WEIGHTS:
            injuries.one(is_late=False)
        assert {injury.kind for injury in injuries.done} == (set(WEIGHTS) if found else set())
    assert {injury.partition_id for injury in injuries.done} == {1}
