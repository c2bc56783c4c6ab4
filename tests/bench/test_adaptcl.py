"""AdaptCL's table: read by hand-made curves, and every run a config that parses."""

from __future__ import annotations

import argparse
import json

import pytest

from bench import adaptcl
from bench.adaptcl import (
    ASYNCHRONOUS,
    CORE,
    FOLLOWERS,
    METHODS,
    TASKS,
    Case,
    compare,
    keys_of,
    outcome,
    plan,
    summarise,
)
from bench.runs import keep
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


def options_of(store, **more):
    flags = {"method": None, "ablations": False, "asynchronous": False, "sparsity": 0.0, "kept": True, "quick": False}
    what = {"task": ["digits"], "sigma": [5.0], "seed": 0, "seeds": 1, "data_dir": "data", "store": store}
    return argparse.Namespace(**{**flags, **what, **more, "device": "cpu"})


@pytest.mark.parametrize(
    ("flags", "methods"),
    [
        ({}, set(CORE)),
        ({"ablations": True}, set(METHODS) - set(ASYNCHRONOUS)),
        ({"asynchronous": True}, {*CORE, *ASYNCHRONOUS}),
        ({"method": ["ssp"]}, {"ssp"}),
    ],
)
def test_a_plain_run_takes_the_core_methods_and_the_others_where_they_are_asked_for(flags, methods, tmp_path):
    assert {case.method for case in plan(options_of(tmp_path, **flags))} == methods


def test_asynchronous_rivals_get_as_many_answers_as_the_others_and_as_many_evaluations(tmp_path):
    options = options_of(tmp_path)
    for task in TASKS:
        ours = parse(keys_of(Case(task, 5.0, 0, "fedavg"), options)).run
        for method in ASYNCHRONOUS:
            run = parse(keys_of(Case(task, 5.0, 0, method), options)).run
            assert run.num_rounds == 10 * ours.num_rounds
            assert run.evaluation.every == 10 * ours.evaluation.every
            assert run.evaluation.family_every == 10 * ours.evaluation.family_every


def test_one_regulariser_for_every_method_is_in_its_config_and_in_the_name_of_its_outcome(tmp_path):
    options = options_of(tmp_path, sparsity=1e-4, asynchronous=True, ablations=True)
    kept = {"time_s": 100.0, "least_round_s": 2.5, "least_ratio": 0.3}
    keep(Case("digits", 5.0, 0, "adaptcl", 1e-4).path(tmp_path), kept)
    for case in plan(options):
        assert parse(keys_of(case, options)).run.train.sparsity == 1e-4
        assert case.name.replace("_sparsity0.0001", "") == Case("digits", 5.0, 0, case.method).name
        assert "_sparsity0.0001_" in case.name


def test_an_asynchronous_rivals_row_counts_rounds_of_all_clients_and_reads_outcomes_of_one_regulariser(tmp_path):
    options = options_of(tmp_path, sparsity=1e-4)
    for method, num_points in (("fedavg", 5), ("adaptcl", 5), ("ssp", 50)):
        keep(Case("digits", 5.0, 0, method, 1e-4).path(tmp_path), run_of([0.1] * num_points))
        keep(Case("digits", 5.0, 0, method).path(tmp_path), run_of([0.9] * num_points))
    table = summarise("digits", 5.0, options)
    assert table["sparsity"] == 1e-4
    assert {row["method"]: (row["rounds"], row["base"]) for row in table["rows"]} == dict.fromkeys(
        ("fedavg", "adaptcl", "ssp"), ("5.000", "0.100")
    )


@pytest.mark.slow
def test_the_quick_version_runs_a_follower_and_a_rival_that_waits_for_nobody_and_repeats_nothing(tmp_path, capsys):
    options = ["--quick", "--workers", "1", "--store", str(tmp_path / "store"), "--out", str(tmp_path / "result.json")]
    methods = ("fedavg", "adaptcl", "smallest-everywhere", "fedasync")
    options += [word for method in methods for word in ("--method", method)]
    adaptcl.main(options)
    (table,) = json.loads((tmp_path / "result.json").read_text())["results"]["tables"]
    rows = {row["method"]: row for row in table["rows"]}
    assert rows.keys() == set(methods)
    assert rows["fedasync"]["rounds"] == rows["adaptcl"]["rounds"] == "8.000"
    assert float(rows["smallest-everywhere"]["rounds"]) > 8, "as many as fit into AdaptCL's time"
    capsys.readouterr()
    adaptcl.main(options)
    assert json.loads((tmp_path / "result.json").read_text())["results"]["tables"] == [table]
    assert "min left" not in capsys.readouterr().out
