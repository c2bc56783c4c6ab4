"""AdaptCL's table: read by hand-made curves, and every run a config that parses."""

from __future__ import annotations

import argparse
import json
import shlex

import pytest

from bench import adaptcl
from bench.adaptcl import FOLLOWERS, METHODS, TASKS, Case, compare, first_reaching, keys_of, outcome
from bench.common import RESULTS
from server_app.config import parse
from tests.runs import tiny_run


def run_of(accuracies, round_s=1.0, upload_bytes=10.0, train_macs=100.0):
    """A made-up outcome: one evaluation a round."""
    curve = [
        {"round": n, "time_s": n * round_s, "base": a, "base_reestimated": a / 2, "best": a}
        for n, a in enumerate(accuracies, 1)
    ]
    return {"curve": curve, "time_s": curve[-1]["time_s"], "upload_bytes": upload_bytes, "train_macs": train_macs}


def test_a_row_is_read_against_fedavg_and_at_adaptcls_time():
    fedavg = run_of([0.1, 0.2, 0.5, 0.6, 0.7])
    ours = run_of([0.1, 0.3, 0.5, 0.55, 0.6], round_s=0.5)
    follower = run_of([0.2, 0.4, 0.5, 0.6, 0.7, 0.8], round_s=0.5, upload_bytes=4.0, train_macs=25.0)
    row = compare(follower, fedavg, ours, None)
    assert row["target"] == 0.5  # FedAvg's after three of its five rounds
    assert row["time to target"] == pytest.approx(1.5 / 3.0)
    assert row["total time"] == pytest.approx(3.0 / 5.0)
    assert row["best at AdaptCL's time"] == 0.7, "its sixth round ends after AdaptCL"
    assert (row["best of family"], row["base"], row["base re-est."]) == (0.8, 0.8, 0.4)
    assert (row["upload"], row["MACs"]) == (0.4, 0.25)


def test_the_kept_tables_are_what_their_command_makes_of_the_kept_outcomes(tmp_path, monkeypatch, capsys):
    record = json.loads((RESULTS / "adaptcl_small.json").read_text())
    words = shlex.split(record["command"])[3:]
    assert "--kept" in words
    monkeypatch.chdir(RESULTS.parents[1])
    adaptcl.main([*words, "--out", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text())["results"] == record["results"]


def test_a_target_that_is_never_reached_takes_for_ever():
    assert first_reaching(run_of([0.1, 0.2])["curve"], 0.3) == float("inf")


def test_every_case_is_a_config_that_parses_and_followers_get_the_rounds_that_adaptcls_time_is_good_for(tmp_path):
    options = argparse.Namespace(data_dir="data", store=tmp_path, quick=False, device="auto")
    for task in TASKS:
        kept = {"time_s": 100.0, "least_round_s": 2.5, "least_ratio": 0.3}
        Case(task, 5.0, 0, "adaptcl").path(tmp_path).write_text(json.dumps(kept))
        configs = {method: parse(keys_of(Case(task, 5.0, 0, method), options)) for method in METHODS}
        assert {configs[method].run.num_rounds for method in FOLLOWERS} == {40}
        assert {config.flat()["train.device"] for config in configs.values()} == {"auto"}
        assert configs["adaptcl"].run.num_rounds == TASKS[task].num_rounds
        assert configs["smallest-everywhere"].flat()["fedavg.retention-ratio"] == pytest.approx(0.3, abs=1e-5)


def test_an_outcome_has_the_stragglers_time_at_the_smallest_model(tmp_path):
    rows = tiny_run(tmp_path / "run", strategy="adaptcl", fleet__name="linear:5", num_rounds=6)
    got = outcome(tmp_path / "run" / "events.jsonl")
    arrivals = [row for row in rows if row["event"] == "arrival"]
    least = min(row["retention_ratio"] for row in arrivals)
    assert got["least_ratio"] == least < 1
    times = [row["update_time_s"] for row in arrivals if row["retention_ratio"] == least]
    assert min(times) <= got["least_round_s"] <= max(times)
    assert got["upload_bytes"] == sum(row["upload_bytes"] for row in arrivals)
