"""A client's memory: whole files only, and nothing of answers that were lost."""

from __future__ import annotations

import pytest
import torch

from client_app.store import ClientStore

MEMORY = {"kept": [["a", [0, 2]]], "depth": None, "velocity": {"w": torch.arange(3.0)}}


def test_what_was_remembered_with_a_merged_answer_comes_back(tmp_path):
    store = ClientStore(str(tmp_path), 3)
    store.save(7, -1, MEMORY)
    got = ClientStore(str(tmp_path), 3).load(7)
    assert got["kept"] == MEMORY["kept"]
    assert torch.equal(got["velocity"]["w"], torch.arange(3.0))


def test_what_belongs_to_a_lost_answer_is_forgotten_with_it(tmp_path):
    store = ClientStore(str(tmp_path), 3)
    store.save(7, -1, {"value": 7})
    store.save(9, 7, {"value": 9})
    assert store.load(7) == {"value": 7}, "answer 9 was never merged: the client goes on from 7"
    store.save(12, 9, {"value": 12})
    assert store.load(7) == {}, "answer 9 was merged: nobody can ask for 7 again"
    assert store.load(9) == {"value": 9}


def test_clients_do_not_see_or_prune_each_others_memories(tmp_path):
    ClientStore(str(tmp_path), 1).save(5, -1, {"value": 1})
    ClientStore(str(tmp_path), 2).save(6, 6, {"value": 2})
    assert ClientStore(str(tmp_path), 1).load(5) == {"value": 1}
    assert ClientStore(str(tmp_path), 2).load(5) == {}


def test_a_client_without_a_folder_remembers_nothing():
    store = ClientStore("", 1)
    store.save(1, -1, {"value": 1})
    assert store.load(1) == {}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    store = ClientStore(str(tmp_path), 1)
    store.save(1, -1, {"value": 1})

    def full_disk(memory: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.save(2, 1, {"value": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["000001-000000000001.pt"]
    assert store.load(1) == {"value": 1}


def test_a_round_of_several_requests_keeps_what_the_last_checkpoint_needs(tmp_path):
    store = ClientStore(str(tmp_path), 1)
    store.save(1, -1, {"value": 1})
    for dispatch in (5, 6, 7):  # 1 is in the checkpoint; 5 and 6 are merged in the same round
        store.save(dispatch, dispatch - 1 if dispatch > 5 else 1, {"value": dispatch}, kept=(1,))
    assert [store.load(n).get("value") for n in (1, 5, 6, 7)] == [1, None, 6, 7]


def test_a_draft_is_kept_beside_the_memories_and_belongs_to_one_client(tmp_path):
    store = ClientStore(str(tmp_path), 1)
    assert store.load_draft() == {}
    store.save_draft({"round": 3})
    store.save(1, -1, {"value": 1})
    store.save(2, 1, {"value": 2})
    assert store.load_draft() == {"round": 3}
    assert ClientStore(str(tmp_path), 2).load_draft() == {}
