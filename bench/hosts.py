"""A federation of real processes on this machine, brought up with the scripts of deploy/: for tests and benchmarks."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from server_app.processes import die_with_parent, list_descendants

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
CONNECTION = "hosts"
MAX_PORT_ATTEMPTS = 5


class HostError(RuntimeError):
    """A process of the federation did not come up."""


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A child in a session of its own whose output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                command, cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )  # fmt: skip

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def family(self) -> list[int]:
        """Process ids of it and everything below it."""
        return [self.popen.pid, *list_descendants(self.popen.pid)]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of its family."""
        for pid in self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """kill -9 of all of it; returns when it is gone."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)  # who was orphaned stays in the session's group
        self.popen.wait(timeout=30)

    def text(self) -> str:
        """All it has said."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern: str, timeout_s: float) -> bool:
        """Whether a line that matches came before the time was over or the process ended."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.text())) and time.monotonic() < deadline and self.is_alive:
            time.sleep(0.1)
        return bool(found or re.search(pattern, self.text()))


class Federation:
    """A SuperLink and SuperNodes of this machine.

    Parameters
    ----------
    folder : everything lies below it.
    num_nodes : SuperNodes that ``start`` brings up, with partition ids from 0.
    is_secure : TLS and SuperNode authentication; else ``--insecure-loopback``.
    poll_s : how often nodes look for work.
    names : further addresses by which nodes reach the SuperLink, which then listens on all of its namespace's.

    ``prefix`` : words before each command of the SuperLink and its operator (``nsenter ...``).
    """

    def __init__(
        self,
        folder: Path,
        num_nodes: int,
        is_secure: bool = False,
        poll_s: float = 0.25,
        names: Sequence[str] = (),
    ) -> None:
        self.names, self.prefix = list(names), list[str]()
        self.folder, self.num_nodes, self.is_secure = folder, num_nodes, is_secure
        self.host, self.port = "127.0.0.1", 0
        self.superlink: Process | None = None
        self.nodes: dict[str, Process] = {}
        self.runs: list[Process] = []
        programs = Path(sys.executable).parent
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PRUNUS_DATA")},
            "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)]),
            "PRUNUS_POLL_S": str(poll_s),
            "PRUNUS_CONNECTION": CONNECTION,
            "FLWR_HOME": str(folder / "operator"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Federation:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Bring everything up."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_secure:
            self.script("certificates.sh", str(self.folder / "certificates"), "localhost", self.host, *self.names)
        self.start_superlink()
        for number in range(self.num_nodes):
            self.start_node(f"n{number}", number)

    def script(self, name: str, *arguments: str, is_checked: bool = True) -> str:
        """Run a script of deploy/ to its end and return what it said."""
        done = subprocess.run(
            [*self.prefix, str(DEPLOY / name), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        if is_checked and done.returncode:
            raise HostError(f"{name} {shlex.join(arguments)}: exit code {done.returncode}: {done.stdout[-2000:]}")
        return done.stdout

    def start_superlink(self) -> None:
        """Start, or start again with the same database and port, the SuperLink."""
        settings = {"PRUNUS_STATE": str(self.folder / "superlink")}
        settings["PRUNUS_HOST"] = "0.0.0.0" if self.names else self.host
        settings["PRUNUS_CERTIFICATES"] = str(self.folder / "certificates")
        for _ in range(MAX_PORT_ATTEMPTS):
            port = self.port or free_port()
            self.superlink = Process(
                [*self.prefix, str(DEPLOY / "superlink.sh"), *self._flag()],
                self.folder / "superlink.log",
                self.environment | settings | {"PRUNUS_PORT": str(port)},
                self.folder,
            )
            if self.superlink.wait_for(rf"(?s)Uvicorn running on https?://\S*:{port}\b", 60) and self._answers(port):
                self.port = port
                trust = "--insecure-loopback" if not self.is_secure else str(self.folder / "certificates" / "ca.crt")
                self.script("connect.sh", f"{self.host}:{port}", trust)
                return
            self.superlink.kill()
        raise HostError(f"the SuperLink did not start: {self.superlink.text()[-2000:] if self.superlink else ''}")

    def _answers(self, port: int) -> bool:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.superlink is not None and self.superlink.is_alive:
            if self.prefix:
                return True  # its port is another namespace's: its own word has to do
            with suppress(OSError), socket.create_connection((self.host, port), timeout=1):
                return True
            time.sleep(0.1)
        return False

    def start_node(
        self,
        name: str,
        partition_id: int,
        is_registered: bool = True,
        prefix: Sequence[str] = (),
        is_awaited: bool = True,
        address: str = "",
        **settings: str,
    ) -> Process:
        """Start a SuperNode; one of the same name comes back with the same identity where there are keys.

        Parameters
        ----------
        prefix : words before the command (``nsenter ...``).
        address : of the SuperLink as this node sees it.
        settings : more of its environment, such as ``PRUNUS_DATA``.
        """
        own = {"PRUNUS_SUPERLINK": f"{address or self.host}:{self.port}", "PRUNUS_PARTITION": str(partition_id)}
        own |= {"PRUNUS_STATE": str(self.folder / name), "PRUNUS_NODE_PORT": str(free_port())}
        if self.is_secure:
            key = self.folder / name / "key"
            if not key.exists():
                self.script("node-key.sh", "make", str(key))
                if is_registered:
                    self.script("node-key.sh", "register", f"{key}.pub")
            own |= {"PRUNUS_CA": str(self.folder / "certificates" / "ca.crt"), "PRUNUS_KEY": str(key)}
        command = [*prefix, str(DEPLOY / "supernode.sh"), *self._flag()]
        log = self.folder / f"{name}.log"
        log.write_bytes(b"")
        node = Process(command, log, self.environment | own | settings, self.folder)
        self.nodes[name] = node
        if is_awaited and not node.wait_for(r"SuperNode ID: \d+", 60):
            raise HostError(f"SuperNode {name} did not start: {node.text()[-2000:]}")
        return node

    def node_id(self, name: str) -> int:
        """The node id that the SuperLink gave a node."""
        found = re.findall(r"SuperNode ID: (\d+)", self.nodes[name].text())
        if not found:
            raise HostError(f"SuperNode {name} has no id: {self.nodes[name].text()[-2000:]}")
        return int(found[-1])

    def submit(self, run_dir: Path, *tokens: str, num_attempts: int = 1, app_dir: Path = ROOT) -> Process:
        """Start a run of the app in ``app_dir``; its own words go to ``RUN_DIR.log``."""
        start = "import sys, pathlib; from server_app.submit import main; "
        start += "sys.exit(main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
        command = [
            *self.prefix,
            sys.executable,
            "-u",
            "-c",
            start,
            str(app_dir),
            CONNECTION,
            f"--attempts={num_attempts}",
        ]
        log = run_dir.with_name(run_dir.name + ".log")
        run = Process([*command, f"run-dir={run_dir}", *tokens], log, self.environment, ROOT)
        self.runs.append(run)
        return run

    def clientapps(self, name: str) -> list[int]:
        """Process ids of a node's running ClientApp, if a message is being worked on."""
        return [pid for pid in self.nodes[name].family() if name_of(pid) == "flwr-clientapp"]

    def serverapps(self) -> list[int]:
        """Process ids of the running ServerApp."""
        assert self.superlink is not None
        return [pid for pid in self.superlink.family() if name_of(pid) == "flwr-serverapp"]

    def close(self) -> None:
        """End everything that was started here."""
        for process in (*self.runs, *self.nodes.values(), *([self.superlink] if self.superlink else [])):
            with suppress(subprocess.TimeoutExpired):
                process.kill()
        self.nodes, self.runs, self.superlink = {}, [], None

    def _flag(self) -> list[str]:
        return [] if self.is_secure else ["--insecure-loopback"]


def name_of(pid: int) -> str:
    """The name of a process, at most 15 characters; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The whole rows of an event log; none if there is no log yet."""
    path = run_dir / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def wait_until(condition: Callable[[], object], timeout_s: float, what: str, process: Process | None = None) -> None:
    """Wait for ``condition``; ``HostError`` when the time is over, or when ``process`` has ended before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process is not None and not process.is_alive and not condition():
            raise HostError(f"waiting for {what}: the process ended: {process.text()[-3000:]}")
        if time.monotonic() > deadline:
            raise HostError(
                f"waiting for {what}: not within {timeout_s:g} s: {process.text()[-3000:] if process else ''}"
            )
        time.sleep(0.1)
