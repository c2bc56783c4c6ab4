"""Runs the app on a SuperLink that is up: `python -m server_app.submit CONNECTION key=value ...`.

The SuperLink is one of `flwr`'s connections (deploy/connect.sh writes one). `fleet.name` is `none` here: the clock is
the wall. A run that fails after its first merge (the SuperLink or the ServerApp died) is continued from its last
checkpoint, up to `--attempts` times, where the run folder can be read from here. Exit codes are those of `launch`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_app.bundle import copy_app
from server_app.engine import COMPLETED
from server_app.launch import PROJECT_DIR, Launch, LaunchError, close_event_log, guard, has_end, plan

USAGE = "usage: python -m server_app.submit CONNECTION [--attempts=N] [key=value ...]"
POLL_S = 10.0
"""Asking for a status starts a process of two CPU seconds; the end of a run whose folder is here is seen at once."""
LOST_S = 600.0
"""A SuperLink that has answered once and does not for so long is gone for good."""
COMMAND_S = 120.0
"""A `flwr` command that takes longer has failed."""


@dataclass(frozen=True)
class Submission:
    """One run and how often it is continued.

    Attributes
    ----------
    connection : name of the SuperLink in Flower's configuration.
    num_attempts : runs at most, the first included.
    tokens : ``key=value`` settings.
    """

    connection: str
    num_attempts: int
    tokens: tuple[str, ...]


def main(arguments: Sequence[str], app_dir: Path = PROJECT_DIR) -> int:
    """Carry out one command and return the exit code."""
    return guard(lambda: submit(read(arguments), app_dir))


def read(arguments: Sequence[str]) -> Submission:
    """Check the command line; raises ``LaunchError``."""
    options = [word for word in arguments if word.startswith("--")]
    words = [word for word in arguments if not word.startswith("--") and "=" not in word]
    tokens = [word for word in arguments if not word.startswith("--") and "=" in word]
    if len(words) != 1:
        raise LaunchError(f"expected one connection, got {' '.join(words) or 'none'}\n{USAGE}")
    num_attempts = 1
    for option in options:
        name, _, value = option.partition("=")
        if name != "--attempts" or not value.isdigit() or int(value) < 1:
            raise LaunchError(f"unknown option {option}\n{USAGE}")
        num_attempts = int(value)
    if any(token.startswith("transport=") and token != "transport=grid" for token in tokens):
        raise LaunchError("transport: a SuperLink is reached by transport=grid only")
    if any(token.startswith("fleet.name=") and token != "fleet.name=none" for token in tokens):
        raise LaunchError("fleet.name: devices are real here and the clock is the wall: leave it out")
    return Submission(words[0], num_attempts, (*tokens, "fleet.name=none"))


def submit(submission: Submission, app_dir: Path = PROJECT_DIR, show: Callable[[str], None] = print) -> int:
    """Run, and continue what was cut off; 0 if the run completed in the end, else 1."""
    launch = plan(submission.tokens, is_here=False)
    settings = [token for token in submission.tokens if not token.startswith(("run-dir=", "resume="))]
    given = next((token.removeprefix("resume=") for token in submission.tokens if token.startswith("resume=")), "")
    folder = launch.run_dir
    if given:
        show(f"going on from {given}{_after(Path(given))}")
    for attempt in range(1, submission.num_attempts + 1):
        show(f"run folder: {launch.run_dir}")
        # who restarts a SuperLink is not to lose the run that it was cut off from
        status, details = run_once(submission.connection, launch, app_dir, 0.0 if attempt == 1 else LOST_S)
        reason = details or status
        if launch.run_dir.joinpath("events.jsonl").exists():
            reason = close_event_log(launch.run_dir, "completed" if status == COMPLETED else "failed", reason)["reason"]
        if status == COMPLETED:
            show(f"report: {launch.run_dir / 'report.html'}")
            return 0
        print(f"error: the run failed: {reason}", file=sys.stderr)
        source = _last_checkpoint(folder, attempt) or (Path(given) if given else None)
        if attempt == submission.num_attempts or status == "":
            break
        resume = [f"resume={source}"] if source is not None else []
        following = folder.with_name(f"{folder.name}-{attempt + 1}")
        if source is None:
            show("nothing was merged yet: starting again")
        else:
            show(f"going on from {source}{_after(source)}")
        launch = plan([*settings, f"run-dir={following}", *resume], is_here=False)
    return 1


def _last_checkpoint(folder: Path, attempt: int) -> Path | None:
    """The latest folder of this submission, of the first ``attempt``, that holds a checkpoint."""
    names = [folder.name, *(f"{folder.name}-{number}" for number in range(2, attempt + 1))]
    found = [folder.with_name(name) for name in names if any(folder.with_name(name).glob("checkpoints/round-*.pt"))]
    return found[-1] if found else None


def _after(source: Path) -> str:
    """After which round of ``source`` a run goes on; empty where that cannot be seen from here."""
    from server_app.checkpoint import find_checkpoint  # imports torch: not for a usage error

    try:
        number = int(find_checkpoint(source).stem.removeprefix("round-"))
    except ValueError:  # none here: it may lie on the machine of the SuperLink
        return ""
    return f" after round {number}: what came later is done again"


def run_once(connection: str, launch: Launch, app_dir: Path, patience_s: float) -> tuple[str, str]:
    """Submit one run and wait for its end: (status, details) as Flower says them; status "" if it never began.

    A submission that fails is tried again for ``patience_s``.
    """
    began, is_told = time.monotonic(), False
    while "run-id" not in (answer := _begin(connection, launch, app_dir)):
        if time.monotonic() - began >= patience_s:
            return "", str(answer["error-message"])
        if not is_told:
            print(f"it cannot be submitted yet, and is tried again for {patience_s:.0f} s", flush=True)
            is_told = True
        time.sleep(POLL_S / 2)
    run_id = str(answer["run-id"])
    print(f"run {run_id} on {connection}", flush=True)
    heard = time.monotonic()
    while time.monotonic() - heard < LOST_S:
        listing, _ = flwr(["list", connection, "--run-id", run_id, "--format", "json"])
        runs = listing.get("runs") or [{}]
        status = str(runs[0].get("status", ""))
        if status:
            heard = time.monotonic()
        if status.startswith("finished"):
            return status, str(runs[0].get("status-details") or "")
        asked = time.monotonic()
        while time.monotonic() - asked < POLL_S and not has_end(launch.run_dir / "events.jsonl"):
            time.sleep(0.2)
        time.sleep(0.5)
    return "lost", f"the SuperLink did not answer for {LOST_S:.0f} s"


def _begin(connection: str, launch: Launch, app_dir: Path) -> dict[str, Any]:
    """Submit a run: what `flwr` answers, with ``run-id`` or with ``error-message``."""
    with tempfile.TemporaryDirectory(prefix="prunus-submit-") as folder:
        copy_app(app_dir, Path(folder) / "app")
        config = Path(folder) / "run-config.toml"
        config.write_text(launch.settings, encoding="utf-8")
        command = ["run", str(Path(folder) / "app"), connection, "--run-config", str(config), "--format", "json"]
        answer, text = flwr(command, folder)
    if answer.get("success", False) and "run-id" in answer:
        return answer
    return {"error-message": answer.get("error-message") or text[-500:] or "flwr run ended without a word"}


def flwr(arguments: Sequence[str], folder: str | None = None) -> tuple[dict[str, Any], str]:
    """The JSON object that a `flwr` command prints, {} if none, and all that it said."""
    program = shutil.which("flwr", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        raise LaunchError(f"the command flwr was not found beside {sys.executable}; install the dependencies")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            [program, *arguments],
            cwd=folder,
            env=os.environ | quiet,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMMAND_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {}, f"flwr {arguments[0]} did not end within {COMMAND_S:.0f} s"
    try:
        found = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        found = {}
    return (found if isinstance(found, dict) else {}), done.stdout


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # progress must show in a pipe too
    sys.exit(main(sys.argv[1:]))
