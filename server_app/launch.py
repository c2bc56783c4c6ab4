"""Starts runs: `python -m server_app.launch run key=value ...` and `... compare STRATEGY ... key=value ...`.

Names, values and files are checked before anything is started. The exit code is 0 when every run completed, 1 when
one failed (the reason is printed), 2 when the arguments are wrong, and 128 + the signal when a signal ended it (130 for
Ctrl-C).
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server_app.engine import EngineError, Outcome, run_app
from server_app.processes import (
    Interrupted,
    adopt_orphans,
    count_cores,
    end_descendants,
    interruptible,
    list_descendants,
    uninterrupted,
)

PROJECT_DIR = Path(__file__).resolve().parents[1]
ENGINE_LOG = "engine.log"
EVENT_LOG = "events.jsonl"
REPORT = "report.html"
USAGE = """\
usage: ./run.sh [run] [key=value ...]                               one run: ./run.sh strategy=heterofl num-rounds=20
       ./run.sh compare STRATEGY STRATEGY ... [key=value ...]       one run of each, and a page that compares them
The keys are those of [tool.flwr.app.config] in pyproject.toml."""


class LaunchError(ValueError):
    """The command line asks for something that cannot be run."""


@dataclass(frozen=True)
class Launch:
    """One run to start.

    Attributes
    ----------
    settings : what the run is told, as TOML lines of flat keys.
    run_dir : folder of the run, absolute.
    num_clients, num_workers : clients that there are; those that train at the same time.
    carry_out : the run itself where it does without Flower's engine, else None.
    """

    settings: str
    run_dir: Path
    num_clients: int
    num_workers: int
    carry_out: Callable[[], object] | None = None


def main(arguments: Sequence[str], app_dir: Path = PROJECT_DIR) -> int:
    """Carry out one command and return the exit code."""
    command, rest = (arguments[0], list(arguments[1:])) if arguments else ("run", [])
    if command not in ("run", "compare"):
        command, rest = "run", list(arguments)
    strategies = [token for token in rest if "=" not in token] if command == "compare" else []
    tokens = [token for token in rest if token not in strategies]
    return guard(lambda: run(plan(tokens), app_dir) if command == "run" else compare(strategies, tokens, app_dir))


def guard(action: Callable[[], int]) -> int:
    """Carry out `action`, which returns an exit code; errors of ours and signals become a message and a code."""
    adopt_orphans()
    earlier = list_descendants(os.getpid())
    with interruptible():
        try:
            return action()
        except LaunchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except EngineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except Interrupted as interruption:
            with uninterrupted():
                end_descendants(keep=earlier)  # of a local run: the pool's processes
            print(f"stopped by {interruption}; nothing is left running", file=sys.stderr)
            return interruption.exit_code


def plan(tokens: Sequence[str], working_dir: Path | None = None, is_here: bool = True) -> Launch:
    """Check ``key=value`` tokens and turn them into a run.

    Paths that the caller names are relative to `working_dir` (default: the current directory), those of the defaults to
    the project. With ``resume=`` every key that is not given is that run's. `is_here`: the run is of this machine and
    reads its files. Raises `LaunchError` for a malformed token, an unknown key or name, a value that the configuration
    refuses, or a file that is not there.
    """
    from server_app import config, precheck, resume  # imports torch: not for a usage error

    base = Path.cwd() if working_dir is None else working_dir
    try:
        given = config.parse_overrides(list(tokens))
        if given.get("resume"):
            given = resume.earlier_settings(config.join(base, str(given["resume"]))) | given
        whole = config.parse(given)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    if "data.dir" not in given:
        data = replace(whole.run.data, dir=str(PROJECT_DIR / whole.run.data.dir))
        whole = replace(whole, run=replace(whole.run, data=data))
    if not whole.run.run_dir:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{whole.run.strategy}-{secrets.token_hex(2)}"
        whole = replace(whole, run=replace(whole.run, run_dir=str(PROJECT_DIR / "results" / name)))
    whole = config.absolute(whole, base)
    try:
        if is_here:
            precheck.check_start(whole)
    except ValueError as error:
        raise LaunchError(str(error)) from None

    def carry_out() -> None:
        from server_app.local import run_local

        run_local(whole, show=_show)

    return Launch(
        settings=config.as_toml(whole.flat()),
        run_dir=Path(whole.run.run_dir),
        num_clients=whole.run.num_clients,
        num_workers=whole.run.num_workers or min(count_cores(), whole.run.num_clients),
        carry_out=carry_out if whole.run.transport == "local" else None,
    )


def run(launch: Launch, app_dir: Path = PROJECT_DIR) -> int:
    """Run once, say where the results are, and return 0 if the run completed, else 1."""
    run_dir = launch.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ENGINE_LOG).touch()
    except OSError as error:
        raise LaunchError(f"run-dir: cannot write to {run_dir}: {error.strerror}; choose run-dir=PATH") from None
    if (run_dir / EVENT_LOG).exists():
        raise LaunchError(f"run-dir: {run_dir} already holds a run; choose another, or continue it with resume=PATH")
    print(f"run folder: {run_dir}")
    try:
        outcome = _start_on_engine(launch, app_dir) if launch.carry_out is None else _start_here(launch.carry_out)
    except Interrupted as interruption:
        with uninterrupted():
            close_event_log(run_dir, "interrupted", f"stopped by {interruption}")
        if (run_dir / EVENT_LOG).exists():
            print(f"incomplete: {run_dir}; ./run.sh report {run_dir} shows what there is")
        else:
            print("stopped before the run began")
        raise
    end = close_event_log(run_dir, "completed" if outcome.is_completed else "failed", outcome.reason)
    if end["status"] != "completed" or not outcome.is_completed:
        print(f"error: the run failed: {outcome.reason or end['reason']}", file=sys.stderr)
        if (run_dir / ENGINE_LOG).stat().st_size:
            print(f"everything that was said: {run_dir / ENGINE_LOG}", file=sys.stderr)
        return 1
    report = run_dir / REPORT
    print(f"report: {report}" if report.exists() else f"results: {run_dir}")
    return 0


def compare(strategies: Sequence[str], tokens: Sequence[str], app_dir: Path = PROJECT_DIR) -> int:
    """Run each strategy in turn with the same settings, then write one page over those that completed."""
    if len(strategies) < 2:
        raise LaunchError(f"compare: expected two strategies or more, got {' '.join(strategies) or 'none'}\n{USAGE}")
    if any(token.startswith(("strategy=", "run-dir=", "resume=")) for token in tokens):
        raise LaunchError(
            "compare: each run has a strategy and a folder of its own: leave out strategy=, run-dir=, resume="
        )
    launches = [plan([*tokens, f"strategy={name}"]) for name in strategies]  # all are checked before the first starts
    exit_codes = []
    for number, (name, launch) in enumerate(zip(strategies, launches, strict=True), start=1):
        print(f"\nrun {number} of {len(launches)}: {name}")
        exit_codes.append(run(launch, app_dir))
    completed = [launch.run_dir for launch, code in zip(launches, exit_codes, strict=True) if code == 0]
    return max(*exit_codes, _write_comparison(completed))


def close_event_log(run_dir: Path, status: str, reason: str) -> dict[str, Any]:
    """Return the closing row of a run's event log, written here where the run could not write it itself.

    Half a row at the end is cut off. Where there is no log at all none is made.
    """
    path = run_dir / EVENT_LOG
    end: dict[str, Any] = {"event": "end", "wall_s": 0.0, "status": status, "reason": reason}
    if not path.exists():
        return end
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    rows = [json.loads(line) for line in whole.splitlines()]
    if rows and rows[-1]["event"] == "end":
        return dict(rows[-1])
    end["wall_s"] = rows[-1]["wall_s"] if rows else 0.0
    end["time_s"] = max((row["time_s"] for row in rows if "time_s" in row), default=0.0)
    end["num_rounds"] = max((row["server_round"] for row in rows if row["event"] == "merge"), default=0)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(end) + "\n")
    return end


def _start_on_engine(launch: Launch, app_dir: Path) -> Outcome:
    return run_app(
        app_dir,
        launch.settings,
        num_clients=launch.num_clients,
        num_workers=launch.num_workers,
        state_dir=app_dir / ".flwr" / "runs",
        log_path=launch.run_dir / ENGINE_LOG,
        show=_show,
        is_over=lambda: has_end(launch.run_dir / EVENT_LOG),
    )


def has_end(path: Path) -> bool:
    """Whether an event log says that its run is over."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        size, reach = path.stat().st_size, 4096
        while True:
            file.seek(max(0, size - reach))
            rows = file.read().split(b"\n")[:-1]  # behind the last line break is half a row, or nothing
            if len(rows) > 1 or reach >= size:  # the last row is whole: a reason may be of any length
                return bool(rows) and rows[-1].startswith(b'{"event": "end"')
            reach *= 4


def _start_here(carry_out: Callable[[], object]) -> Outcome:
    try:
        carry_out()
    except Exception as error:  # whatever it is, it is the reason that the user gets
        return Outcome(False, str(error) or type(error).__name__)
    return Outcome(True)


def _write_comparison(run_dirs: Sequence[Path]) -> int:
    if len(run_dirs) < 2:
        print("error: compare: fewer than two runs completed, there is nothing to compare", file=sys.stderr)
        return 1
    from reporting.compare import compare as compare_runs

    name = f"{time.strftime('%Y%m%d-%H%M%S')}-compare-{secrets.token_hex(2)}"
    try:
        html_path, text = compare_runs(run_dirs, PROJECT_DIR / "results" / name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{text}\ncomparison: {html_path}")
    return 0


def _show(text: str) -> None:
    if not text.startswith("report: "):  # said once, at the very end
        print(text, flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # progress must show in a pipe too
    sys.exit(main(sys.argv[1:]))
