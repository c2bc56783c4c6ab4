"""`flower-superexec` that forks its clients from a process which has imported torch and Flower already.

A SuperNode's SuperExec starts a process for every message. Python, Flower and torch are four seconds of CPU in each:
many times what a small model takes to train, and most where the device is slow. Here they are imported once, and a
client is a copy of that process: still one of its own, for one message, with the app's code from the bundle that Flower
delivers. The price is that the modules stay in memory between messages (about 140 MiB, shared with the clients);
PRUNUS_PRELOAD=no does without. The module's own ``subprocess`` is replaced by one that forks where it would start
``flwr-clientapp``.

A SuperNode has one message at a time. While a client works on it there is nothing to ask for, and asking several times
a second is felt where the device has a fifth of a core. So the module's own ``time`` is replaced by one that rests
until the client has ended. Nothing else is touched. Needs the Flower that Prunus pins.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

CLIENT = "flwr-clientapp"
MODULES = ("numpy", "torch")
"""What every client imports beside Flower. Nothing of the app: it comes with a run."""
REST_S = 10.0
"""Not to ask for longer would be to trust too much in one message at a time."""


class Forking:
    """The module ``subprocess`` with a ``Popen`` that forks where it would start one command.

    The process must not have begun what a fork breaks: a parallel region of torch, or a thread that holds locks.

    Parameters
    ----------
    name : of the command.
    command : what it calls; it finds its arguments in ``sys.argv``.
    """

    def __init__(self, name: str, command: Callable[[], None]) -> None:
        self._name, self._command = name, command
        self._children: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, arguments: Sequence[str], **options: Any) -> object:  # noqa: N802
        """Start a process; what is returned is of use to nobody if it was forked."""
        self._reap()
        if arguments[0] != self._name or options:
            return subprocess.Popen(arguments, **options)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._live(arguments)
        self._children.add(pid)
        return pid

    @property
    def is_at_work(self) -> bool:
        """Whether a fork lives."""
        self._reap()
        return bool(self._children)

    def _reap(self) -> None:
        for pid in list(self._children):
            with suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    continue
            self._children.discard(pid)

    def _live(self, arguments: Sequence[str]) -> NoReturn:
        """What a child does: it ends here, whatever happens, and never gets into its parent's loop."""
        code = 1
        try:
            with suppress(OSError):
                Path("/proc/self/comm").write_text(self._name, encoding="ascii")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)
            sys.argv = list(arguments)
            self._command()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code & 0xFF)


class Rests:
    """The module ``time`` whose sleeps go on for as long as a client works, but not beyond ``REST_S``."""

    def __init__(self, forking: Forking) -> None:
        self._forking = forking

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep; looking after one's own child costs nothing."""
        until = time.monotonic() + REST_S
        time.sleep(seconds)
        while self._forking.is_at_work and time.monotonic() < until:
            time.sleep(seconds)


def main() -> None:
    """Run the SuperExec."""
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.exit import exit_handler
    from flwr.supercore.superexec import run_superexec as loop
    from flwr.supercore.superexec.executor import subprocess_executor
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    def client() -> None:
        exit_handler.registered_exit_handlers.clear()  # those of the SuperExec
        flwr_clientapp()

    for name in MODULES:
        importlib.import_module(name)
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    sys.dont_write_bytecode = False  # a client compiles the app's modules for the next
    forking = Forking(CLIENT, client)
    subprocess_executor.subprocess = forking  # type: ignore[assignment]
    loop.time = Rests(forking)  # type: ignore[assignment]
    flower_superexec()


if __name__ == "__main__":
    main()
