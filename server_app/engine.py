"""One run on Flower's simulation engine, private to its caller: own SuperLink, own port, own FLWR_HOME, own Ray.

`flwr run` alone is not enough. It exits 0 when the run failed; it leaves a SuperLink running, which the next run of any
project reuses, with that SuperLink's working directory ahead of the app on the clients' import path; and it makes a new
environment with the app's dependencies for each run. Here each run gets a SuperLink of its own, started in an empty
folder and ended with everything below it, and the outcome is what `flwr list` says.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from server_app import processes
from server_app.bundle import copy_app
from server_app.processes import adopt_orphans, die_with_parent, end_descendants, hold, list_descendants, uninterrupted
from server_app.stream import StreamFilter

CONNECTION = "prunus"  # the SuperLink's name in the private Flower configuration
COMPLETED = "finished:completed"
PENDING = ("pending", "starting")
MAX_PORT_ATTEMPTS = 5
MAX_RUN_ATTEMPTS = 2
STARTUP_LIMIT_S = 60.0


class EngineError(ValueError):
    """Flower's engine could not be started here."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `reason` is empty when it completed."""

    is_completed: bool
    reason: str = ""


def run_app(
    app_dir: Path,
    settings: str,
    *,
    num_clients: int,
    num_workers: int,
    state_dir: Path,
    log_path: Path,
    show: Callable[[str], None] = print,
    is_over: Callable[[], bool] = lambda: False,
    pending_limit_s: float = 60.0,
    closing_limit_s: float = 60.0,
) -> Outcome:
    """Run the Flower app in `app_dir` once and return how it ended; nothing started here outlives the call.

    `settings` are TOML lines that override keys of `[tool.flwr.app.config]`; `num_workers` clients train at once, one
    CPU each; `state_dir` takes a private folder for the time of the run; everything said goes to `log_path`, what a
    person wants to see to `show`. A run that stays pending for `pending_limit_s` is started once more on a new
    SuperLink. An engine that is still at work `closing_limit_s` after `is_over` said that the app has done its part is
    ended, and the run counts as completed as far as the engine is concerned.

    Raises `EngineError` where Flower is not installed or its SuperLink does not start.
    """
    with _private_folder(state_dir) as home, log_path.open("a", encoding="utf-8") as log_file:
        copy_app(app_dir, home / "app")
        (home / "cwd").mkdir()
        config_path = home / "run-config.toml"
        config_path.write_text(settings, encoding="utf-8")
        federation = f"num-supernodes={num_clients} client-resources-num-cpus=1"
        if not ray_cluster():  # a cluster has the CPUs that it has
            federation += f" init-args-num-cpus={num_workers}"
        submit = ["run", str(home / "app"), CONNECTION, "--stream", "--run-config", str(config_path)]
        submit += ["--federation-config", federation]
        for attempt in range(1, MAX_RUN_ATTEMPTS + 1):
            with _superlink(home, _Log(log_file)) as superlink:
                outcome = superlink.run(submit, show, is_over, pending_limit_s, closing_limit_s)
            if outcome is not None:
                return outcome
            if attempt < MAX_RUN_ATTEMPTS:
                show(f"the run was still pending after {pending_limit_s:.0f} s: starting it once more")
    return Outcome(False, f"the run never started: pending for {pending_limit_s:.0f} s, {MAX_RUN_ATTEMPTS} times")


def ray_cluster() -> str:
    """Address of the Ray cluster to simulate on, from PRUNUS_RAY_ADDRESS; empty for a Ray of this run's own.

    Every machine of the cluster must see this checkout, with its environment, at the same path (docs/scale.md).
    """
    return os.environ.get("PRUNUS_RAY_ADDRESS", "")


