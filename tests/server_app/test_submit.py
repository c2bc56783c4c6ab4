"""Submitting to a SuperLink, without one: what is said and tried when a run that is to go on does."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from server_app.submit import main
from tests.runs import tiny_run


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A run of two rounds."""
    tiny_run(tmp_path / "earlier", strategy="heterofl", num_rounds=2)
    return tmp_path / "earlier"


def test_a_run_resumed_by_hand_says_from_where_and_what_is_lost(earlier, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("server_app.submit.run_once", lambda *_: ("finished:completed", ""))
    assert main(["prunus", f"resume={earlier}", f"run-dir={tmp_path / 'run'}", "num-rounds=4"]) == 0
    assert f"going on from {earlier} after round 2: what came later is done again" in capsys.readouterr().out


def test_where_the_earlier_run_lies_on_the_superlinks_machine_it_is_named_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("server_app.submit.run_once", lambda *_: ("finished:completed", ""))
    assert main(["prunus", "resume=/there/run", f"run-dir={tmp_path / 'run'}"]) == 0
    assert "going on from /there/run\n" in capsys.readouterr().out


def test_a_resumed_run_that_is_cut_off_before_its_first_merge_is_resumed_again_and_not_begun_anew(
    earlier, tmp_path, monkeypatch
):
    tried: list[dict[str, Any]] = []

    def run_once(connection, launch, app_dir, patience_s):
        tried.append(tomllib.loads(launch.settings))
        return ("finished:failed", "killed") if len(tried) == 1 else ("finished:completed", "")

    monkeypatch.setattr("server_app.submit.run_once", run_once)
    words = ["prunus", "--attempts=2", f"resume={earlier}", f"run-dir={tmp_path / 'run'}", "num-rounds=4"]
    assert main(words) == 0
    assert [found["resume"] for found in tried] == [str(earlier)] * 2
    assert [found["strategy"] for found in tried] == ["heterofl"] * 2
