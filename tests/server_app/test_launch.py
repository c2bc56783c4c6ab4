"""Promises about starting runs. The slow ones start Flower's real engine on a tiny app."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from server_app.config import defaults
from server_app.launch import Launch, LaunchError, close_event_log, guard, has_end, main, plan, run
from tests.runs import equal_states, final_state, tiny_run

PYPROJECT = """
[project]
name = "tiny"
version = "0.1.0"
description = "asks each client where its code lies"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "server_app.app:app"
clientapp = "client_app.app:app"
[tool.flwr.app.config]
mode = "ok"
run-dir = ""
"""
CLIENT = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def where(message, context):
    return Message(RecordDict({"where": ConfigRecord({"file": __file__})}), reply_to=message)
"""
FOREIGN_CLIENT = """
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def where(message, context):
    raise RuntimeError("this client belongs to another project")
"""
SERVER = """
import json, pathlib, time
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    mode, run_dir = context.run_config["mode"], pathlib.Path(context.run_config["run-dir"])
    if mode == "raise":
        raise ValueError("num-blossoms must be positive, got -3")
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.05)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in grid.get_node_ids()]
    files = [reply.content["where"]["file"] for reply in grid.send_and_receive(messages)]
    (run_dir / "files.json").write_text(json.dumps(files))
    if mode == "hang":
        (run_dir / "events.jsonl").write_text('{"event": "run", "wall_s": 0.5}\\n{"event": "mer')
        print("hanging", flush=True)
        time.sleep(600)
    print("tiny is done", flush=True)
"""
# what `main` does, with a configuration of the tiny app's own
DRIVER = """
import sys
from pathlib import Path
from server_app.launch import Launch, guard, run
app_dir, run_dir, mode = sys.argv[1:]
settings = f"mode = '{mode}'\\nrun-dir = '{run_dir}'\\n"
sys.exit(guard(lambda: run(Launch(settings, Path(run_dir), num_clients=2, num_workers=2), Path(app_dir))))
"""
REPOSITORY = Path(__file__).resolve().parents[2]


def make_app(folder: Path, client: str = CLIENT) -> Path:
    for name, text in {"server_app": SERVER, "client_app": client}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
        (folder / name / "app.py").write_text(text)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return folder


