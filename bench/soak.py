"""A federation of real processes that is hurt again and again: what it loses, and whether anything leaks.

    python -m bench.soak --minutes 30 --nodes 20
    python -m bench.soak --quick                      # two nodes, a minute and a half after the first merge

Every few seconds one thing happens: a client is killed, a node is killed and started again, a node is frozen for ten
seconds, the ServerApp is killed, or the SuperLink (the run is then continued from its last checkpoint). Counted are
what was injected, the answers and rounds that were lost, and the memory, files and processes of the SuperLink and of
the nodes, with all below them.
"""

from __future__ import annotations

import math
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.common import finish, options, print_table
from bench.hosts import Federation, HostError, Process, rows_of, wait_until
from server_app.checkpoint import load_checkpoint

SETTINGS = ("strategy=fedavg", "model.name=mlp", "train.schedule=constant", "num-rounds=100000", "data.min-size=2")
LOOP = ("deployment.min-clients=1", "deployment.join-timeout-s=600", "loop.max-empty-rounds=20", "reply-timeout-s=180")
FROZEN_S = 10.0
SAMPLE_S = 10.0


class Injuries:
    """Does one kind of harm at a time, and counts."""

    def __init__(self, federation: Federation, seed: int) -> None:
        self.federation, self.random = federation, random.Random(seed)
        self.done: Counter[str] = Counter()
        self._thaw: list[tuple[float, Process]] = []

    def one(self) -> None:
        """Do one thing; nothing if there is nobody to do it to."""
        kinds: dict[str, Callable[[], bool]] = {
            "client killed": self._kill_client,
            "node killed": self._kill_node,
            "node frozen": self._freeze,
            "ServerApp killed": self._kill_server,
            "SuperLink killed": self._kill_superlink,
        }
        kind = self.random.choices(list(kinds), weights=[14, 6, 6, 1, 1])[0]
        self.done[kind] += kinds[kind]()

    def thaw(self) -> None:
        """Wake the nodes that have been frozen for long enough."""
        now = time.monotonic()
        for until, node in [item for item in self._thaw if item[0] <= now]:
            self._thaw.remove((until, node))
            if node.is_alive:
                node.signal(signal.SIGCONT)

    def _kill(self, pids: list[int]) -> bool:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def _kill_client(self) -> bool:
        names = [name for name in self.federation.nodes if self.federation.clientapps(name)]
        return bool(names) and self._kill(self.federation.clientapps(self.random.choice(names)))

    def _kill_node(self) -> bool:
        name = self.random.choice(sorted(self.federation.nodes))
        self.federation.nodes[name].kill()
        self.federation.start_node(name, int(name[1:]), is_awaited=False)
        return True

    def _freeze(self) -> bool:
        node = self.federation.nodes[self.random.choice(sorted(self.federation.nodes))]
        node.signal(signal.SIGSTOP)
        self._thaw.append((time.monotonic() + FROZEN_S, node))
        return True

    def _kill_server(self) -> bool:
        return self._kill(self.federation.serverapps())

    def _kill_superlink(self) -> bool:
        assert self.federation.superlink is not None
        self.federation.superlink.kill()
        self.federation.start_superlink()
        return True


def usage(*roots: Process) -> dict[str, float]:
    """Memory (proportional share), open files and number of the processes of families."""
    memory, files, count = 0.0, 0, 0
    for pid in [pid for root in roots for pid in root.family()]:
        with suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            memory += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024
            files += len(os.listdir(f"/proc/{pid}/fd"))
            count += 1
    return {"mib": memory, "files": files, "processes": count}


def soak(folder: Path, num_nodes: int, seconds: float, pause_s: float, seed: int) -> dict[str, Any]:
    """Run, hurt and count for ``seconds`` after the first merge."""
    samples: list[dict[str, float]] = []
    with Federation(folder / "f", num_nodes, poll_s=0.5) as federation:
        run_dir = folder / "run"
        examples = f"data.max-train={40 * num_nodes}"
        tokens = (*SETTINGS, *LOOP, f"num-clients={num_nodes}", examples, "evaluation.every=20")
        run = federation.submit(run_dir, *tokens, num_attempts=1000)
        wait_until(lambda: any(row["event"] == "merge" for row in rows_of(run_dir)), 1200, "the first merge", run)
        assert federation.superlink is not None
        injuries = Injuries(federation, seed)
        began, due, sampled = time.monotonic(), time.monotonic() + pause_s, -math.inf
        while (now := time.monotonic()) - began < seconds:
            injuries.thaw()
            if now >= due:
                injuries.one()
                due = now + injuries.random.uniform(0.5, 1.5) * pause_s
            if now - sampled >= SAMPLE_S:
                sampled = now
                own, nodes = usage(federation.superlink), usage(*federation.nodes.values())
                samples.append({"s": now - began, **own, **{f"nodes_{key}": value for key, value in nodes.items()}})
            if not run.is_alive:
                raise HostError(f"the run ended: {run.text()[-2000:]}")
            time.sleep(1.0)
    return summary(folder, samples, injuries.done, seconds)


def summary(folder: Path, samples: list[dict[str, float]], done: Counter[str], seconds: float) -> dict[str, Any]:
    """What was lost, and what grew between the second and the last quarter of the time."""
    folders = sorted((path for path in folder.glob("run*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    logs = {path: rows_of(path) for path in folders}
    newest = next(path for path in reversed(folders) if any(path.glob("checkpoints/round-*.pt")))
    progress, *_ = load_checkpoint(newest)
    last = max(logs.values(), key=len)
    arrivals = Counter(row["status"] for row in last if row["event"] == "arrival")
    quarters = {
        name: {
            key: statistics.median(row[key] for row in samples if low <= row["s"] / seconds < high)
            for key in samples[0].keys() - {"s"}
        }
        for name, (low, high) in {"early": (0.25, 0.5), "late": (0.75, 1.0)}.items()
    }
    return {
        "seconds": seconds,
        "injected": dict(done),
        "runs": len(folders),
        "rounds_merged": progress.server_round,
        "answers": dict(arrivals),
        **{f"{name}_{key}": value for name, found in quarters.items() for key, value in sorted(found.items())},
    }


def main() -> dict[str, Any]:
    """Run the benchmark."""
    parser = options("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="after the first merge (default 30)")
    parser.add_argument("--nodes", type=int, default=20, help="SuperNodes (default 20)")
    arguments = parser.parse_args()
    num_nodes, seconds, pause_s = arguments.nodes, 60 * arguments.minutes, 20.0
    if arguments.quick:
        num_nodes, seconds, pause_s = 2, 90.0, 15.0
    with tempfile.TemporaryDirectory(prefix="prunus-soak-") as folder:
        found = soak(Path(folder), num_nodes, seconds, pause_s, arguments.seed)
    print_table(
        f"{num_nodes} SuperNodes, {seconds / 60:g} minutes", [{"what": k, "value": v} for k, v in found.items()]
    )
    return finish("soak", arguments, {"nodes": num_nodes, **found})


if __name__ == "__main__":
    main()
