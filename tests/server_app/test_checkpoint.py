"""Checkpoints: whole or not at all, and readable without trusting them."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fleet.clock import Duration
from pruning.spec import SubModelSpec
from server_app.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from strategies.exchange import Arrival, Entry
from strategies.setting import Progress
from wire.message import Failure, Report

SPEC = SubModelSpec.of({"a": [0, 3, 5]}, depth=2)


def progress_of(server_round: int) -> Progress:
    entry = Entry(17, 4, server_round, 2, SPEC, 1.5, 1000)
    report = Report(17, 4, {"w": torch.arange(3.0)}, 9, (1, 8), 5e9, 0.1, 77, {"loss": 0.3}, True, False, SPEC)
    report = replace(report, companions={"c": torch.arange(4.0)}, num_steps=6)
    held = [
        Arrival(entry, report, Duration(0.1, 0.2, 0.3), 2.1),
        Arrival(entry, Failure(17, 4, "the device dropped out"), Duration(0.0, 0.2, 0.0), 2.2),
    ]
    state = {"w": torch.full((2, 2), float(server_round)), "n": torch.tensor(3), "h": torch.randn(4).half()}
    holders = {"w": torch.tensor([[2.0], [1.0]])}
    return Progress(state, server_round, 2, 0.1 + 0.2, 18, {4: 11, 0: 3}, held, num_merged=7, holders=holders)


def save(folder: Path, server_round: int, keep: int = 2) -> Path:
    own = {"rates": {"3": [0.1, None, True]}, "tensors": {"t": torch.arange(2)}}
    return save_checkpoint(folder, progress_of(server_round), own, {"seed": 0, "a.b": 0.1}, 42, keep)


def test_everything_comes_back_as_it_was(tmp_path):
    path = save(tmp_path, 5)
    progress, own, config, num_rows = load_checkpoint(path)
    before = progress_of(5)
    tensors = {"state": 0, "held": 0, "holders": 0}
    assert vars(progress) | tensors == vars(before) | tensors
    assert torch.equal(progress.holders["w"], before.holders["w"])
    assert torch.equal(progress.state["w"], before.state["w"])
    assert [t.dtype for t in progress.state.values()] == [torch.float32, torch.int64, torch.float16]
    for got, expected in zip(progress.held, before.held, strict=True):
        assert (got.entry, got.duration, got.finish_s) == (expected.entry, expected.duration, expected.finish_s)
    report, failure = progress.held[0].answer, progress.held[1].answer
    assert isinstance(report, Report)
    assert torch.equal(report.state["w"], torch.arange(3.0))
    assert torch.equal(report.companions["c"], torch.arange(4.0))
    tensors = {"state": 0, "companions": 0}
    assert vars(report) | tensors == vars(before.held[0].answer) | tensors
    assert failure == before.held[1].answer
    assert own["rates"] == {"3": [0.1, None, True]}
    assert torch.equal(own["tensors"]["t"], torch.arange(2))
    assert (config, num_rows) == ({"seed": 0, "a.b": 0.1}, 42)


def test_the_newest_are_kept_and_a_folder_means_its_newest(tmp_path):
    for server_round in (1, 2, 3, 10):
        save(tmp_path / "checkpoints", server_round)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["round-000003.pt", "round-000010.pt"]
    assert load_checkpoint(tmp_path)[0].server_round == 10


@pytest.mark.parametrize("failing", ["save", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_litter(failing, tmp_path, monkeypatch):
    path = save(tmp_path / "checkpoints", 1)
    before = path.read_bytes()

    def full_disk(content: object, file: object = None, *rest: object) -> None:
        if failing == "save":
            file.write(b"half a checkpoint")  # type: ignore[union-attr]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((torch, "save") if failing == "save" else (os, failing)), full_disk)
    for server_round in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / "checkpoints", server_round)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["round-000001.pt"]
    assert path.read_bytes() == before
    assert load_checkpoint(tmp_path)[0].server_round == 1


class Bomb:
    """Runs code when it is unpickled by a loader that trusts files."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "bomb", "pickle", "a state dict", "no format"])
def test_a_file_that_is_no_checkpoint_is_an_error_and_runs_no_code(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "hello")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        content = {"bomb": Bomb(), "a state dict": {"w": torch.zeros(2)}, "no format": {"json": "{}"}}[kind]
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"round-000001\.pt is not a readable checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_another_version_says_so(tmp_path):
    path = save(tmp_path, 1)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "format": 999}, path)
    with pytest.raises(CheckpointError, match="has format 999, this version reads 3"):
        load_checkpoint(path)


def test_a_missing_checkpoint_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; expected checkpoints/round-\*\.pt"):
        load_checkpoint(tmp_path)
