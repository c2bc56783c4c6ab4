"""The rows of the event log as types; the annotations are the schema they are read by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

Row = dict[str, Any]
T = TypeVar("T")


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
    """One reply, or the absence of one. Times lie on the clock of the run; costs are 0 where the log has none.

    ``overhead_s``: what the engine took beside the update time, 0 in simulation. ``merge_weight``: what it counted in
    the merge of its round, in the method's own unit.
    """

    server_round: int
    partition_id: int
    status: str
    reason: str = ""
    staleness: int | None = None
    start_s: float | None = None
    finish_s: float | None = None
    download_s: float = 0.0
    compute_s: float = 0.0
    upload_s: float = 0.0
    update_time_s: float = 0.0
    overhead_s: float = 0.0
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
    counted_bytes: float | None = None
    merge_weight: float | None = None
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class Merge:
    """One change of the global model.

    ``coverage``: group or key -> mean share of the merged clients that hold it. ``coverage_least``, ``coverage_most``:
    key -> share of all answers merged so far that held its least and its most covered entry.
    """

    server_round: int
    time_s: float
    global_version: int = 0
    num_merged: int = 0
    n_star: float | None = None
    uncovered_ratio: float | None = None
    coverage: Mapping[str, float] = field(default_factory=dict)
    coverage_least: Mapping[str, float] = field(default_factory=dict)
    coverage_most: Mapping[str, float] = field(default_factory=dict)
    merge_cpu_s: float = 0.0
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class Decision:
    """New retention ratios.

    ``reference``: partition whose update time (``reference_s``) the others are brought to. ``floors``: partitions that
    may get no smaller sub-model.
    """

    server_round: int
    reference: int | None = None
    reference_s: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    update_times_s: Mapping[str, float] = field(default_factory=dict)
    floors: tuple[int, ...] = ()
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class FamilyMember:
    """One sub-model of the family, evaluated: as it is and with its normalisation statistics re-estimated."""

    retention_ratio: float
    name: str = ""
    accuracy: float | None = None
    accuracy_reestimated: float | None = None

    @property
    def best_accuracy(self) -> float | None:
        """The better of the two accuracies; None when neither was measured."""
        known = [a for a in (self.accuracy, self.accuracy_reestimated) if a is not None and math.isfinite(a)]
        return max(known) if known else None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the global model; ``where`` is central or federated.

    ``depth``: blocks of the part that stands for the model, None for all. ``exits``: accuracy of every exit of that
    part, shallowest first. ``best``: name of the best member of the family.
    """

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
    depth: int | None = None
    exits: tuple[float, ...] = ()
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class Gates:
    """What the gates of dynamic pruning did in one round, the mean over clients.

    ``layers``: layer -> statistic -> value in [0, 1], of the layers in which units lost. ``overlaps``: of the winners
    of any two classes, one row per class; negative where no client has both, 0 in logs from before the two were told
    apart. ``dense``: the layers that the plan left ungated; None in logs from before it was written.
    """

    server_round: int
    density: float = 1.0
    dense: tuple[str, ...] | None = None
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    overlaps: tuple[tuple[float, ...], ...] = ()
    wall_s: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class Plan:
    """What one client measured of every gated layer: ``dense_s`` and ``gated_s`` of one training pass."""

    partition_id: int
    server_round: int | None = None
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
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
class Resume:
    """A ``resume`` row: the run goes on here after ``server_round``, and ``message`` says what was lost."""

    message: str
    server_round: int | None = None
    wall_s: float = 0.0


@dataclass(frozen=True)
class End:
    """The ``end`` row. A log without one belongs to a run that goes on or was killed."""

    status: str
    reason: str = ""
    time_s: float | None = None
    num_rounds: int | None = None
    wall_s: float = 0.0


ROW_CLASSES: dict[str, type[Any]] = {
    "run": RunInfo,
    "arrival": Arrival,
    "merge": Merge,
    "decision": Decision,
    "evaluation": Evaluation,
    "gates": Gates,
    "plan": Plan,
    "warning": Notice,
    "resume": Resume,
    "end": End,
}
"""Row class of every event that has one row per line."""


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(value: Any) -> float:
    if not is_number(value):
        raise TypeError("a number")
    return float(value)


def _int(value: Any) -> int:
    if not is_number(value) or int(value) != value:
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


def _floats(value: Any) -> dict[str, float]:
    return {key: _float(item) for key, item in _dict(value).items() if item is not None}


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("a list of strings")
    return tuple(_str(item) for item in value)


def _family(value: Any) -> tuple[FamilyMember, ...]:
    if not isinstance(value, list):
        raise TypeError("a list of objects")
    return tuple(build_row(FamilyMember, item, "family member") for item in value)


# the annotations of the row classes above, as text, are the schema
_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "float": _float,
    "str": _str,
    "Mapping[str, Any]": _dict,
    "Mapping[str, int]": lambda value: {key: _int(item) for key, item in _dict(value).items()},
    "Mapping[str, float]": lambda value: _floats(value),
    "Mapping[str, Mapping[str, float]]": lambda value: {key: _floats(item) for key, item in _dict(value).items()},
    "tuple[tuple[float, ...], ...]": lambda value: tuple(tuple(_float(item) for item in row) for row in value),
    "tuple[float, ...]": lambda value: tuple(_float(item) for item in value),
    "tuple[int, ...]": lambda value: tuple(_int(item) for item in value),
    "tuple[str, ...]": _strings,
    "tuple[FamilyMember, ...]": _family,
}


def build_row(cls: type[T], row: Any, where: str) -> T:
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


def list_of(row: Row, name: str, where: str) -> list[Any]:
    """Return a field that must be a list."""
    value = row.get(name)
    if not isinstance(value, list):
        raise LogError(f"event log: {where}: field {name!r} must be a list, got {value!r:.80}")
    return value
