"""Answers of clients: checked before they touch the model, and written down as rows of the event log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pruning.compress import INDEX, densify
from pruning.cost import CostModel
from pruning.extract import is_variance
from pruning.groups import Layout
from pruning.merge import AggregateResult
from pruning.spec import SubModelSpec
from pruning.tally import extremes
from strategies.exchange import Arrival
from strategies.setting import Progress
from wire.check import MAX_MACS
from wire.message import Report, State, payload_bytes

ADDED = (
    *("download_s", "compute_s", "upload_s", "update_time_s", "overhead_s", "download_bytes", "upload_bytes"),
    *("train_macs", "measured_compute_s", "counted_bytes", "dense_bytes", "merge_weight"),
)
"""Fields of an arrival's row that add up over the requests of a round."""

LARGEST = ("peak_memory_bytes",)
"""Fields of which the largest of the requests counts."""

OF_THE_SERVER = (
    *("event", "wall_s", "line", "server_round", "partition_id", "status", "reason", "num_requests"),
    *("global_version_sent", "staleness", "start_s", "finish_s", "work_ratio", "retention_ratio", "widths", "depth"),
)
RESERVED = frozenset((*OF_THE_SERVER, "num_examples", *ADDED, *LARGEST)) - {"counted_bytes", "dense_bytes"}
"""Fields of an arrival's row that are the server's to fill in; the names of all others are free for metrics."""

SAID = {
    "num_examples": "num_examples",
    "train_macs": "train_macs",
    "peak_memory_bytes": "peak_memory_bytes",
    "compute_s": "measured_compute_s",  # the row's compute_s is of the run's clock
}
"""Number of a report -> its field in an arrival's row."""

MAX_ENTRY = 1e12
"""Largest magnitude of an entry of a tensor. Times ``MAX_EXAMPLES`` and a million clients it stays within float32, and
so does its square where steps are compensated: one client cannot make everybody's merge overflow."""

MAX_EXAMPLES = 2**31
MAX_STEPS = 10**6
MAX_SECONDS = 1e9
MAX_METRIC = 1e30
"""No measurement is larger; sums and means over clients stay numbers."""

BOUNDS: dict[str, tuple[float, float]] = {
    "num_examples": (1, MAX_EXAMPLES),
    "train_macs": (0, MAX_MACS),
    "compute_s": (0, MAX_SECONDS),
    "busy_s": (0, MAX_SECONDS),
    "num_steps": (0, MAX_STEPS),
    "peak_memory_bytes": (0, 2**63),
}
"""Field of a report -> the least and the largest that is believed."""

FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)
"""What an answer of the wrong kind makes checks, methods and torch raise; a full disk is not the client's fault."""


class ReportError(ValueError):
    """A report holds numbers or tensors that cannot be right."""


