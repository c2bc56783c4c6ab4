"""The benchmarks of split learning: data builders, cases, and the small versions."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from bench import adasplit, mixed, split_server
from bench.adasplit import ABLATIONS, METHODS, SWEEPS, Case, keys_of
from fleet.partition import PartitionError, partition_labels
from reporting.c3 import Spending
from server_app.config import parse


@pytest.fixture
def images(shared_data, monkeypatch):
    monkeypatch.setenv("PRUNUS_DATA", str(shared_data))
    monkeypatch.setenv("MIXED_IMAGES", "60")
    mixed._loader.cache_clear()


def test_mixed_cifar_is_five_disjoint_pairs_of_classes(images):
    x, y, _, _ = mixed.mixed_cifar()
    assert x.shape == (300, 32, 32, 3)
    parts = partition_labels(y, 5, "label-blocks:2")
    assert [sorted(set(y[part])) for part in parts] == [[2 * i, 2 * i + 1] for i in range(5)]
    assert {len(part) for part in parts} == {60}


@pytest.mark.slow
def test_mixed_noniid_is_one_task_of_five_classes_from_each_of_five_data_sets(images):
    x, y, _, _ = mixed.mixed_noniid()
    assert x.shape == (300, 32, 32, 3)
    parts = partition_labels(y, 5, "label-blocks:5")
    assert [(min(y[p]), max(y[p])) for p in parts] == [(5 * i, 5 * i + 4) for i in range(5)]
    grey = [bool((x[p][..., 0] == x[p][..., 2]).all()) for p in parts]
    assert grey == [False, False, True, True, True]


def test_missing_images_are_reported_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_DATA", str(tmp_path))
    assert not mixed.has_data()
    with pytest.raises(mixed.MixedDataError, match="set PRUNUS_DATA"):
        mixed.data_folder()


def test_more_clients_than_blocks_share_them_and_fewer_are_refused():
    y = np.repeat(np.arange(4), 10)
    parts = partition_labels(y, 5, "label-blocks:2")
    assert [sorted(set(y[p])) for p in parts] == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    assert sorted(np.concatenate(parts)) == list(range(40))
    with pytest.raises(PartitionError, match="4 labels are 2 blocks, got 1 clients"):
        partition_labels(y, 1, "label-blocks:2")


def test_every_case_is_a_run_that_can_be_configured(tmp_path):
    options = type("Options", (), {"rounds": 20, "device": "auto"})()
    variants = [*ABLATIONS, *(f"{name} {value}" for name, (_, values) in SWEEPS.items() for value in values)]
    cases = [Case("mixed-cifar", method, "", 0, 1e-3, "20x2000") for method in METHODS]
    cases += [Case("mixed-cifar", "adasplit", variant, 0, 1e-3, "20x2000") for variant in variants]
    others = [replace(case, budget="10x1000") for case in cases]
    assert len({case.name for case in [*cases, *others]}) == 2 * len(cases), "an outcome is kept for its own budget"
    flats = [parse(keys_of(case, options)).flat() for case in cases]
    assert {flat["train.device"] for flat in flats} == {"auto"}
    assert {flat["adasplit.kappa"] for flat in flats if "adasplit.kappa" in flat} == {0.3, 0.45, 0.6, 0.75, 0.9}


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """A store with an outcome of every case of five rounds and one seed."""
    monkeypatch.setenv("MIXED_IMAGES", "60")  # main sets it: back to what it was afterwards
    store = tmp_path / "store"
    store.mkdir()
    variants = ["", *ABLATIONS, *(f"{name} {value}" for name, (_, values) in SWEEPS.items() for value in values)]
    for number, variant in enumerate(variants):
        case = Case("mixed-cifar", "adasplit", variant, 0, 3e-4, "5x60")
        keep(store, case, Spending(0.5 + number / 100, 1e9 * (1 + number), 5e8, 1e12))
    for rate, accuracy in ((1e-3, 0.2), (3e-4, 0.4), (3e-3, 0.3)):
        keep(
            store, Case("mixed-cifar", "adasplit", "", adasplit.TUNING_SEED, rate, "5x60"), Spending(accuracy, 1, 1, 1)
        )
    return store


def keep(store, case, spending):
    (store / f"{case.name}.json").write_text(json.dumps(asdict(spending)))


def tables(store, out, *parts):
    asked = [word for part in parts for word in ("--part", part)]
    budget = ["--seeds", "1", "--rounds", "5", "--images", "60"]
    options = ["--kept", "--benchmark", "mixed-cifar", *budget, "--store", str(store), "--out", str(out)]
    record = adasplit.main([*asked, *options])
    assert record == json.loads(out.read_text())
    return {table["title"]: table["rows"] for table in record["results"]["tables"]}


def test_ablations_and_sweeps_are_tables_of_the_kept_outcomes_at_the_tuned_rate_and_a_picture(filled, tmp_path, capsys):
    found = tables(filled, tmp_path / "made.json", "ablations", "sweeps")
    assert [row["method"] for row in found["mixed-cifar: ablations of AdaSplit"]] == ["adasplit", *ABLATIONS]
    assert found["mixed-cifar: ablations of AdaSplit"][1]["accuracy"] == 0.51
    for name, (_, values) in SWEEPS.items():
        assert [row["method"] for row in found[f"mixed-cifar: {name}"]] == [f"{name} {value}" for value in values]
    picture = (tmp_path / "made.svg").read_text()
    assert all(f"<!-- {name} -->" in picture for name in SWEEPS)


def test_a_sweep_of_which_every_run_failed_costs_neither_the_record_nor_the_other_curves(filled, tmp_path, capsys):
    for path in filled.glob("*_adasplit_beta-*"):
        path.unlink()
    found = tables(filled, tmp_path / "made.json", "sweeps")
    assert found["mixed-cifar: beta"] == []
    assert len(found["mixed-cifar: eta"]) == 5
    picture = (tmp_path / "made.svg").read_text()
    assert "<!-- eta -->" in picture
    assert "<!-- beta -->" not in picture


def test_no_picture_is_drawn_where_every_sweep_failed_and_the_record_is_kept(filled, tmp_path, capsys):
    for path in filled.glob("*_seed0.json"):
        path.unlink()
    found = tables(filled, tmp_path / "made.json", "sweeps")
    assert set(map(len, found.values())) == {0}
    assert not (tmp_path / "made.svg").exists()


@pytest.mark.slow
def test_the_small_comparison_names_every_method_with_its_score(tmp_path, capsys):
    store, out = str(tmp_path / "store"), str(tmp_path / "result.json")
    record = adasplit.main(["--quick", "--workers", "1", "--store", store, "--out", out])
    (table,) = record["results"]["tables"]
    assert {row["method"] for row in table["rows"]} == set(METHODS)
    assert all(0 < row["C3 (T 8)"] <= row["accuracy"] <= 1 for row in table["rows"])


def test_a_server_keeps_up_with_devices_that_need_as_long_for_a_step_as_it_needs_for_everybodys():
    found = split_server.keeping_up(0.25, 4, 3, 0)
    expected = 4 * found["server_step_ms"] / found["client_step_ms"]
    assert found["device_slowness_kept_up_with"] == pytest.approx(expected)
    assert found["samples_per_s"] == pytest.approx(1e3 * split_server.BATCH / found["server_step_ms"])
    assert min(found.values()) > 0


@pytest.mark.slow
def test_the_small_server_benchmark_measures_every_kind_of_mask(tmp_path, capsys):
    record = split_server.main(["--quick", "--out", str(tmp_path / "r.json")])
    assert [row["mask"] for row in record["results"]["rows"]] == ["none", "soft", "hard", "hard, half off"]
    memory = record["results"]["memory"]
    for row in memory:
        is_within = row["peak_above_server"] <= row["bound_on_two_stretches"]
        assert row["verdict"].startswith("within" if is_within else "ABOVE")
        assert row["activations_of_one_stretch"] <= 3 * row["max_upload_bytes"]
