"""The event log, read back as typed rows.

One JSON object per line. A run that was killed may leave half a line at the end; that line is dropped and reported in
``RunLog.problems``, never an error. A run that was resumed has a second ``run`` row: what the first attempt did in
rounds that the second did again is dropped, because the second attempt's model never saw it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from reporting.rows import (
    ROW_CLASSES,
    Arrival,
    ClientInfo,
    Decision,
    End,
    Evaluation,
    Gates,
    LogError,
    Merge,
    Notice,
    Plan,
    Resume,
    Row,
    RunInfo,
    build_row,
    is_number,
    list_of,
)

EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True)
class RunLog:
    """All rows of one log by kind, each kind in the order of the file.

    Attributes
    ----------
    path : the file that was read.
    problems : what is wrong with the file itself, one sentence each (truncated last line, unknown events).
    num_resumes : how many times the run was continued.
    wall_s : real time of all processes together, seconds.
    """

    path: Path
    run: RunInfo
    clients: tuple[ClientInfo, ...] = ()
    arrivals: tuple[Arrival, ...] = ()
    merges: tuple[Merge, ...] = ()
    decisions: tuple[Decision, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    gates: tuple[Gates, ...] = ()
    plans: tuple[Plan, ...] = ()
    warnings: tuple[Notice, ...] = ()
    resumes: tuple[Resume, ...] = ()
    end: End | None = None
    problems: tuple[str, ...] = ()
    num_resumes: int = 0
    wall_s: float = 0.0

    @property
    def status(self) -> str:
        """completed, failed, interrupted, or unfinished when the log has no ``end`` row."""
        return self.end.status if self.end else "unfinished"

    @property
    def total_time_s(self) -> float:
        """Time on the clock of the run at its end, seconds."""
        times = [row.time_s for row in self.merges] + [row.time_s for row in self.evaluations]
        times += [row.finish_s for row in self.arrivals if row.finish_s is not None and row.status == "merged"]
        # a killed run has no end row, and a run that failed early may not know its time
        if self.end and self.end.time_s is not None:
            times.append(self.end.time_s)
        return max(times, default=0.0)

    @property
    def num_rounds(self) -> int:
        """Rounds that were played."""
        if self.end and self.end.num_rounds is not None:
            return self.end.num_rounds
        rounds = [row.server_round for row in self.merges] + [row.server_round for row in self.arrivals]
        return max(rounds, default=0)


def read_events(path: str | Path) -> RunLog:
    """Read an event log.

    Parameters
    ----------
    path : the log, or the run folder that holds it as ``events.jsonl``.

    Raises
    ------
    LogError : no such file, no ``run`` row, a line before the last that is no JSON object (unless a resumed run follows
        it), or a field that is missing or of the wrong type. The message names file, line and field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / EVENTS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LogError(
            f"event log: cannot read {path} ({error.strerror}); "
            f"give a run folder that holds {EVENTS_FILE}, or the log itself"
        ) from error
    rows, problems = _parse(path, lines)
    rows, num_resumes = _drop_superseded(rows)
    walls = [float(row["wall_s"]) for _, row in rows if is_number(row.get("wall_s"))]
    # every process counts from zero: a clock that falls back is a resumed run, with or without a second run row
    ends = [before for before, after in pairwise(walls) if after < before] + walls[-1:]
    found, clients, strange = _sort(path, rows)
    problems += strange
    if not found["run"]:
        raise LogError(
            f"event log: {path} has no 'run' row, so nothing says what was run; is it a log of this project?"
        )
    for arrival in found["arrival"]:
        clients.setdefault(arrival.partition_id, ClientInfo(arrival.partition_id))
    return RunLog(
        path=path,
        run=found["run"][-1],
        clients=tuple(clients[key] for key in sorted(clients)),
        arrivals=tuple(found["arrival"]),
        merges=tuple(found["merge"]),
        decisions=tuple(found["decision"]),
        evaluations=tuple(found["evaluation"]),
        gates=tuple(found["gates"]),
        plans=tuple(found["plan"]),
        warnings=tuple(found["warning"]),
        resumes=tuple(found["resume"]),
        end=found["end"][-1] if found["end"] else None,
        problems=tuple(problems),
        num_resumes=max(num_resumes, len(ends) - 1, len(found["resume"])),
        wall_s=sum(ends),
    )


def _sort(path: Path, rows: list[tuple[int, Row]]) -> tuple[dict[str, list[Any]], dict[int, ClientInfo], list[str]]:
    """Return typed rows by event, clients by partition id, and a sentence for every event that is not known."""
    found: dict[str, list[Any]] = {event: [] for event in ROW_CLASSES}
    clients: dict[int, ClientInfo] = {}
    unknown: Counter[str] = Counter()
    for number, row in rows:
        event, where = str(row.get("event")), f"{path} line {number}"
        if event == "clients":
            for item in list_of(row, "clients", where):
                client = build_row(ClientInfo, item, f"{where} (clients)")
                clients[client.partition_id] = client
        elif event in ROW_CLASSES:
            found[event].append(build_row(ROW_CLASSES[event], {**row, "line": number}, f"{where} ({event})"))
        else:
            unknown[event] += 1
    strange = []
    for event, count in unknown.items():
        near = difflib.get_close_matches(event, [*ROW_CLASSES, "clients"], 1)
        hint = f"; nearest known event: {near[0]!r}" if near else ""
        strange.append(f"{count} row(s) of unknown event {event!r} were left out{hint}.")
    return found, clients, strange


def _parse(path: Path, lines: list[bytes]) -> tuple[list[tuple[int, Row]], list[str]]:
    """Return (line number, row) pairs and the problems found; see ``read_events`` for what is an error."""
    rows: list[tuple[int, Row]] = []
    problems: list[str] = []
    bad: int | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
            row = None
        if bad is not None:
            if not (isinstance(row, dict) and row.get("event") == "run"):
                raise LogError(
                    f"event log: {path} line {bad} is not a JSON object and more rows follow it, "
                    f"got {lines[bad - 1][:80]!r}; only the last line may be cut short"
                )
            problems.append(f"Line {bad} was cut short before the run was resumed and is left out.")
            bad = None
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            bad = number
    if bad is not None:
        problems.append(f"The last line of the log (line {bad}) is cut short and is left out: was the run killed?")
    return rows, problems


def _drop_superseded(rows: list[tuple[int, Row]]) -> tuple[list[tuple[int, Row]], int]:
    """Drop rows of rounds that a later ``run`` segment played again, and ``end`` rows before it."""
    segments: list[list[tuple[int, Row]]] = [[]]
    for number, row in rows:
        if row.get("event") == "run" and any(r.get("event") == "run" for _, r in segments[-1]):
            segments.append([])
        segments[-1].append((number, row))
    kept: list[tuple[int, Row]] = []
    for segment in segments:
        played = [
            r["server_round"]
            for _, r in segment
            if r.get("event") in ("arrival", "merge") and is_number(r.get("server_round"))
        ]
        first = min(played, default=math.inf)
        again = {_evaluation_key(r) for _, r in segment if r.get("event") == "evaluation"}
        kept = [
            (number, row)
            for number, row in kept
            if row.get("event") != "end"
            and not (is_number(row.get("server_round")) and row["server_round"] >= first)
            and not (row.get("event") == "evaluation" and _evaluation_key(row) in again)
        ]
        kept += segment
    return kept, len(segments) - 1


def _evaluation_key(row: Row) -> tuple[str, str]:
    return repr(row.get("server_round")), repr(row.get("where"))