class _Log:
    """A log file that several threads write whole lines to."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.path = file.name
        self._lock = threading.Lock()

    def write(self, source: str, line: str) -> None:
        with self._lock:
            self._file.write(f"[{source}] {line.rstrip()}\n")
            self._file.flush()


class _Process:
    """A child whose lines are read by a thread into the log and a queue (None: its output has ended)."""

    def __init__(
        self, command: list[str], home: Path, log: _Log, environment: Mapping[str, str], is_kept: bool = False
    ) -> None:
        prefix: list[str] = []
        program = shutil.which(command[0], path=environment["PATH"])
        if program is None:
            raise EngineError(
                f"starting Flower's engine: the command {command[0]} was not found beside {sys.executable}; "
                "install the dependencies with ./run.sh or pip install 'flwr[simulation]>=1.41,<1.42'"
            )
        if is_kept:
            # the simulation does not notice the death of what is above it while its ServerApp works: its keeper does
            prefix = [sys.executable, "-P", processes.__file__]
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.is_followed = True  # whether someone takes the lines
        self.popen = subprocess.Popen(
            [*prefix, program, *command[1:]],
            cwd=home / "cwd",
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # the terminal's Ctrl-C reaches us alone, and we end the rest in order
            preexec_fn=die_with_parent(),
        )
        threading.Thread(target=self._read, args=(command[0], log), daemon=True).start()

    def _read(self, source: str, log: _Log) -> None:
        assert self.popen.stdout is not None
        try:
            for line in self.popen.stdout:
                log.write(source, line)
                if self.is_followed:
                    self.lines.put(line)
        except ValueError:
            pass  # the log was closed: the run is over and this process is being ended
        finally:
            self.lines.put(None)


class _SuperLink:
    """A running SuperLink and the `flwr` commands that talk to it."""

    def __init__(self, home: Path, log: _Log, environment: Mapping[str, str], process: _Process) -> None:
        self._home, self._log, self._environment, self._process = home, log, environment, process

    def run(
        self,
        submit: list[str],
        show: Callable[[str], None],
        is_over: Callable[[], bool],
        pending_limit_s: float,
        closing_limit_s: float,
    ) -> Outcome | None:
        """Submit a run and follow it to its end. None: it stayed pending."""
        stream = _Process(["flwr", *submit], self._home, self._log, self._environment)
        stream_filter, tail = StreamFilter(), [""]
        has_begun, begin_s, over_s = False, time.monotonic(), math.inf
        while True:
            try:
                line = stream.lines.get(timeout=0.5)
            except queue.Empty:
                if (code := self._process.popen.poll()) is not None:
                    return Outcome(False, f"the run's own SuperLink ended with exit code {code}")
                if not has_begun and time.monotonic() - begin_s > pending_limit_s:
                    if self._status()[0] in ("", *PENDING):
                        return None
                    has_begun = True
                if is_over():
                    over_s = min(over_s, time.monotonic())
                if time.monotonic() - over_s > closing_limit_s:
                    return Outcome(True)
                continue
            if line is None:
                break
            has_begun = has_begun or "Starting Flower Simulation" in line
            tail = [*tail, line.strip()][-20:]
            if has_begun and (text := stream_filter.keep(line)) is not None:
                show(text)
        if stream.popen.wait() != 0:
            return Outcome(False, _error_of(tail))
        return self._wait_for_end()

    def _wait_for_end(self) -> Outcome:
        # the log stream ends with the run, or when it is cut; only the status says which, and how it ended
        while True:
            status, details = self._status()
            if status.startswith("finished"):
                break
            if (code := self._process.popen.poll()) is not None:
                return Outcome(False, f"the run's own SuperLink ended with exit code {code}")
            time.sleep(0.5)
        if status == COMPLETED:
            return Outcome(True)
        return Outcome(False, details.removeprefix("Simulation failed with exception: ") or status)

    def _status(self) -> tuple[str, str]:
        """Status and details of the one run on this SuperLink; ("", "") while there is none."""
        listing = _Process(["flwr", "list", CONNECTION, "--format", "json"], self._home, self._log, self._environment)
        text = "".join(iter(listing.lines.get, None))
        listing.popen.wait()
        try:
            runs = json.loads(text[text.index("{") :]).get("runs", [])
        except ValueError:
            return "", ""
        return (runs[0]["status"], runs[0]["status-details"]) if runs else ("", "")


@contextmanager
def _superlink(home: Path, log: _Log) -> Iterator[_SuperLink]:
    """A SuperLink on a free port. At the end of the block it is gone, with Ray and everything else below it."""
    adopt_orphans()
    earlier = list_descendants(os.getpid())
    # Ray's sockets lie below its folder and a socket's path is limited to 107 bytes: a short place, not `home`
    temp_dir = tempfile.gettempdir() if len(tempfile.gettempdir()) < 32 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="prunus-", dir=temp_dir, ignore_cleanup_errors=True) as ray_dir:
        (home / "ray-dir").write_text(ray_dir, encoding="utf-8")
        try:
            yield _start_superlink(home, log, _make_environment(home, Path(ray_dir)))
        finally:
            with uninterrupted():
                left = end_descendants(keep=earlier)
            if left:
                log.write("engine", f"processes {left} could not be ended")


def _start_superlink(home: Path, log: _Log, environment: Mapping[str, str]) -> _SuperLink:
    for _ in range(MAX_PORT_ATTEMPTS):
        address = f"127.0.0.1:{_find_free_port()}"
        connection = f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "{CONNECTION}"\n\n{connection}', encoding="utf-8")
        command = ["flower-superlink", "--simulation", "--insecure", "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
        process = _Process(command, home, log, environment, is_kept=True)
        # its own word, not an answer on the port: that could come from another SuperLink which took it first
        if _wait_for_line(process, "Uvicorn running on"):
            process.is_followed = False
            return _SuperLink(home, log, environment, process)
        process.popen.terminate()
        process.popen.wait()
    raise EngineError(
        f"starting Flower's engine: its SuperLink did not start on {MAX_PORT_ATTEMPTS} ports in turn; "
        f"the log has its words: {log.path}"
    )


def _wait_for_line(process: _Process, text: str) -> bool:
    deadline_s = time.monotonic() + STARTUP_LIMIT_S
    while (remaining_s := deadline_s - time.monotonic()) > 0:
        try:
            line = process.lines.get(timeout=remaining_s)
        except queue.Empty:
            break
        if line is None:
            return False
        if text in line:
            return True
    return False


def _make_environment(home: Path, ray_dir: Path) -> dict[str, str]:
    """This process' environment with Flower and Ray kept to themselves and off the network."""
    environment = dict(os.environ)
    project_dir = Path(__file__).resolve().parents[1]
    # the app's code comes from the copy that Flower installs, never from the checkout; the caller's own entries stay
    entries = environment.pop("PYTHONPATH", "").split(os.pathsep)
    entries = [os.path.abspath(entry) for entry in entries if entry and Path(entry).resolve() != project_dir]
    if entries:
        environment["PYTHONPATH"] = os.pathsep.join(entries)
    programs = Path(sys.executable).parent
    first = [str(programs)]
    if shlex.quote(first[0]) != first[0] and programs.parent.joinpath("bin") == programs:
        first.insert(0, str(_alias_programs(programs, ray_dir)))
    environment["PATH"] = os.pathsep.join([*first, environment.get("PATH", os.defpath)])
    environment |= {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PYTHONUNBUFFERED": "1",
        "RAY_ADDRESS": ray_cluster() or "local",  # never join by chance a Ray that runs on this machine already
        "RAY_TMPDIR": str(ray_dir),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    return environment


def _alias_programs(programs: Path, ray_dir: Path) -> Path:
    """A folder with a `flwr-simulation` that runs under a path without spaces.

    Ray starts its workers with the driver's `sys.executable` in an unquoted shell command, so that a checkout in a
    folder with a space in its name would wait for workers in vain.
    """
    (ray_dir / "environment").symlink_to(programs.parent, target_is_directory=True)
    (ray_dir / "programs").mkdir()
    alias = ray_dir / "environment" / "bin"
    script = ray_dir / "programs" / "flwr-simulation"
    script.write_text(f'#!/bin/sh\nexec {alias}/{Path(sys.executable).name} {alias}/flwr-simulation "$@"\n')
    script.chmod(0o755)
    return script.parent


@contextmanager
def _private_folder(state_dir: Path) -> Iterator[Path]:
    """A new folder in `state_dir`, removed at the end; those that killed runs left behind are removed first."""
    state_dir.mkdir(parents=True, exist_ok=True)
    for folder in state_dir.iterdir():
        if not _is_in_use(folder):
            if (folder / "ray-dir").exists():
                shutil.rmtree((folder / "ray-dir").read_text(encoding="utf-8"), ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
    home = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=state_dir))
    with hold(home / "lock"):
        try:
            yield home
        finally:
            with uninterrupted():
                shutil.rmtree(home, ignore_errors=True)


def _is_in_use(folder: Path) -> bool:
    """Whether a live process holds the folder's lock, or may be about to take it."""
    try:
        if time.time() - folder.stat().st_mtime < 60.0:
            return True
        with hold(folder / "lock"):
            return False
    except OSError:
        return folder.exists()


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _error_of(tail: list[str]) -> str:
    """The error that `flwr run` printed before it gave up."""
    lines = [line.strip("│╭╰─╮╯ ") for line in tail]  # of a box drawn around it
    lines = [line for line in lines if line not in ("", "Error")]
    return " ".join(lines[-3:]) if lines else "flwr run ended without a word"