def start(app_dir: Path, run_dir: Path, mode: str, working_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-u", "-c", DRIVER, str(app_dir), str(run_dir), mode],
        cwd=working_dir,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_of(app_dir: Path) -> list[str]:
    """Commands of the processes that work in the app's private folders or have them in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # Ray overwrites the environment of its workers with their title; their working directory tells
            traces = os.readlink(entry / "cwd").encode() + (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{app_dir}/.flwr".encode() in traces:
            found.append(command)
    return found


def wait_until_gone(app_dir: Path, limit_s: float) -> list[str]:
    deadline_s = time.monotonic() + limit_s
    while (left := processes_of(app_dir)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return left


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


@pytest.mark.slow
@needs_proc
def test_two_runs_at_once_each_end_with_their_own_outcome_and_code_and_leave_nothing_running(tmp_path: Path) -> None:
    good = make_app(tmp_path / "a good app")
    bad = make_app(tmp_path / "bad", client=FOREIGN_CLIENT)
    good_run = start(good, tmp_path / "good run", "ok", working_dir=bad)  # a folder with packages of the same names
    bad_run = start(bad, tmp_path / "bad run", "raise", working_dir=good)
    good_text, bad_text = good_run.communicate(timeout=400)[0], bad_run.communicate(timeout=400)[0]

    assert good_run.returncode == 0, good_text
    shown = good_text.splitlines()
    assert shown[1:-1] == ["tiny is done"], "a person sees the app's lines alone"
    assert shown[-1] == f"results: {tmp_path / 'good run'}"
    files = json.loads((tmp_path / "good run" / "files.json").read_text())
    assert len(files) == 2
    assert all(file.startswith(f"{good}/.flwr/runs/") for file in files)

    assert bad_run.returncode == 1, bad_text
    assert "error: the run failed: num-blossoms must be positive, got -3" in bad_text
    assert "Traceback" not in bad_text
    assert "Traceback" in (tmp_path / "bad run" / "engine.log").read_text()

    for app_dir in (good, bad):
        assert processes_of(app_dir) == []
        assert list((app_dir / ".flwr" / "runs").iterdir()) == []


@pytest.mark.slow
@needs_proc
def test_ctrl_c_and_even_a_kill_leave_nothing_running(tmp_path: Path) -> None:
    stopped, killed = make_app(tmp_path / "stopped"), make_app(tmp_path / "killed")
    runs = [start(app_dir, app_dir / "run", "hang", working_dir=tmp_path) for app_dir in (stopped, killed)]
    for process in runs:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "hanging\n":
            assert line, "ended before it began"
    assert len(processes_of(stopped)) > 5

    begin_s = time.monotonic()
    runs[0].send_signal(signal.SIGINT)
    runs[1].kill()
    text = runs[0].communicate(timeout=60)[0]
    assert time.monotonic() - begin_s < 15
    assert runs[0].returncode == 130
    assert "stopped by SIGINT" in text
    assert processes_of(stopped) == []
    assert list((stopped / ".flwr" / "runs").iterdir()) == []
    rows = [json.loads(row) for row in (stopped / "run" / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["run", "end"]
    assert rows[1]["status"] == "interrupted"

    runs[1].communicate(timeout=60)
    assert wait_until_gone(killed, limit_s=30) == []
    (leftover,) = (killed / ".flwr" / "runs").iterdir()  # the next run there would remove both folders
    shutil.rmtree((leftover / "ray-dir").read_text())


@pytest.fixture
def event_log(tmp_path: Path) -> Path:
    rows = [{"event": "run", "wall_s": 0.0}, {"event": "merge", "wall_s": 2.5, "time_s": 40.0, "server_round": 3}]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_cut_off_in_the_middle_of_a_row_is_closed_after_its_last_whole_row(event_log: Path) -> None:
    with event_log.open("a") as file:
        file.write('{"event": "merge", "wall')
    close_event_log(event_log.parent, "interrupted", "stopped by SIGINT")
    assert read_rows(event_log)[2:] == [
        {
            "event": "end",
            "wall_s": 2.5,
            "status": "interrupted",
            "reason": "stopped by SIGINT",
            "time_s": 40.0,
            "num_rounds": 3,
        }
    ]


def test_a_log_that_the_run_closed_itself_is_left_as_it_is(event_log: Path) -> None:
    close_event_log(event_log.parent, "completed", "")
    before = event_log.read_bytes()
    close_event_log(event_log.parent, "failed", "late")
    assert event_log.read_bytes() == before


def test_a_run_without_a_log_gets_none(tmp_path: Path) -> None:
    close_event_log(tmp_path, "failed", "never began")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("end", "is_carried_out", "exit_code"),
    [("completed", True, 0), ("completed", False, 1), ("failed", True, 1)],
)
def test_a_run_is_completed_only_if_both_the_engine_and_its_log_say_so(
    end: str, is_carried_out: bool, exit_code: int, tmp_path: Path
) -> None:
    def carry_out() -> None:
        row = {"event": "end", "wall_s": 1.0, "status": end, "reason": "the loss is not finite"}
        (tmp_path / "events.jsonl").write_text(json.dumps(row) + "\n")
        if not is_carried_out:
            raise OSError("disk full")

    assert run(Launch("", tmp_path, 2, 1, carry_out)) == exit_code


@pytest.mark.parametrize("length", [0, 4000, 4096, 100_000])
def test_an_end_is_seen_however_long_its_reason_is(length: int, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    rows = [{"event": "merge", "wall_s": 1.0}, {"event": "end", "wall_s": 2.0, "reason": "x" * length}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    assert not has_end(log)
    line = json.dumps(rows[1])
    log.write_text(json.dumps(rows[0]) + "\n" + line)
    assert not has_end(log), "half a row may be any row"
    log.write_text(json.dumps(rows[0]) + "\n" + line + "\n")
    assert has_end(log)
    log.write_text(line + "\n")
    assert has_end(log), "a run that failed at once has no other row"


def test_an_event_log_that_speaks_of_an_end_has_none_yet(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "warning", "message": '"event": "end"'}) + "\n")
    assert not has_end(tmp_path / "events.jsonl")
    assert not has_end(tmp_path / "absent.jsonl")


def test_a_run_in_which_every_answer_failed_exits_with_1_however_short_it_is(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(instruction: object) -> None:
        raise RuntimeError("the battery is empty")

    monkeypatch.setattr("client_app.handler.handle", fails)
    settings = (
        "strategy=fedavg",
        "transport=local",
        "num-workers=1",
        "num-rounds=2",
        "num-clients=3",
        "model.name=mlp",
    )
    assert main(["run", *settings, f"run-dir={tmp_path / 'run'}"]) == 1
    assert "nothing was merged in the whole run" in capsys.readouterr().err
    end = read_rows(tmp_path / "run" / "events.jsonl")[-1]
    assert (end["event"], end["status"]) == ("end", "failed")


def test_a_local_run_that_is_interrupted_says_so_in_its_log(tmp_path: Path, capsys) -> None:
    def carry_out() -> None:
        (tmp_path / "events.jsonl").write_text('{"event": "run", "wall_s": 0.5}\n')
        os.kill(os.getpid(), signal.SIGTERM)

    assert guard(lambda: run(Launch("", tmp_path, 2, 1, carry_out))) == 143
    assert read_rows(tmp_path / "events.jsonl")[-1]["status"] == "interrupted"


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_interrupted_run_offers_a_report_only_where_there_is_something_to_show(
    has_begun: bool, tmp_path: Path, capsys
) -> None:
    def carry_out() -> None:
        if has_begun:
            (tmp_path / "events.jsonl").write_text('{"event": "run", "wall_s": 0.5}\n')
        os.kill(os.getpid(), signal.SIGINT)

    assert guard(lambda: run(Launch("", tmp_path, 2, 1, carry_out))) == 130
    said = capsys.readouterr().out
    assert ("./run.sh report" in said) == (f"./run.sh report {tmp_path}" in said) == has_begun


def test_paths_are_absolute_the_callers_from_where_it_is_and_the_defaults_from_the_project(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[[devices]]\nprofile = "laptop"\ncount = 10\n')
    (tmp_path / "a b").mkdir()
    np.savez(
        tmp_path / "a b" / "c.npz", **dict.fromkeys(("x_train", "x_test", "y_test"), ()), y_train=np.zeros(100, int)
    )
    settings = plan(["data.name=npz:a b/c.npz", "fleet.name=mine.toml", "run-dir=out"], tmp_path)
    flat = tomllib.loads(settings.settings)
    assert flat["data"]["name"] == f"npz:{tmp_path}/a b/c.npz"
    assert flat["data"]["dir"] == str(REPOSITORY / "data")
    assert flat["fleet"]["name"] == f"{tmp_path}/mine.toml"
    assert settings.run_dir == tmp_path / "out"


def test_each_run_gets_a_folder_of_its_own_below_results() -> None:
    first, second = plan(["strategy=fedavg"]), plan(["strategy=fedavg"])
    assert first.run_dir.parent == REPOSITORY / "results"
    assert "-fedavg-" in first.run_dir.name
    assert first.run_dir != second.run_dir


def test_no_more_clients_train_at_once_than_there_are() -> None:
    assert plan(["num-clients=1"]).num_workers == 1
    assert plan(["num-workers=7"]).num_workers == 7


def test_pyproject_has_every_key_with_its_default() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    from_pyproject = flatten(project["tool"]["flwr"]["app"]["config"])
    assert from_pyproject == defaults(), "paste the output of `python -m server_app.config` into pyproject.toml"


def flatten(table: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "num-round=3"], "num-rounds"),
        (["num-rounds=many"], "expected int"),
        (["run", "fedavg"], "expected key=value"),
        (["strategy=fedagv"], "fedavg"),
        (["compare", "fedavg"], "two strategies or more"),
        (["compare", "fedavg", "heterofl", "strategy=x"], "leave out strategy="),
        (["compare", "fedavg", "heterofll"], "heterofl"),
        (["model.name=resnet9"], "did you mean 'resnet8'"),
        (["compare", "fedavg", "heterofl", "model.name=resnet9"], "did you mean 'resnet8'"),
        (["model.name=vgg11", "model.exits=true"], "has no option 'exits'"),
        (["model.name=cnn", "model.patch-size=4"], "has no option 'patch_size'"),
        (["data.name=digitz"], "Did you mean 'digits'"),
        (["data.name=npz:none.npz"], "none.npz: does not exist"),
        (["data.name=cifar10", "data.dir=nowhere"], "data.download=true"),
        (["data.partition=dirichle:1"], "Did you mean 'dirichlet'"),
        (["data.partition=pathological:0"], "whole number >= 1"),
        (["fleet.name=linaer:5"], "Did you mean 'linear'"),
        (["fleet.name=linear:0.5"], "a number >= 1"),
        (["fleet.name=none.toml"], "none.toml: cannot be read"),
        (["resume=nowhere"], "there is no checkpoint"),
        (["num-clients=200"], "need 2000 samples, got 1437; use fewer clients"),
        (["data.max-train=90"], "need 100 samples, got 90; use fewer clients"),
        (["data.partition=pathological:1", "num-clients=9"], "cannot hold 10 labels; use at least 2 labels a client"),
        (["data.name=hub:owner/set"], "allow that with data.download=true"),
        (["data.seed=-1"], "data.seed: got -1"),
        (["train.device=cuda"], "train.device: got 'cuda', but PyTorch finds no CUDA device on this machine"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_starts_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr("server_app.launch.run", lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments, tmp_path) == 2
    assert message in capsys.readouterr().err


def test_what_a_superlink_reads_is_not_looked_for_here(tmp_path: Path) -> None:
    words = ["data.name=npz:/there/only.npz", "fleet.name=none", "resume=/there/run", "train.device=cuda"]
    flat = tomllib.loads(plan(words, tmp_path, is_here=False).settings)
    assert (flat["data"]["name"], flat["resume"]) == ("npz:/there/only.npz", "/there/run")
    with pytest.raises(LaunchError, match="does not exist"):
        plan(words[:-1], tmp_path)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The folder of a run of HeteroFL whose last checkpoint was kept."""
    tiny_run(tmp_path / "earlier", strategy="heterofl", num_rounds=2, seed=7, heterofl__rates="1,0.5")
    return tmp_path / "earlier"


@pytest.mark.parametrize("source", ["earlier", "earlier/checkpoints/round-000001.pt"])
def test_a_resumed_run_takes_every_setting_that_is_not_given_from_the_one_it_continues(
    source: str, earlier: Path, tmp_path: Path
) -> None:
    launch = plan([f"resume={source}", "num-rounds=3", "run-dir=later"], tmp_path)
    before, now = (flatten(tomllib.loads(text)) for text in ((earlier / "config.toml").read_text(), launch.settings))
    changed = {
        "data.dir": str(REPOSITORY / "data"),
        "num-rounds": 3,
        "run-dir": str(tmp_path / "later"),
        "resume": str(tmp_path / source),
    }
    assert now == {**before, **changed}


def test_a_run_is_resumed_by_naming_its_folder_alone(earlier: Path, tmp_path: Path, capsys) -> None:
    words = [f"resume={earlier}", "num-rounds=3", "transport=local", "num-workers=1", f"run-dir={tmp_path / 'later'}"]
    assert main(words) == 0, capsys.readouterr().err
    assert read_rows(tmp_path / "later" / "events.jsonl")[-1]["num_rounds"] == 3


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("strategy=fedavg", "strategy: 'heterofl' then, 'fedavg' now."),
        ("seed=8", "seed: 7 then, 8 now. These cannot change in the middle of a run: leave them out"),
    ],
)
def test_a_resumed_run_that_would_be_another_is_refused_before_it_starts(
    word: str, message: str, earlier: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("server_app.launch.run", lambda *_: pytest.fail("a run was started"))
    assert main([f"resume={earlier}", word]) == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_results_folder_exits_with_2_and_names_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([f"run-dir={tmp_path / 'file' / 'run'}"], tmp_path) == 2
    assert "choose run-dir=PATH" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").write_text("kept\n")
    assert main([f"run-dir={tmp_path}"], tmp_path) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "events.jsonl").read_text() == "kept\n"


