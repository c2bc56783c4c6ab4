"""Promises about child processes: every descendant is found and ended, and signals become an exit code."""

import os
import signal
import subprocess
import sys

import pytest

from server_app.processes import Interrupted, end_descendants, interruptible, list_descendants, uninterrupted

# a child that starts a grandchild in a session of its own, dies at once, and leaves an orphan that ignores SIGTERM
ORPHANING = """
import subprocess, sys
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""
# run in a process of its own: becoming the foster parent of orphans is for life
SUPERVISOR = f"""
import subprocess, sys
from server_app.processes import adopt_orphans, end_descendants
adopt_orphans()
kept = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
orphan = int(subprocess.run([sys.executable, "-c", {ORPHANING!r}], stdout=subprocess.PIPE).stdout)
left = end_descendants(keep=[kept.pid], grace_s=0.2)
print(left, kept.poll() is None, orphan)
kept.kill()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans can be adopted on Linux only")
def test_an_orphan_in_another_session_that_ignores_sigterm_is_ended_and_a_kept_child_is_not() -> None:
    result = subprocess.run([sys.executable, "-c", SUPERVISOR], capture_output=True, text=True, check=True, timeout=60)
    left, is_kept_alive, orphan = result.stdout.rsplit(maxsplit=2)
    assert (left, is_kept_alive) == ("[]", "True")
    with pytest.raises(ProcessLookupError):
        os.kill(int(orphan), 0)


def test_descendants_are_listed_parents_first() -> None:
    code = "import subprocess, sys; c = subprocess.Popen(['sleep', '60']); print(c.pid, flush=True); c.wait()"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        found = list_descendants(os.getpid())
        assert found.index(child.pid) < found.index(grandchild)
    finally:
        os.kill(grandchild, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_nothing_to_end_returns_at_once() -> None:
    assert end_descendants(keep=list_descendants(os.getpid())) == []


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_becomes_an_exit_code_and_the_earlier_handler_comes_back(
    number: signal.Signals, exit_code: int
) -> None:
    earlier = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, interruptible():
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == exit_code
    assert signal.getsignal(number) == earlier


def test_a_second_ctrl_c_does_not_disturb_the_clean_up() -> None:
    with interruptible(), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
