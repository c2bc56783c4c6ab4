"""Many runs for one table: a process each, kept one by one, continued where a benchmark was stopped."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import RESULTS
from server_app.processes import count_cores, die_with_parent, hold
from wire.flat import Scalar

Keys = dict[str, Scalar]
Measure = Callable[[Path], dict[str, Any]]
ROOT = RESULTS.parents[1]
STORES = ROOT / "results" / "bench"
NUM_POINTS = 16
"""Evaluations of a curve."""
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
"""Where torchvision keeps a data set."""


@dataclass(frozen=True)
class Task:
    """A learning problem with its budget.

    Attributes
    ----------
    name : begins the names of the files that keep its outcomes.
    keys : of the run config.
    num_rounds : of the base algorithm.
    num_images : training images of all clients together; 0 for all there are.
    """

    name: str
    keys: Keys
    num_rounds: int
    num_images: int


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes
    ----------
    name : of the file that keeps its outcome.
    keys : of the run config.
    store : folder of the outcomes, and of the runs.
    measure : event log -> what the tables need of it, JSON values.
    until_s : go on beyond ``num-rounds`` until the virtual clock has passed it, with as many evaluations again. Needs
        a constant learning rate.
    """

    name: str
    keys: Keys
    store: Path
    measure: Measure
    until_s: float = 0.0

    @property
    def path(self) -> Path:
        """Where the outcome is kept."""
        return self.store / f"{self.name}.json"


def has_cifar(data_dir: str, name: str = "cifar10") -> bool:
    """Whether CIFAR lies in ``data_dir``."""
    return any((Path(data_dir) / file).exists() for file in (f"{name}.npz", FOLDERS[name]))


def add_store(parser: argparse.ArgumentParser, name: str) -> None:
    """How many runs at once, where their outcomes are kept (None: ``store_of`` knows), and whether any are made."""
    parser.add_argument("--workers", type=int, default=count_cores(), help="runs at once")
    parser.add_argument("--store", type=Path, help=f"where runs are kept (default {STORES.relative_to(ROOT)}/{name})")
    parser.add_argument("--kept", action="store_true", help="run nothing: the tables of what the store has")


def store_of(options: argparse.Namespace, name: str) -> Path:
    """``--store``, or a benchmark's own; ``--quick`` has one for itself, its runs are others under the same names."""
    return options.store or STORES / (f"{name}-quick" if options.quick else name)


def complete(jobs: Iterable[Job], options: argparse.Namespace, deadline: float = math.inf) -> dict[str, str]:
    """Run what the store lacks, unless ``--kept``; say what was left out, and return it with the reason."""
    failed = {} if options.kept else carry_out(jobs, options.workers, deadline)
    for name, reason in failed.items():
        print(f"left out: {name}: {reason}")
    return failed


def carry_out(jobs: Iterable[Job], workers: int, deadline: float = math.inf) -> dict[str, str]:
    """Run what is not kept yet, ``workers`` at once, and say how far it is; start none after ``deadline``.

    Returns
    -------
    dict
        Name of each run that failed -> the reason; the others are kept, and it is tried again next time.
    """
    waiting = [job for job in jobs if not job.path.exists()]
    failed: dict[str, str] = {}
    began, done, num_jobs = time.monotonic(), 0, len(waiting)

    def note(name: str, reason: str) -> None:
        nonlocal done
        done += 1
        failed.update({name: reason} if reason else {})
        left_s = (time.monotonic() - began) / done * (num_jobs - done)
        said = f" FAILED: {reason}" if reason else ""
        print(f"[{done}/{num_jobs}] {name}; about {left_s / 60:.0f} min left{said}", flush=True)

    while waiting:
        waiting = _until_one_dies(waiting, min(workers, len(waiting)), deadline, note)
    return failed


def _until_one_dies(jobs: list[Job], workers: int, deadline: float, note: Callable[[str, str], None]) -> list[Job]:
    """Run jobs in processes of which none comes back when one has died; returns those that had not begun by then."""
    # not multiprocessing.Pool: that one waits for ever for a worker that was killed
    context = multiprocessing.get_context("spawn")
    finished = set[str]()
    with ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
        running = [pool.submit(run_job, job, deadline) for job in jobs]
        for future in as_completed(running):
            with suppress(BrokenProcessPool):
                name, reason = future.result()
                finished.add(name)
                note(name, reason)
    lost = [job for job in jobs if job.name not in finished]
    for job in lost[:workers]:  # they are begun in this order
        note(job.name, "its process died, or another's at the same time; run this again")
    return lost[workers:]


def end_with_parent(parent_pid: int) -> None:
    """Let this process end with the one that started it: a benchmark that is killed must not work on unseen."""
    die_with_parent()()
    if os.getppid() != parent_pid:  # it had ended before
        raise SystemExit(1)


