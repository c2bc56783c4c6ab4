"""What keeps one run of Flower's engine to itself: a folder, an environment, a free port."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server_app.processes import uninterrupted


def make_environment(home: Path, ray_dir: Path) -> dict[str, str]:
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
        "RAY_ADDRESS": "local",  # never join a Ray that runs on this machine already
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
def private_folder(state_dir: Path) -> Iterator[Path]:
    """A new folder in `state_dir`, removed at the end; those that killed runs left behind are removed first."""
    state_dir.mkdir(parents=True, exist_ok=True)
    for folder in state_dir.iterdir():
        if not _is_in_use(folder):
            if (folder / "ray-dir").exists():
                shutil.rmtree((folder / "ray-dir").read_text(encoding="utf-8"), ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
    home = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=state_dir))
    with _hold(home / "lock"):
        try:
            yield home
        finally:
            with uninterrupted():
                shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _hold(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _is_in_use(folder: Path) -> bool:
    """Whether a live process holds the folder's lock, or may be about to take it."""
    try:
        if time.time() - folder.stat().st_mtime < 60.0:
            return True
        with _hold(folder / "lock"):
            return False
    except OSError:
        return folder.exists()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
