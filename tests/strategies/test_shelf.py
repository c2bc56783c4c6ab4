"""Large answers wait on disk, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server_app.checkpoint import CheckpointError, load_checkpoint
from strategies import shelf
from strategies.shelf import Shelf, ShelvedState
from tests.runs import equal_states, final_state, tiny_run, without_timings
from wire.message import Failure, Report

SEMI = {"strategy": "cos2p", "num-clients": 5, "cos2p.quorum-ratio": 0.5, "train.local-epochs": 1, "data.max-test": 60}


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "SHELVE_BYTES", 1)


def report(value: float) -> Report:
    return Report(3, 1, {"w": torch.full((50, 4), value), "n": torch.tensor(7)}, 5)


def test_a_large_state_waits_in_a_file_that_goes_with_its_last_reader(everything_is_large, tmp_path):
    shelved = Shelf(str(tmp_path)).put(report(2.5))
    assert isinstance(shelved.state, ShelvedState)
    assert replace(shelved, state={}) == replace(report(2.5), state={})
    (file,) = tmp_path.iterdir()
    assert equal_states(dict(shelved.state), report(2.5).state)
    mapped = shelved.state["w"]
    del shelved
    assert not file.exists()
    assert float(mapped.sum()) == 500.0, "what was read stays readable"


def test_a_small_state_and_a_failure_stay_in_memory(tmp_path):
    assert Shelf(str(tmp_path)).put(report(1.0)).state["w"].shape == (50, 4)
    assert Shelf(str(tmp_path)).put(Failure(1, 2, "no")) == Failure(1, 2, "no")
    assert list(tmp_path.iterdir()) == []


def test_a_shelf_without_a_folder_takes_its_own_along(everything_is_large):
    own = Shelf()
    kept = own.put(report(1.0))
    folder = Path(own._folder)
    assert len(list(folder.iterdir())) == 1
    own.close()
    assert not folder.exists()
    del kept


@pytest.mark.slow
def test_a_run_with_shelved_answers_is_the_run_without_them_and_can_be_resumed(tmp_path, monkeypatch):
    plain = tiny_run(tmp_path / "plain", num_rounds=6, **SEMI)
    monkeypatch.setattr(shelf, "SHELVE_BYTES", 1)
    shelved = tiny_run(tmp_path / "shelved", num_rounds=6, **SEMI)
    assert without_timings(shelved) == without_timings(plain)
    tiny_run(tmp_path / "first", num_rounds=3, **SEMI)
    held = list((tmp_path / "first" / "checkpoints").glob("round-000003-held-*.tensors"))
    assert len(held) == 2
    resumed = tiny_run(tmp_path / "second", num_rounds=6, resume=str(tmp_path / "first"), **SEMI)
    assert without_timings(resumed) == without_timings(plain)
    assert equal_states(final_state(tmp_path / "second"), final_state(tmp_path / "plain"))
    held[0].unlink()
    with pytest.raises(CheckpointError, match="is missing, which the checkpoint needs"):
        load_checkpoint(tmp_path / "first")


def test_files_of_checkpoints_that_are_dropped_are_dropped_with_them(everything_is_large, tmp_path):
    tiny_run(tmp_path / "run", num_rounds=4, **{**SEMI, "keep-checkpoints": 1})
    left = {path.name.split("-held-")[0] for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"round-000004", "round-000004.pt"}
    assert not list((tmp_path / "run" / "versions").glob("held-*"))
