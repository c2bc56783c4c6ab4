"""The event log, read back as typed rows.

One JSON object per line. A run that was killed may leave half a line at the end; that line is dropped and reported in
``RunLog.problems``, never an error. A run that was resumed has a second ``run`` row: what the first attempt did in
rounds that the second did again is dropped, because the second attempt's model never saw it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

EVENTS_FILE = "events.jsonl"


class LogError(ValueError):
    """The event log is absent, damaged before its last line, or has a field of the wrong type."""


@dataclass(frozen=True)
class RunInfo:
    """The ``run`` row: what was asked for, resolved."""

    strategy: str
    model: str = "?"
    data: str = "?"
    num_clients: int = 0
    num_parameters: int = 0
    seed: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0


@dataclass(frozen=True)
class ClientInfo:
    """One client of the ``clients`` row: its device and its data share."""

    partition_id: int
    device: str = "?"
    train_flops: float | None = None
    uplink_bytes_per_s: float | None = None
    downlink_bytes_per_s: float | None = None
    memory_bytes: float | None = None
    num_examples: int = 0
    label_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Arrival:
    """One reply, or the absence of one. Times lie on the clock of the run; costs are 0 where the log has none."""

    server_round: int
    partition_id: int
    status: str
    reason: str = ""
    global_version_sent: int | None = None
    staleness: int | None = None
    start_s: float | None = None
    finish_s: float | None = None
    download_s: float = 0.0
    compute_s: float = 0.0
    upload_s: float = 0.0
    update_time_s: float = 0.0
    num_examples: int = 0
    loss: float | None = None
    accuracy: float | None = None
    train_macs: float = 0.0
    download_bytes: float = 0.0
    upload_bytes: float = 0.0
    peak_memory_bytes: float | None = None
    retention_ratio: float | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    depth: int | None = None
    measured_compute_s: float | None = None
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class Merge:
    """One change of the global model. ``coverage``: group or key -> mean share of the merged clients that hold it."""

    server_round: int
    time_s: float
    global_version: int = 0
    num_merged: int = 0
    n_star: float | None = None
    uncovered_ratio: float | None = None
    coverage: Mapping[str, float] = field(default_factory=dict)
    merge_cpu_s: float = 0.0
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class Decision:
    """New retention ratios. ``reference``: partition whose update time (``reference_s``) the others are brought to."""

    server_round: int
    reference: int | None = None
    reference_s: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    update_times_s: Mapping[str, float] = field(default_factory=dict)
    floors: tuple[int, ...] = ()
    order_hash: str = ""
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class FamilyMember:
    """One sub-model of the family, evaluated: as it is and with its normalisation statistics re-estimated."""

    retention_ratio: float
    accuracy: float | None = None
    accuracy_reestimated: float | None = None

    @property
    def best_accuracy(self) -> float | None:
        """The better of the two accuracies; None when neither was measured."""
        known = [a for a in (self.accuracy, self.accuracy_reestimated) if a is not None and math.isfinite(a)]
        return max(known) if known else None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the global model; ``where`` is central or federated."""

    server_round: int
    time_s: float
    where: str = "central"
    global_version: int = 0
    accuracy: float | None = None
    loss: float | None = None
    num_examples: int = 0
    clients: Mapping[str, float] = field(default_factory=dict)
    family: tuple[FamilyMember, ...] = ()
    best: str = ""
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class Notice:
    """A ``warning`` row."""

    message: str
    server_round: int | None = None
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class End:
    """The ``end`` row. A log without one belongs to a run that goes on or was killed."""

    status: str
    reason: str = ""
    time_s: float | None = None
    num_rounds: int | None = None
    wall_s: float = 0.0


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
    warnings: tuple[Notice, ...] = ()
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
    found: dict[str, list[Any]] = {event: [] for event in _CLASSES}
    clients: dict[int, ClientInfo] = {}
    unknown: dict[str, int] = {}
    walls = [float(row["wall_s"]) for _, row in rows if _is_number(row.get("wall_s"))]
    # every process counts from zero: a clock that falls back is a resumed run, with or without a second run row
    ends = [before for before, after in pairwise(walls) if after < before] + walls[-1:]
    for number, row in rows:
        event, where = str(row.get("event")), f"{path} line {number}"
        if event == "clients":
            for item in _list(row, "clients", where):
                client = _build(ClientInfo, item, f"{where} (clients)")
                clients[client.partition_id] = client
        elif event in _CLASSES:
            found[event].append(_build(_CLASSES[event], {**row, "line": number}, f"{where} ({event})"))
        else:
            unknown[event] = unknown.get(event, 0) + 1
    for event, count in unknown.items():
        near = difflib.get_close_matches(event, [*_CLASSES, "clients"], 1)
        hint = f"; nearest known event: {near[0]!r}" if near else ""
        problems.append(f"{count} row(s) of unknown event {event!r} were left out{hint}.")
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
        warnings=tuple(found["warning"]),
        end=found["end"][-1] if found["end"] else None,
        problems=tuple(problems),
        num_resumes=max(num_resumes, len(ends) - 1),
        wall_s=sum(ends),
    )


