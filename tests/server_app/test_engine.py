"""Promises about one engine run, with small scripts in the place of Flower's programs (the real ones: test_launch)."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server_app.bundle import copy_app
from server_app.engine import EngineError, Outcome, run_app

SUPERLINK = "echo Uvicorn running on http://$4:$6\nexec sleep 600\n"
STREAM = "echo 'Successfully started run 7'\necho 'INFO :      Starting Flower Simulation'\necho round 1 of 2\n"


def make_programs(folder: Path, *, superlink: str = SUPERLINK, stream: str = STREAM, status: str, details: str) -> None:
    """Executables named as Flower's, in `folder`; `flwr` runs `stream` for `run` and prints the status for `list`."""
    runs = {"runs": [{"run-id": "7", "status": status, "status-details": details}]}
    (folder / "runs.json").write_text(json.dumps(runs))
    flwr = f'if [ "$1" = list ]; then cat "{folder}/runs.json"; exit; fi\n{stream}'
    for name, body in (("flower-superlink", superlink), ("flwr", flwr)):
        (folder / name).write_text(f"#!/bin/sh\n{body}")
        (folder / name).chmod(0o755)


@pytest.fixture
def run_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run an app on fake programs; returns the outcome, the lines shown and the text of the log."""

    def run(is_over: Callable[[], bool] = lambda: False, **programs: str) -> tuple[Outcome, list[str], str]:
        folder = tmp_path / "a folder" / "bin"
        folder.mkdir(parents=True)
        (folder / "python").symlink_to(sys.executable)
        make_programs(folder, **{"status": "finished:completed", "details": "N/A", **programs})
        monkeypatch.setattr(sys, "executable", str(folder / "python"))
        (tmp_path / "app").mkdir()
        shown: list[str] = []
        outcome = run_app(
            tmp_path / "app",
            "",
            num_clients=2,
            num_workers=1,
            state_dir=tmp_path / "state",
            log_path=tmp_path / "engine.log",
            show=shown.append,
            is_over=is_over,
            pending_limit_s=0.2,
            closing_limit_s=0.2,
        )
        assert list((tmp_path / "state").iterdir()) == []
        return outcome, shown, (tmp_path / "engine.log").read_text()

    return run


def test_a_completed_run_is_completed_and_only_its_own_lines_are_shown(run_fake) -> None:
    outcome, shown, log = run_fake()
    assert outcome == Outcome(True)
    assert shown == ["round 1 of 2"]
    assert "[flwr] Successfully started run 7" in log
    assert "[flower-superlink] Uvicorn running" in log


def test_a_run_that_flower_lists_as_failed_is_failed_with_its_reason_though_flwr_run_exits_zero(run_fake) -> None:
    details = "Simulation failed with exception: num-rounds must be positive, got -3"
    outcome, _, _ = run_fake(status="finished:failed", details=details)
    assert outcome == Outcome(False, "num-rounds must be positive, got -3")


def test_a_submission_that_flwr_refuses_is_failed_with_what_it_said(run_fake) -> None:
    box = "╭─ Error ──────╮\n│ no such key  │\n╰──────────────╯"
    outcome, _, _ = run_fake(stream=f"echo '{box}' >&2\nexit 1\n")
    assert outcome == Outcome(False, "no such key")


def test_a_superlink_that_dies_ends_the_run(run_fake) -> None:
    outcome, _, _ = run_fake(
        superlink="echo Uvicorn running on\nsleep 0.5\nexit 3\n", stream=STREAM + "exec sleep 600\n"
    )
    assert outcome == Outcome(False, "the run's own SuperLink ended with exit code 3")


def test_a_superlink_that_never_starts_is_an_error_after_five_ports(run_fake) -> None:
    with pytest.raises(EngineError, match="did not start on 5 ports"):
        run_fake(superlink="echo address already in use\nexit 1\n")


def test_a_run_that_stays_pending_is_started_once_more_and_then_given_up(run_fake) -> None:
    outcome, shown, log = run_fake(status="pending", stream="echo 'Successfully started run 7'\nexec sleep 600\n")
    assert outcome.reason.startswith("the run never started")
    assert any("once more" in line for line in shown)
    assert log.count("Uvicorn running") == 2


def test_a_quiet_run_that_is_not_pending_is_left_alone(run_fake) -> None:
    outcome, shown, _ = run_fake(stream="sleep 1\necho 'INFO :      Starting Flower Simulation'\necho late\n")
    assert outcome == Outcome(True)
    assert shown == ["late"]


def test_an_engine_that_goes_on_after_the_app_has_ended_is_ended(run_fake) -> None:
    outcome, shown, _ = run_fake(is_over=lambda: True, stream=STREAM + "exec sleep 600\n")
    assert outcome == Outcome(True)
    assert shown == ["round 1 of 2"]


def test_the_simulation_runs_under_a_path_without_spaces_for_rays_sake(run_fake, tmp_path: Path) -> None:
    simulation = tmp_path / "a folder" / "bin" / "flwr-simulation"
    make = f"printf 'import sys; print(sys.executable, *sys.argv[1:])' >'{simulation}'\nflwr-simulation 'an argument'\n"
    _, _, log = run_fake(superlink=make + SUPERLINK)
    (line,) = [line for line in log.splitlines() if line.endswith("/environment/bin/python an argument")]
    assert len(line.split()) == 4


def test_missing_programs_are_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"flower-superlink was not found.*run\.sh"):
        run_app(tmp_path, "", num_clients=1, num_workers=1, state_dir=tmp_path / "s", log_path=tmp_path / "log")


def test_leftovers_of_killed_runs_are_removed_and_those_of_live_ones_are_not(run_fake, tmp_path: Path) -> None:
    old, new = tmp_path / "state" / "old", tmp_path / "state" / "new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    (tmp_path / "ray").mkdir()
    (old / "ray-dir").write_text(str(tmp_path / "ray"))
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    with pytest.raises(AssertionError, match="new"):  # run_fake finds the live one's folder still there
        run_fake()
    assert not old.exists()
    assert not (tmp_path / "ray").exists()


def test_the_apps_copy_holds_its_source_and_nothing_else(tmp_path: Path) -> None:
    app = tmp_path / "app"
    wanted = ["pyproject.toml", "LICENSE", ".gitignore", "pruning/a.py", "pruning/tests/b.py", "zoo/c.toml"]
    unwanted = [".venv/x.py", "env/pyvenv.cfg", "env/x.py", "tests/t.py", "results/r.json", "zoo/data.npz"]
    for name in wanted + unwanted:
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).touch()
    copy_app(app, tmp_path / "copy")
    copied = [str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert sorted(copied) == sorted(wanted)
