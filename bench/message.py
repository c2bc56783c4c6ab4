"""What a message costs a device besides training, and what a device that only asks for work costs the SuperLink.

    python -m bench.message
    python -m bench.message --quick

One SuperNode on loopback trains next to nothing. Of every message it is measured how long it took beyond training
(``overhead_s`` of the event log: looking for work, starting the client, fetching and sending), what CPU the node's
SuperExec and its clients used, and what the node keeps in memory when it has nothing to do; with torch kept in memory,
and with a process that imports it. Then some SuperNodes do nothing but ask for work every half second, as by default.

What a client imports up to the end of its first message is listed as well (``python -X importtime``), by top-level
package: the dozen that take longest where it imports everything itself, and what of that is left for a fork.
"""

from __future__ import annotations

import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.common import finish, options, print_table
from bench.hosts import ROOT, Federation, Process, rows_of, wait_until
from bench.soak import usage
from client_app.handler import handle
from server_app.config import parse, parse_overrides
from server_app.run import run as run_here
from wire.local import LocalTransport
from wire.message import Instruction, Report

SETTINGS = (
    "strategy=fedavg",
    "num-clients=1",
    "model.name=mlp",
    "data.max-train=300",
    "deployment.num-probes=0",
    "evaluation.every=1000",
)
LIMIT_S = 1200.0
POLL_S = 0.5


def superexec_of(node: Process) -> int:
    """Process id of what starts a node's clients."""
    for pid in node.family():
        with suppress(OSError):
            if "superexec" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace"):
                return pid
    raise LookupError(f"no SuperExec below process {node.popen.pid}")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended and were noticed."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, preload: str, num_rounds: int) -> dict[str, Any]:
    """One run; the first message, which finds nothing compiled, is left out."""
    with Federation(folder / "f", 0) as federation:
        node = federation.start_node("n0", 0, PRUNUS_PRELOAD=preload)
        run = federation.submit(folder / "run", *SETTINGS, f"num-rounds={num_rounds}")

        def num_merged() -> int:
            return sum(row["event"] == "merge" for row in rows_of(folder / "run"))

        wait_until(lambda: num_merged() >= 2, LIMIT_S, "the second merge", run)
        superexec = superexec_of(node)
        before_s, first = cpu_s(superexec), num_merged()
        if run.popen.wait(LIMIT_S):
            raise RuntimeError(f"the run failed: {run.text()[-2000:]}")
        spent_s, idle = cpu_s(superexec) - before_s, usage(node)
    arrivals = [row for row in rows_of(folder / "run") if row["event"] == "arrival"]
    return {
        "preload": preload,
        "messages": len(arrivals),
        "overhead_s": statistics.median(row["overhead_s"] for row in arrivals[1:]),
        "cpu_s": spent_s / (len(arrivals) - first),
        "idle_mib": idle["mib"],
    }


def ask(folder: Path, num_nodes: int, seconds: float) -> dict[str, Any]:
    """CPU of a SuperLink, with its database in a file, whose nodes only ask for work."""
    with Federation(folder, num_nodes, poll_s=POLL_S) as federation:
        assert federation.superlink is not None
        pids = federation.superlink.family()
        time.sleep(seconds / 2)  # what the start has left to do
        before_s, began = sum(map(cpu_s, pids)), time.monotonic()
        time.sleep(seconds)
        ratio = (sum(map(cpu_s, pids)) - before_s) / (time.monotonic() - began)
    return {"nodes": num_nodes, "poll_s": POLL_S, "superlink_cpu_ratio": ratio}


FORK = "--- here it would be forked"
FIRST_MESSAGE = f"""
import importlib, pickle, sys
import flwr.supercore.cli.flower_superexec, flwr.supercore.superexec.run_superexec, flwr.supernode.cli.flwr_clientapp
from deploy.superexec import MODULES
for name in MODULES:
    importlib.import_module(name)
print({FORK!r}, file=sys.stderr, flush=True)
import flwr.supernode.runtime.run_clientapp
import client_app.app
client_app.app.handle(pickle.load(open(sys.argv[1], "rb")))
"""
"""What deploy/superexec.py imports before it forks, and what a client does then."""
IMPORT = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \| +(\S+)$", re.MULTILINE)
NUM_LISTED = 12


def imports(folder: Path) -> list[dict[str, Any]]:
    """Packages that a device's first message imports by the seconds that their own modules take, longest first."""
    asked: list[Instruction] = []

    def work(instruction: Instruction) -> Report:
        asked.append(instruction)
        return handle(instruction)

    config = parse(parse_overrides([*SETTINGS, "num-rounds=1", f"run-dir={folder / 'run'}"]))
    run_here(config, LocalTransport(work, 1), show=None)
    message = folder / "message.pickle"
    message.write_bytes(pickle.dumps(asked[0]))
    command = [sys.executable, "-X", "importtime", "-c", FIRST_MESSAGE, str(message)]
    for _ in range(2):  # the first time finds nothing compiled and nothing in the page cache
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return listed(done.stderr)


def listed(text: str) -> list[dict[str, Any]]:
    """Rows of what ``-X importtime`` printed: the packages that take longest, all others together, and the sum.

    ``s`` : seconds of a process that imports everything; ``s_of_a_fork`` : of them, those after the fork.
    """
    before, _, after = text.partition(FORK)
    in_all, in_fork, modules = Counter[str](), Counter[str](), Counter[str]()
    for part, is_fork in ((before, False), (after, True)):
        for microseconds, name in IMPORT.findall(part):
            package = name.partition(".")[0]
            package = "standard library" if package in sys.stdlib_module_names else package
            in_all[package] += int(microseconds)
            in_fork[package] += int(microseconds) * is_fork
            modules[package] += 1
    named = [package for package, _ in in_all.most_common(NUM_LISTED)]
    groups = {name: [name] for name in named}
    groups |= {"others": [name for name in in_all if name not in named], "all": list(in_all)}
    return [
        {
            "package": what,
            "modules": sum(modules[name] for name in names),
            "s": sum(in_all[name] for name in names) / 1e6,
            "s_of_a_fork": sum(in_fork[name] for name in names) / 1e6,
        }
        for what, names in groups.items()
    ]


def main() -> dict[str, Any]:
    """Run the benchmark."""
    chosen = options("message", __doc__).parse_args()
    num_rounds, seconds, num_nodes = (4, 5.0, 2) if chosen.quick else (12, 30.0, 6)
    with tempfile.TemporaryDirectory(prefix="prunus-message-") as folder:
        rows = [measure(Path(folder) / preload, preload, num_rounds) for preload in ("no", "yes")]
        imported = imports(Path(folder) / "imports")
        asking = [ask(Path(folder) / f"idle-{number}", number, seconds) for number in (1, num_nodes)]
    few, many = asking
    node_ratio = (many["superlink_cpu_ratio"] - few["superlink_cpu_ratio"]) / (many["nodes"] - few["nodes"])
    print_table("a message's cost besides training, and what an idle node keeps in memory", rows)
    print_table("what a client imports by itself up to the end of its first message", imported)
    print_table("the SuperLink's share of a core while its nodes only ask", asking)
    costs = {"cpu_ratio": rows[1]["cpu_s"] / rows[0]["cpu_s"], "idle_node_cpu_ratio": node_ratio}
    return finish("message", chosen, {"rows": rows, "asking": asking, "imports": imported, **costs})


if __name__ == "__main__":
    main()