SMALL = ["transport=local", "num-workers=1", "num-clients=2", "num-rounds=1", "model.name=mlp", "data.max-train=200"]


@pytest.mark.slow
@needs_proc
def test_the_script_runs_from_any_folder_says_where_the_report_is_and_passes_the_code_on(tmp_path: Path) -> None:
    if not (REPOSITORY / ".venv").exists():
        pytest.skip("would make the environment first: run `./run.sh` once")

    def script(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(REPOSITORY / "run.sh"), *words, f"run-dir={tmp_path / 'run'}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)

    done = script("strategy=fedavg", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    report = Path(done.stdout.splitlines()[-1].removeprefix("report: "))
    assert report == tmp_path / "run" / "report.html"
    assert report.stat().st_size > 10_000
    again = script("strategy=fedavg", *SMALL)
    assert again.returncode != 0
    assert "already holds a run" in again.stdout + again.stderr


@pytest.mark.slow
@needs_proc
def test_masks_learned_over_two_rounds_are_the_same_in_flowers_simulation_and_without_it(tmp_path: Path) -> None:
    keys = [*SMALL[2:], "num-rounds=2", "strategy=cos2p", "cos2p.budgets=1,0.5", "cos2p.quorum-ratio=1"]
    kept = {}
    for transport in ("grid", "local"):
        run_dir = tmp_path / transport
        command = [sys.executable, "-m", "server_app.launch", *keys, f"transport={transport}", f"run-dir={run_dir}"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        paths = sorted(run_dir.rglob("clients/**/*.pt"), key=lambda path: path.name)
        memories = [torch.load(path, weights_only=True)["objective"] for path in paths]
        learned = [memory for memory in memories if "scores" in memory]
        first, second = (float(memory["optimizer"]["step"]) for memory in learned)
        assert second == 2 * first > 0, "the second mask phase goes on from the first"
        kept[transport] = (final_state(run_dir), [memory["scores"] for memory in learned])
    assert equal_states(kept["grid"][0], kept["local"][0])
    for grid, local in zip(kept["grid"][1], kept["local"][1], strict=True):
        assert equal_states(grid, local)


@pytest.mark.slow
def test_a_comparison_runs_each_strategy_and_writes_one_page_and_a_failure_is_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_app.launch.PROJECT_DIR", tmp_path)
    assert main(["compare", "fedavg", "heterofl", *SMALL]) == 0
    shown = capsys.readouterr().out
    page = Path(shown.splitlines()[-1].removeprefix("comparison: "))
    assert page.parent.parent == tmp_path / "results"
    text = page.read_text()
    assert "fedavg" in text
    assert "heterofl" in text
    assert main(["compare", "fedavg", "depthfl", *SMALL]) == 1, "depthfl needs a model with exits"
    assert "fewer than two runs completed" in capsys.readouterr().err
