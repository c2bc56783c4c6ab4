"""A federation of real processes that is hurt again and again: what it loses, and whether anything leaks.

    python -m bench.soak --minutes 30 --nodes 20
    python -m bench.soak --quick                      # two nodes, a minute and a half after the first merge

Every few seconds one thing happens: a client is killed, a node is killed and started again with its key, a node is
frozen for ten seconds, the ServerApp is killed, or the SuperLink (the run is then continued from its last checkpoint).
Each kind comes once, in random order, before any comes twice. A node that ends is started again after fifteen seconds,
as by its unit: its SuperLink refuses its key while the session that was killed counts as online.

Counted are what was injected, the answers that were lost and to which kind, the rounds that were done again, and the
memory, files and processes of the SuperLink and of the nodes, with all below them. The SuperLink is killed in the first
half only: what grows is looked for between the second and the last quarter of its longest life.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import finish, options, print_table
from bench.hosts import Federation, HostError, Process, rows_of, wait_until
from server_app.checkpoint import load_checkpoint
from server_app.resume import CONFIG

SETTINGS = ("strategy=fedavg", "model.name=mlp", "train.schedule=constant", "num-rounds=100000", "data.min-size=2")
LOOP = ("deployment.min-clients=1", "deployment.join-timeout-s=600", "loop.max-empty-rounds=20", "reply-timeout-s=180")
FROZEN_S = 10.0
SAMPLE_S = 10.0
RESTART_S = 15.0
"""As in deploy/systemd/prunus-supernode@.service."""
BLAMED_S = 300.0
"""An answer that fails is laid to what was last done to its node, not longer ago than that."""
SUPERLINK = "SuperLink killed"
WEIGHTS = {"client killed": 14, "node killed": 6, "node frozen": 6, "ServerApp killed": 1, SUPERLINK: 1}


@dataclass(frozen=True)
class Injury:
    """One thing that was done.

    Attributes
    ----------
    at_s : seconds since the epoch.
    kind : of ``WEIGHTS``.
    partition_id : of the client that it was done to; -1 for the server.
    """

    at_s: float
    kind: str
    partition_id: int = -1


class Injuries:
    """Does one kind of harm at a time, and notes it."""

    def __init__(self, federation: Federation, seed: int) -> None:
        self.federation, self.random = federation, random.Random(seed)
        self.done: list[Injury] = []
        self.num_lives = 1
        """Of the SuperLink."""
        self._first = self.random.sample(sorted(WEIGHTS), len(WEIGHTS))
        self._thaw: list[tuple[float, Process]] = []
        self._started: dict[str, float] = {}

    def one(self, is_late: bool) -> None:
        """Do one thing; nothing if there is nobody to do it to, or if it is too late for it."""
        kinds: dict[str, Callable[[], str | None]] = {
            "client killed": self._kill_client,
            "node killed": self._kill_node,
            "node frozen": self._freeze,
            "ServerApp killed": self._kill_server,
            SUPERLINK: self._kill_superlink,
        }
        weights = {kind: weight for kind, weight in WEIGHTS.items() if not (is_late and kind == SUPERLINK)}
        due = [kind for kind in self._first if kind in weights]
        kind = due[0] if due else self.random.choices(list(weights), weights=list(weights.values()))[0]
        hurt = kinds[kind]()
        if hurt is None:
            return
        if kind in self._first:
            self._first.remove(kind)
        self.done.append(Injury(time.time(), kind, int(hurt[1:]) if hurt else -1))

    def look_after(self) -> None:
        """Wake the nodes that have been frozen for long enough, and start those that have ended."""
        now = time.monotonic()
        for until, node in [item for item in self._thaw if item[0] <= now]:
            self._thaw.remove((until, node))
            if node.is_alive:
                node.signal(signal.SIGCONT)
        for name, node in list(self.federation.nodes.items()):
            if not node.is_alive and now - self._started.get(name, -math.inf) >= RESTART_S:
                self._start(name)

    def _kill(self, pids: list[int]) -> bool:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def _start(self, name: str) -> None:
        self._started[name] = time.monotonic()
        self.federation.start_node(name, int(name[1:]), is_awaited=False)

    def _pick(self) -> str | None:
        alive = sorted(name for name, node in self.federation.nodes.items() if node.is_alive)
        return self.random.choice(alive) if alive else None

    # who was hurt: the name of a node, "" for the server, None for nobody

    def _kill_client(self) -> str | None:
        names = [name for name in self.federation.nodes if self.federation.clientapps(name)]
        name = self.random.choice(names) if names else None
        return name if name is not None and self._kill(self.federation.clientapps(name)) else None

    def _kill_node(self) -> str | None:
        if (name := self._pick()) is not None:
            self.federation.nodes[name].kill()
            self._start(name)
        return name

    def _freeze(self) -> str | None:
        if (name := self._pick()) is not None:
            node = self.federation.nodes[name]
            node.signal(signal.SIGSTOP)
            self._thaw.append((time.monotonic() + FROZEN_S, node))
        return name

    def _kill_server(self) -> str | None:
        return "" if self._kill(self.federation.serverapps()) else None

    def _kill_superlink(self) -> str | None:
        assert self.federation.superlink is not None
        self.federation.superlink.kill()
        self.federation.start_superlink()
        self.num_lives += 1
        return ""


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
    with Federation(folder / "f", num_nodes, is_secure=True, poll_s=0.5) as federation:
        run_dir = folder / "run"
        examples = f"data.max-train={40 * num_nodes}"
        tokens = (*SETTINGS, *LOOP, f"num-clients={num_nodes}", examples, "evaluation.every=20")
        run = federation.submit(run_dir, *tokens, num_attempts=1000)
        wait_until(lambda: any(row["event"] == "merge" for row in rows_of(run_dir)), 1200, "the first merge", run)
        assert federation.superlink is not None
        injuries = Injuries(federation, seed)
        began, due, sampled = time.monotonic(), time.monotonic() + pause_s, -math.inf
        while (now := time.monotonic()) - began < seconds:
            injuries.look_after()
            if now >= due:
                injuries.one(is_late=now - began > seconds / 2)
                due = now + injuries.random.uniform(0.5, 1.5) * pause_s
            if now - sampled >= SAMPLE_S:
                sampled = now
                own, nodes = usage(federation.superlink), usage(*federation.nodes.values())
                sample = {"s": now - began, "life": float(injuries.num_lives), **own}
                samples.append(sample | {f"nodes_{key}": value for key, value in nodes.items()})
            if not run.is_alive:
                raise HostError(f"the run ended: {run.text()[-2000:]}")
            time.sleep(1.0)
    return summary(folder, samples, injuries.done, seconds)


def summary(folder: Path, samples: list[dict[str, float]], done: Sequence[Injury], seconds: float) -> dict[str, Any]:
    """What was lost, and what grew between the second and the last quarter of the SuperLink's longest life."""
    folders = sorted((path for path in folder.glob("run*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    logs = {path: rows_of(path) for path in folders}
    newest = next(path for path in reversed(folders) if any(path.glob("checkpoints/round-*.pt")))
    progress, *_ = load_checkpoint(newest)
    last = max(logs.values(), key=len)
    arrivals = Counter(row["status"] for row in last if row["event"] == "arrival")
    again = sum(max(0, row["last_round_again"] - row["server_round"]) for row in last if row["event"] == "resume")
    begin, end, kept = longest_life(samples, seconds)
    quarters = {
        name: {
            key: statistics.median(row[key] for row in kept if low <= (row["s"] - begin) / (end - begin) < high)
            for key in samples[0].keys() - {"s", "life"}
        }
        for name, (low, high) in {"early": (0.25, 0.5), "late": (0.75, 1.0)}.items()
    }
    return {
        "seconds": seconds,
        "injected": dict(Counter(injury.kind for injury in done)),
        "runs": len(folders),
        "rounds_merged": progress.server_round,
        "rounds_done_again": again,
        "answers": dict(arrivals),
        "answers_lost_to": dict(losses(logs, done)),
        "longest_superlink_life_s": end - begin,
        **{f"{name}_{key}": value for name, found in quarters.items() for key, value in sorted(found.items())},
    }


def longest_life(samples: list[dict[str, float]], seconds: float) -> tuple[float, float, list[dict[str, float]]]:
    """(begin, end, samples) of the longest time between two kills of the SuperLink, seconds since the first merge."""
    begins: dict[float, float] = {}
    for row in samples:
        begins.setdefault(row["life"], row["s"])
    starts = [*begins.values(), seconds]
    lives = [(end - begin, begin, end, life) for life, begin, end in zip(begins, starts, starts[1:], strict=False)]
    _, begin, end, life = max(lives)
    return begin, end, [row for row in samples if row["life"] == life]


def losses(logs: Mapping[Path, list[dict[str, Any]]], done: Sequence[Injury]) -> Counter[str]:
    """Answers that failed by what was last done to their node before the round closed.

    Rows know seconds since their run's start, which is when its folder got its configuration.
    """
    found: Counter[str] = Counter()
    for folder, rows in logs.items():
        resumed = [number for number, row in enumerate(rows) if row["event"] == "resume"]
        began_s = (folder / CONFIG).stat().st_mtime if (folder / CONFIG).exists() else 0.0
        for row in rows[resumed[-1] if resumed else 0 :]:  # those before are another folder's
            if row["event"] != "arrival" or row["status"] != "failed":
                continue
            closed_s = began_s + row["wall_s"]
            to_it = [item for item in done if item.partition_id == row["partition_id"] and item.at_s <= closed_s]
            recent = [item.kind for item in to_it if closed_s - item.at_s <= BLAMED_S]
            found[recent[-1] if recent else "nothing done to its node"] += 1
    return found


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
