"""What a message costs a device besides training: with torch kept in memory, and with a process that imports it.

    python -m bench.message
    python -m bench.message --quick

One SuperNode on loopback trains next to nothing. Of every message it is measured how long it took beyond training
(``overhead_s`` of the event log: looking for work, starting the client, fetching and sending), what CPU the node's
SuperExec and its clients used, and what the node keeps in memory when it has nothing to do.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.common import finish, options, print_table
from bench.hosts import Federation, Process, rows_of, wait_until
from bench.soak import usage

SETTINGS = (
    "strategy=fedavg",
    "num-clients=1",
    "model.name=mlp",
    "data.max-train=300",
    "deployment.num-probes=0",
    "evaluation.every=1000",
)
LIMIT_S = 1200.0


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


def main() -> dict[str, Any]:
    """Run the benchmark."""
    chosen = options("message", __doc__).parse_args()
    num_rounds = 4 if chosen.quick else 12
    with tempfile.TemporaryDirectory(prefix="prunus-message-") as folder:
        rows = [measure(Path(folder) / preload, preload, num_rounds) for preload in ("no", "yes")]
    print_table("a message's cost besides training, and what an idle node keeps in memory", rows)
    return finish("message", chosen, {"rows": rows, "cpu_ratio": rows[1]["cpu_s"] / rows[0]["cpu_s"]})


if __name__ == "__main__":
    main()