_CLASSES: dict[str, type[Any]] = {
    "run": RunInfo,
    "arrival": Arrival,
    "merge": Merge,
    "decision": Decision,
    "evaluation": Evaluation,
    "warning": Notice,
    "end": End,
}
Row = dict[str, Any]
T = TypeVar("T")


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
            if r.get("event") in ("arrival", "merge") and _is_number(r.get("server_round"))
        ]
        first = min(played, default=math.inf)
        again = {_evaluation_key(r) for _, r in segment if r.get("event") == "evaluation"}
        kept = [
            (number, row)
            for number, row in kept
            if row.get("event") != "end"
            and not (_is_number(row.get("server_round")) and row["server_round"] >= first)
            and not (row.get("event") == "evaluation" and _evaluation_key(row) in again)
        ]
        kept += segment
    return kept, len(segments) - 1


def _evaluation_key(row: Row) -> tuple[str, str]:
    return repr(row.get("server_round")), repr(row.get("where"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(value: Any) -> float:
    if not _is_number(value):
        raise TypeError("a number")
    return float(value)


def _int(value: Any) -> int:
    if not _is_number(value) or int(value) != value:
        raise TypeError("a whole number")
    return int(value)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a string")
    return value


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an object")
    return value


def _family(value: Any) -> tuple[FamilyMember, ...]:
    if not isinstance(value, list):
        raise TypeError("a list of objects")
    return tuple(_build(FamilyMember, item, "family member") for item in value)


# the annotations of the row classes above, as text, are the schema
_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "float": _float,
    "str": _str,
    "Mapping[str, Any]": _dict,
    "Mapping[str, int]": lambda value: {key: _int(item) for key, item in _dict(value).items()},
    "Mapping[str, float]": lambda value: {key: _float(item) for key, item in _dict(value).items() if item is not None},
    "tuple[int, ...]": lambda value: tuple(_int(item) for item in value),
    "tuple[FamilyMember, ...]": _family,
}


def _build(cls: type[T], row: Any, where: str) -> T:
    """Build one row class; null counts as absent, fields it does not know are ignored."""
    if not isinstance(row, dict):
        raise LogError(f"event log: {where}: expected an object, got {row!r}")
    values: Row = {}
    for item in fields(cls):  # type: ignore[arg-type]
        value = row.get(item.name)
        if value is None:
            if item.default is MISSING and item.default_factory is MISSING:
                raise LogError(f"event log: {where}: field {item.name!r} is missing; it has {', '.join(row)}")
            continue
        try:
            values[item.name] = _READERS[str(item.type).removesuffix(" | None")](value)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, LogError):
                raise LogError(f"event log: {where}: field {item.name!r}: {error}") from error
            raise LogError(f"event log: {where}: field {item.name!r} must be {error}, got {value!r:.80}") from error
    return cls(**values)


def _list(row: Row, name: str, where: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise LogError(f"event log: {where}: field {name!r} must be a list, got {value!r:.80}")
    return value
