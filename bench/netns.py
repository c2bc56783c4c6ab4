"""Unequal hosts on one machine: a network namespace, a shaped link and a CPU quota for each (Linux, root).

Namespaces are anonymous: each is held by a sleeping process and gone with it, so nothing is left behind, whatever
happens. Bandwidth is shaped by a token bucket (``tbf``) at both ends of a veth pair. A link with delay or loss is a
process that carries its packets (``bench.link``): not every kernel has ``netem``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CGROUP_V1 = Path("/sys/fs/cgroup/cpu")
CGROUP_V2 = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
BUCKET = ["burst", "32kb", "latency", "400ms"]
HUB = "10.213"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Host:
    """What one host can do.

    Attributes
    ----------
    cores : share of a core, > 0.
    bytes_per_s : of its link, each way.
    delay_s, loss_ratio : of its link, each way.
    """

    cores: float
    bytes_per_s: float
    delay_s: float = 0.0
    loss_ratio: float = 0.0


def run(*command: object) -> None:
    """Carry out a command; ``OSError`` with what it said if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()}")


def why_not(delay_s: float = 0.0, loss_ratio: float = 0.0) -> str:
    """Why no hosts with such links can be made here; empty if they can."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces and CPU quotas need root"
    missing = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    try:
        with hosts([Host(0.5, 1e6, delay_s, loss_ratio)], "why-not"):
            return ""
    except OSError as error:
        return str(error)


@contextmanager
def hosts(wanted: Sequence[Host], name: str) -> Iterator[list[list[str]]]:
    """Make hosts on a hub and yield, for the hub and then for each host, the words that put a command onto it.

    The hub has address 10.213.I.1 on the link of host I, which is 10.213.I.2.
    """
    with ExitStack() as stack:
        hub = stack.enter_context(_namespace())
        prefixes = [_enter(hub)]
        run(*_enter(hub), "ip", "link", "set", "lo", "up")
        for index, host in enumerate(wanted):
            node = stack.enter_context(_namespace())
            stack.enter_context(_link(hub, node, index, host))
            quota = stack.enter_context(_quota(f"{name}-{os.getpid()}-{index}", host.cores))
            prefixes.append(["sh", "-c", f'echo $$ > {quota} && exec "$@"', "sh", *_enter(node)])
        yield prefixes


def _enter(pid: int) -> list[str]:
    return ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]


@contextmanager
def _namespace() -> Iterator[int]:
    """Process id of a sleeper that holds a network namespace of its own."""
    with _ready(["unshare", "-n", "sh", "-c", "echo ready; exec sleep infinity"]) as pid:
        yield pid


@contextmanager
def _ready(command: list[str]) -> Iterator[int]:
    """Process id of a command that has said ``ready``; it is killed at the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            if process.stdout.readline().strip() != "ready":
                raise OSError(f"{' '.join(command)}: {process.stderr.read().strip()}")
            yield process.pid
        finally:
            process.kill()


@contextmanager
def _link(hub: int, node: int, index: int, host: Host) -> Iterator[None]:
    near, far = f"pr{index}", "pr"
    with ExitStack() as carrier:
        if host.delay_s or host.loss_ratio:
            shape = {
                "bytes-per-s": host.bytes_per_s,
                "delay-s": host.delay_s,
                "loss-ratio": host.loss_ratio,
                "seed": index,
            }
            words = [near, str(node), far, *(f"--{name}={value}" for name, value in shape.items())]
            carrier.enter_context(_ready([*_enter(hub), sys.executable, "-m", "bench.link", *words]))
        else:
            bits = f"{max(1, int(host.bytes_per_s * 8))}bit"
            run(*_enter(hub), "ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", node)
            for pid, device in ((hub, near), (node, far)):
                run(*_enter(pid), "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", bits, *BUCKET)
        for pid, device, last in ((hub, near, 1), (node, far, 2)):
            run(*_enter(pid), "ip", "address", "add", f"{HUB}.{index}.{last}/24", "dev", device)
            run(*_enter(pid), "ip", "link", "set", device, "up")
        run(*_enter(node), "ip", "link", "set", "lo", "up")
        yield


@contextmanager
def _quota(name: str, cores: float) -> Iterator[Path]:
    """File of a control group with a CPU quota; a process joins by writing its id into it."""
    if (CGROUP_V1 / "cpu.cfs_quota_us").exists():
        group, join, limit, text = CGROUP_V1 / name, "tasks", "cpu.cfs_quota_us", str(int(cores * PERIOD_US))
    else:
        group, join, limit = CGROUP_V2 / name, "cgroup.procs", "cpu.max"
        text = f"{int(cores * PERIOD_US)} {PERIOD_US}"
    group.mkdir()
    try:
        (group / limit).write_text(text)
        yield group / join
    finally:
        for _ in range(50):
            with suppress(OSError):
                group.rmdir()
                break
            with suppress(OSError):
                subprocess.run(["sleep", "0.1"], check=False)  # its last processes are still ending
