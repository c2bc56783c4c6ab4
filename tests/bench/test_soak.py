"""The soak's summary: what was lost, and what grew, from a real run's folders and made-up samples."""

from __future__ import annotations

import os
import shutil
from collections import Counter

from bench.soak import summary
from tests.runs import tiny_run


def test_a_summary_counts_answers_and_rounds_and_compares_early_memory_with_late(tmp_path):
    rows = tiny_run(tmp_path / "run", strategy="fedavg", num_rounds=3)
    continued = tmp_path / "run-2"  # began anew, and was killed before its first checkpoint
    continued.mkdir()
    shutil.copy(tmp_path / "run" / "events.jsonl", continued)
    newest = (tmp_path / "run").stat().st_mtime + 10
    os.utime(continued, (newest, newest))
    samples = [{"s": float(s), "mib": 100.0 + s, "nodes_files": 5} for s in range(0, 100, 10)]
    found = summary(tmp_path, samples, Counter({"node killed": 2}), 100.0)
    assert found["injected"] == {"node killed": 2}
    assert (found["runs"], found["rounds_merged"]) == (2, 3), "the last checkpoint's, in whichever folder it lies"
    assert found["answers"] == {"merged": sum(row["event"] == "arrival" for row in rows)}
    assert found["early_mib"] == 135.0, "median of the second quarter: 130 and 140"
    assert found["late_mib"] == 185.0
    assert found["early_nodes_files"] == found["late_nodes_files"] == 5