def describe(error: Exception) -> str:
    """Why an answer was turned away; what no check foresaw says what it is."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def is_believable(name: str, number: float) -> bool:
    """Whether a field of a report, or a metric, has a finite value in its range."""
    low, high = BOUNDS.get(name, (-MAX_METRIC, MAX_METRIC))
    try:
        return bool(low <= number <= high)
    except TypeError:
        return False


def check_narrowed(report: Report, spec: SubModelSpec, layout: Layout) -> SubModelSpec:
    """Return what of the model the report is about: the spec that was sent, or a part of it.

    Raises
    ------
    ReportError, SpecError
        If it is not a part of what was sent.
    """
    if report.narrowed is None:
        return spec
    report.narrowed.check(layout)
    if not report.narrowed.is_subset_of(spec, layout):
        raise ReportError("report: its narrower spec is not part of the spec that was sent")
    return report.narrowed


def check_report(
    report: Report, state: State, sent: State, wants_delta: bool = False, wants_sparse: bool = False
) -> Report:
    """Return the report with dense entries: values, or steps where it ``is_delta``.

    Parameters
    ----------
    state : the global model.
    sent : the client's part of it, as it is now.
    wants_delta, wants_sparse : whether it was asked for steps instead of values, and for the largest entries only.

    Raises
    ------
    ReportError, CompressionError
        If a number is out of range, a metric has the name of a field of the event log, the answer is of another kind
        than was asked for, an entry has another type than was sent or is too large, or an update does not fit.
    """
    _check_numbers(report)
    for key, tensor in report.companions.items():
        _check_entries(f"companion {key!r}", tensor)
    for key, tensor in report.state.items():
        expected = state.get(key, tensor).dtype
        if tensor.dtype != expected:
            raise ReportError(f"report: entry {key!r} should be {expected}, got {tensor.dtype}")
        _check_entries(f"entry {key!r}", tensor)
        if is_variance(key) and not report.is_delta and bool((tensor < 0).any()):
            raise ReportError(
                f"report: entry {key!r} holds a variance of {float(tensor.min()):g}, expected none below 0"
            )
    if report.state and (report.is_delta, report.is_sparse) != (wants_delta, wants_sparse):
        asked, got = _kind(wants_delta, wants_sparse), _kind(report.is_delta, report.is_sparse)
        raise ReportError(f"report: should hold {asked}, as it was asked for, got {got}")
    if not report.is_delta:
        return report
    delta = densify(report.state, _travelling(report.state, sent)) if report.is_sparse else report.state
    for key, tensor in delta.items():
        if key not in sent:
            raise ReportError(f"report: its update does not fit the sub-model that was sent: it has no entry {key!r}")
        if tensor.shape != sent[key].shape:
            shapes = f"should have shape {tuple(sent[key].shape)}, got {tuple(tensor.shape)}"
            raise ReportError(f"report: its update does not fit the sub-model that was sent: entry {key!r} {shapes}")
    return replace(report, state=delta, is_sparse=False)


def _travelling(sparse: State, sent: State) -> State:
    """The entries of ``sent`` that an update has; some methods keep others on the client, and the merge misses none."""
    return {key: tensor for key, tensor in sent.items() if key in sparse or key + INDEX in sparse}


def _check_numbers(report: Report) -> None:
    for name, (low, high) in BOUNDS.items():
        if not is_believable(name, getattr(report, name)):
            got = f"got {getattr(report, name)}, expected a finite number >= {low} and at most {high:g}"
            raise ReportError(f"report: {name.replace('_', '-')}: {got}")
    for name, number in report.metrics.items():
        if name in RESERVED:
            raise ReportError(f"report: metric {name!r} has the name of a field of the event log; rename it")
        if not is_believable("", number):
            raise ReportError(
                f"report: metric {name!r}: got {number}, expected a finite number of at most {MAX_METRIC:g}"
            )


def _check_entries(what: str, tensor: Tensor) -> None:
    """One pass over the entries and no copy of them."""
    if tensor.is_complex():
        raise ReportError(f"report: {what} holds complex numbers ({tensor.dtype})")
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = map(float, torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ReportError(f"report: {what} holds NaN or infinity")
    if max(-low, high) > MAX_ENTRY:
        raise ReportError(f"report: {what} holds numbers up to {max(-low, high):g}, at most {MAX_ENTRY:g} is accepted")


def _kind(is_delta: bool, is_sparse: bool) -> str:
    return ("the largest entries of " if is_sparse else "") + ("steps" if is_delta else "values")


def rebase(report: Report, now: State, scale: float = 1.0, staleness: int = 0) -> Report:
    """Return a checked report as values to be merged now: ``now + scale * step``.

    A stale answer is a step from where it started; taken from here, newer weights are not replaced. Of an answer that
    holds values, ``values - now`` is the step. A stale step at most halves a variance: several clients that have all
    found it fallen would take it below zero.

    Parameters
    ----------
    now : the client's part of the global model, as it is now.
    scale : the share of the step that counts, in [0, 1].
    staleness : how many versions ago the answer started.
    """
    if not report.is_delta and scale == 1:
        return report
    values = {}
    for key, tensor in report.state.items():
        before = now.get(key, tensor)
        if not tensor.is_floating_point() or before.shape != tensor.shape:
            values[key] = tensor  # what does not fit is turned away by the merge
        else:
            step = tensor if report.is_delta else tensor - before
            step = step if scale == 1 else scale * step
            values[key] = before + step
            if is_variance(key):
                values[key] = torch.maximum(values[key], before / 2 if staleness else torch.zeros_like(before))
    return replace(report, state=values, is_delta=False)


def check_tested(report: Report) -> Report:
    """Return a client's test whose figures can be averaged.

    Raises
    ------
    ReportError
        If one is missing, not finite or out of range.
    """
    figures = {name: report.metrics.get(name, math.nan) for name in ("accuracy", "loss")}
    is_sound = is_believable("num_examples", report.num_examples) and is_believable("loss", figures["loss"])
    if not is_sound or not 0 <= figures["accuracy"] <= 1:
        raise ReportError(f"report: a test on {report.num_examples} examples found {figures}, expected finite figures")
    return report


def arrival_row(arrival: Arrival, cost: CostModel, staleness: int, status: str, reason: str) -> dict[str, Any]:
    """What the event log keeps of one answer."""
    entry, duration = arrival.entry, arrival.duration
    row: dict[str, Any] = {
        "partition_id": entry.partition_id,
        "status": status,
        "reason": reason,
        "global_version_sent": entry.global_version,
        "staleness": staleness,
        "start_s": entry.start_s,
        "finish_s": arrival.finish_s,
        "download_s": duration.download_s,
        "compute_s": duration.compute_s,
        "upload_s": duration.upload_s,
        "update_time_s": duration.update_time_s,
        "download_bytes": entry.download_bytes,
        "upload_bytes": 0,
        "work_ratio": entry.work_ratio,
        "retention_ratio": cost.retention_ratio(entry.spec),
        "widths": entry.spec.held_widths(cost.layout),
        "depth": entry.spec.depth,
    }
    if arrival.overhead_s:
        row["overhead_s"] = arrival.overhead_s
    if isinstance(arrival.answer, Report):
        report = arrival.answer
        row["upload_bytes"] = payload_bytes(report)
        numbers = ((name, getattr(report, name)) for name in SAID)
        row |= {SAID[name]: value for name, value in numbers if is_believable(name, value)}
        metrics = report.metrics.items()
        row |= {name: value for name, value in metrics if name not in RESERVED and is_believable("", value)}
    return row


def combined_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for all requests that one client was sent in a round: costs added, peaks kept, the first fault named."""
    first = rows[0]
    if len(rows) == 1:
        return first
    bad = next((row for row in rows if row["status"] != "merged"), None)
    total = {key: sum(row.get(key, 0) for row in rows) for key in ADDED if any(key in row for row in rows)}
    peaks = {key: max(row.get(key, 0) for row in rows) for key in LARGEST if any(key in row for row in rows)}
    what = {key: bad[key] for key in ("status", "reason")} if bad else {}
    latest = {key: value for row in rows for key, value in row.items()}
    return {**latest, **what, **total, **peaks, "start_s": first["start_s"], "num_requests": len(rows)}


def merge_row(
    merged: AggregateResult, progress: Progress, server_round: int, time_s: float, cpu_s: float
) -> dict[str, Any]:
    """What the event log keeps of one merge, and of the coverage of all merges so far, of which it is the last."""
    coverage_least, coverage_most = extremes(progress.holders, progress.num_merged)
    return {
        "event": "merge",
        "server_round": server_round,
        "global_version": progress.global_version,
        "time_s": time_s,
        "num_merged": merged.num_merged,
        "n_star": merged.n_star,
        "uncovered_ratio": merged.uncovered_ratio,
        "coverage": {key: mean / max(1, merged.num_merged) for key, mean in merged.mean_holders().items()},
        "coverage_least": coverage_least,
        "coverage_most": coverage_most,
        "merge_cpu_s": cpu_s,
    }