def run_job(job: Job, deadline: float = math.inf) -> tuple[str, str]:
    """Carry out one run in this process and keep its outcome, whole or not at all; returns (name, reason it failed)."""
    if time.monotonic() > deadline:
        return job.name, "the time for all runs is over"
    home = job.store / "runs" / job.name
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hold(home.with_name(f"{job.name}.lock")), silence():
            keep(job.path, _outcome(job, home))
    except BlockingIOError:
        return job.name, "another process is at it"
    except Exception as error:  # one run that fails must not cost the others
        return job.name, f"{type(error).__name__}: {error}"
    return job.name, ""


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _outcome(job: Job, home: Path) -> dict[str, Any]:
    """Carry out a run in a new folder and measure it."""
    from server_app.config import parse
    from server_app.local import run_local

    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    folder, keys = home / "0", {**job.keys, "keep-checkpoints": 1, "num-workers": 1}
    run_local(parse({**keys, "run-dir": str(folder)}), show=None)
    while (more := rounds_until(folder / "events.jsonl", job.until_s)) > 0:
        before, folder = folder, home / str(int(folder.name) + 1)
        every = max(1, (more - int(keys["num-rounds"])) // NUM_POINTS)
        keys |= {"num-rounds": more, "evaluation.every": every, "evaluation.family-every": every}
        run_local(parse({**keys, "run-dir": str(folder), "resume": str(before)}), show=None)
        shutil.rmtree(before)
    outcome = job.measure(folder / "events.jsonl")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "clients", ignore_errors=True)
    return outcome


def rounds_until(log: Path, until_s: float) -> int:
    """Rounds that a run needs in all to pass ``until_s``, at the pace of its last third; 0 if it has."""
    times = [(0, 0.0)] + [(row["server_round"], row["time_s"]) for row in read(log) if row["event"] == "merge"]
    last_round, last_s = times[-1]
    if last_s >= until_s or len(times) < 2:
        return 0
    first_round, first_s = times[len(times) * 2 // 3 - 1 if len(times) > 3 else 0]
    pace_s = (last_s - first_s) / (last_round - first_round) or last_s / last_round
    return last_round + max(1, round((until_s - last_s) / pace_s + 0.5))


def read(log: Path) -> list[dict[str, Any]]:
    """Rows of an event log."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def keep(path: Path, outcome: Mapping[str, Any]) -> None:
    """Write an outcome, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(outcome), encoding="utf-8")
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """A kept outcome."""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept


def best_of(members: Iterable[Mapping[str, float]]) -> float:
    """Accuracy of the best of some evaluated models, statistics as merged or re-estimated, whichever is better."""
    return max(max(member["accuracy"], member["accuracy_reestimated"]) for member in members)


def last_within(curve: Sequence[Mapping[str, Any]], axis: str, limit: float, slack: float = 1e-9) -> Mapping[str, Any]:
    """The last point of a curve whose ``axis`` is at most ``limit``.

    Parameters
    ----------
    curve : evaluations, oldest first.
    axis : name of what is spent: rounds, virtual seconds or bytes.
    limit : of ``axis``.
    slack : how far above the limit, relatively, still counts: by default what sums of floats differ by. Runs that were
        only planned to end at the limit, by an estimate of how long their rounds take, need more.

    Raises
    ------
    ValueError
        If every point lies beyond: what came later must not be shown as what was there.
    """
    points = [point for point in curve if point[axis] <= limit * (1 + slack)]
    if not points:
        raise ValueError(f"{axis}: the first evaluation is at {curve[0][axis]:g}, beyond {limit:g}; evaluate earlier")
    return points[-1]


def first_reaching(curve: Sequence[Mapping[str, Any]], target: float, name: str = "best") -> float:
    """Virtual time of the first point of a curve whose ``name`` is at least ``target``; infinite if there is none."""
    return next((float(point["time_s"]) for point in curve if point[name] >= target), math.inf)


def merges_a_round(keys: Mapping[str, Any]) -> int:
    """Merges that take as many answers as there are clients, which is a synchronous round."""
    from server_app.config import parse

    run = parse(keys).run
    return math.ceil(run.num_clients / run.loop.quorum) if run.loop.quorum else 1


def over_seeds(rows: Iterable[Mapping[str, float | None]]) -> dict[str, str]:
    """Column -> its mean and spread over rows, one for each seed; {} where there is no row."""
    columns: dict[str, list[float | None]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: mean_and_spread(values) for name, values in columns.items()}


def mean_and_spread(values: Sequence[float | None], digits: int = 3) -> str:
    """``0.631 ± 0.012`` over seeds; who did not get there is None or infinite, and counted; NaN: no such figure."""
    values = [value for value in values if value is None or not math.isnan(value)]
    if not values:
        return ""
    reached = [value for value in values if value is not None and value != float("inf")]
    if len(reached) < len(values):
        return f"not reached ({len(values) - len(reached)} of {len(values)})"
    spread = f" ± {statistics.stdev(reached):.{digits}f}" if len(reached) > 1 else ""
    return f"{statistics.fmean(reached):.{digits}f}{spread}"
