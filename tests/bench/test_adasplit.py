"""The benchmarks of split learning: data builders, cases, and the small versions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench import adasplit, mixed, split_server
from bench.adasplit import ABLATIONS, METHODS, SWEEPS, Case, keys_of
from fleet.partition import PartitionError, partition_labels
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
    options = type("Options", (), {"rounds": 20})()
    variants = [*ABLATIONS, *(f"{name} {value}" for name, (_, values) in SWEEPS.items() for value in values)]
    cases = [Case("mixed-cifar", method, "", 0, 1e-3, "20x2000") for method in METHODS]
    cases += [Case("mixed-cifar", "adasplit", variant, 0, 1e-3, "20x2000") for variant in variants]
    others = [replace(case, budget="10x1000") for case in cases]
    assert len({case.name for case in [*cases, *others]}) == 2 * len(cases), "an outcome is kept for its own budget"
    flats = [parse(keys_of(case, options)).flat() for case in cases]
    assert {flat["adasplit.kappa"] for flat in flats if "adasplit.kappa" in flat} == {0.3, 0.45, 0.6, 0.75, 0.9}


@pytest.mark.slow
def test_the_small_comparison_names_every_method_with_its_score(tmp_path, capsys):
    store, out = str(tmp_path / "store"), str(tmp_path / "result.json")
    record = adasplit.main(["--quick", "--workers", "1", "--store", store, "--out", out])
    (table,) = record["results"]["tables"]
    assert {row["method"] for row in table["rows"]} == set(METHODS)
    assert all(0 < row["C3 (T 8)"] <= row["accuracy"] <= 1 for row in table["rows"])


@pytest.mark.slow
def test_the_small_server_benchmark_measures_every_kind_of_mask(tmp_path, capsys):
    record = split_server.main(["--quick", "--out", str(tmp_path / "r.json")])
    assert [row["mask"] for row in record["results"]["rows"]] == ["none", "soft", "hard", "hard, half off"]
    assert all(row["activations_of_one_stretch"] <= 3 * row["max_upload_bytes"] for row in record["results"]["memory"])
