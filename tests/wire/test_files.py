"""Files of tensors: whole or not at all, and a full disk is called one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from tests.runs import equal_states, final_state, read_rows, select, tiny_run
from wire import files
from wire.files import save


def content(num_mib: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.arange(int(num_mib * 2**18), dtype=torch.float32), "b": torch.zeros(3)}


@pytest.mark.parametrize("is_synced", [False, True])
def test_what_was_saved_is_read_back_and_replaces_what_was_there(is_synced, tmp_path):
    path = tmp_path / "new folder" / "x.pt"
    for num_mib in (1.0, 0.5):
        assert save(content(num_mib), path, is_synced) == path
        assert equal_states(torch.load(path, weights_only=True), content(num_mib))
    assert list(path.parent.iterdir()) == [path]


def test_a_device_without_room_is_named_so_and_not_a_position_in_an_archive():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left") as caught:
        files._write(content(), file)
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_leaves_the_old_file_and_no_litter_and_says_where_how_much_is_free(small_disk):
    path = save(content(1), small_disk / "x.pt")
    with pytest.raises(OSError, match=r"No space left.* MiB free\); make room") as caught:
        save(content(4), path)
    assert caught.value.filename == str(path)
    assert equal_states(torch.load(path, weights_only=True), content(1))
    assert list(small_disk.iterdir()) == [path]


@pytest.mark.slow
def test_a_run_that_fills_its_disk_says_so_and_goes_on_from_its_last_checkpoint_elsewhere(small_disk, tmp_path):
    settings = {"strategy": "fedavg", "num_rounds": 8, "model__name": "cnn"}
    with pytest.raises(OSError, match="No space left"):
        tiny_run(small_disk / "run", **settings)
    rows = read_rows(small_disk / "run")
    assert rows[-1]["status"] == "failed"
    assert "No space left" in rows[-1]["reason"]
    num_kept = len(list((small_disk / "run" / "checkpoints").iterdir()))
    assert 0 < num_kept < 8
    resumed = tiny_run(tmp_path / "more", resume=str(small_disk / "run"), **settings)
    assert select(resumed, "end")[0]["num_rounds"] == 8
    tiny_run(tmp_path / "whole", **settings)
    assert equal_states(final_state(tmp_path / "more"), final_state(tmp_path / "whole"))


def test_another_error_of_writing_is_handed_on(tmp_path, monkeypatch):
    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="Input/output error"):
        save(content(), tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []
