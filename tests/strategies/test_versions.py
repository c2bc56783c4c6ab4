"""Older versions: files, mapped, whole or not at all, gone when nobody needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from strategies.versions import VersionError, VersionStore


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((50, 50), value), "n": torch.tensor(3)}


def test_a_version_comes_back_bit_for_bit_and_is_mapped_not_copied(tmp_path):
    store = VersionStore(str(tmp_path / "versions"))
    store.put(7, state(0.1))
    got = store.get(7)
    assert torch.equal(got["w"], state(0.1)["w"])
    assert int(got["n"]) == 3
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert "version-000000007.pt" in maps.read_text()


def test_a_version_is_written_once_and_what_an_earlier_run_left_is_replaced(tmp_path):
    VersionStore(str(tmp_path)).put(1, state(0.0))
    store = VersionStore(str(tmp_path))
    for value in (1.0, 2.0):
        store.put(1, state(value))
    assert float(store.get(1)["w"][0, 0]) == 1.0


def test_what_the_newest_checkpoints_need_is_kept(tmp_path):
    store = VersionStore(str(tmp_path), keep=2)
    for version in range(4):
        store.put(version, state(version))
    store.release({0, 1, 2, 3})
    store.release({2, 3})
    assert store.versions() == [0, 1, 2, 3]
    store.release({3})
    assert store.versions() == [2, 3]
    mapped = store.get(2)
    store.release({3})
    assert store.versions() == [3]
    assert float(mapped["w"].sum()) == 5000, "a mapped file that is dropped stays readable for who has it"


def test_a_missing_or_broken_version_is_an_error_that_names_the_file(tmp_path):
    store = VersionStore(str(tmp_path))
    with pytest.raises(VersionError, match=r"version-000000004\.pt is missing.*resume from another checkpoint"):
        store.expect({4})
    (tmp_path / "version-000000004.pt").write_bytes(b"half")
    with pytest.raises(VersionError, match=r"version-000000004\.pt cannot be read"):
        store.expect({4})


@pytest.mark.parametrize("failing", ["save", "replace"])
def test_a_write_that_fails_leaves_no_litter(failing, tmp_path, monkeypatch):
    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((torch, "save") if failing == "save" else (os, "replace")), full_disk)
    with pytest.raises(OSError, match="No space left"):
        VersionStore(str(tmp_path)).put(1, state(0.0))
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_a_folder_cleans_up_after_itself():
    store = VersionStore()
    store.put(1, state(0.0))
    folder = Path(store.folder)
    assert folder.is_dir()
    store.close()
    assert not folder.exists()
