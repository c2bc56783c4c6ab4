"""Answers of clients: checked before they touch the model, and written down as rows of the event log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pruning.compress import densify
from pruning.cost import CostModel
from pruning.groups import Layout
from pruning.merge import AggregateResult, is_finite
from pruning.spec import SubModelSpec
from pruning.tally import extremes
from strategies.exchange import Arrival
from strategies.setting import Progress
from wire.message import Report, State, payload_bytes

ADDED = (
    *("download_s", "compute_s", "upload_s", "update_time_s", "overhead_s", "download_bytes", "upload_bytes"),
    *("train_macs", "measured_compute_s", "counted_bytes", "dense_bytes"),
)
"""Fields of an arrival's row that add up over the requests of a round."""

LARGEST = ("peak_memory_bytes",)
"""Fields of which the largest of the requests counts."""


class ReportError(ValueError):
    """A report holds numbers or tensors that cannot be right."""


def check_narrowed(report: Report, spec: SubModelSpec, layout: Layout) -> SubModelSpec:
    """Return what of the model the report is about: the spec that was sent, or a part of it.

    Raises
    ------
    ReportError
        If it is not a part of what was sent.
    """
    if report.narrowed is None:
        return spec
    if not report.narrowed.is_subset_of(spec, layout):
        raise ReportError("report: its narrower spec is not part of the spec that was sent")
    return report.narrowed


def check_report(report: Report, state: State, sent: State) -> Report:
    """Return the report with dense entries: values, or steps where it ``is_delta``.

    Parameters
    ----------
    state : the global model.
    sent : the client's part of it, as it is now.

    Raises
    ------
    ReportError, CompressionError
        If a number is not finite or negative, an entry has another kind of numbers, or an update does not fit.
    """
    numbers = {
        "num-examples": report.num_examples,
        "train-macs": report.train_macs,
        "compute-s": report.compute_s,
        "busy-s": report.busy_s,
        "num-steps": report.num_steps,
        "peak-memory-bytes": report.peak_memory_bytes,
    }
    for name, number in numbers.items():
        if not (math.isfinite(number) and number >= 0):
            raise ReportError(f"report: {name}: got {number}, expected a finite number >= 0")
    for name, number in report.metrics.items():
        if not math.isfinite(number):
            raise ReportError(f"report: metric {name!r}: got {number}, expected a finite number")
    for key, tensor in report.companions.items():
        if not is_finite(tensor):
            raise ReportError(f"report: companion {key!r} holds NaN or infinity")
    for key, tensor in report.state.items():
        expected = state.get(key, tensor)
        if tensor.is_complex() or tensor.is_floating_point() != expected.is_floating_point():
            raise ReportError(f"report: entry {key!r} should be {expected.dtype}, got {tensor.dtype}")
    if not report.is_delta:
        return report
    delta = densify(report.state, sent) if report.is_sparse else report.state
    for key, tensor in delta.items():
        if key not in sent:
            raise ReportError(f"report: its update does not fit the sub-model that was sent: it has no entry {key!r}")
        if tensor.shape != sent[key].shape:
            shapes = f"should have shape {tuple(sent[key].shape)}, got {tuple(tensor.shape)}"
            raise ReportError(f"report: its update does not fit the sub-model that was sent: entry {key!r} {shapes}")
    return replace(report, state=delta, is_sparse=False)


def rebase(report: Report, now: State, scale: float = 1.0) -> Report:
    """Return a checked report as values to be merged now: ``now + scale * step``.

    A stale answer is a step from where it started; taken from here, newer weights are not replaced. Of an answer that
    holds values, ``values - now`` is the step.

    Parameters
    ----------
    now : the client's part of the global model, as it is now.
    scale : the share of the step that counts, >= 0.
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
            values[key] = before + (step if scale == 1 else scale * step)
    return replace(report, state=values, is_delta=False)


def check_tested(report: Report) -> Report:
    """Return a client's test whose figures can be averaged.

    Raises
    ------
    ReportError
        If one is missing, not finite or out of range.
    """
    figures = {name: report.metrics.get(name, math.nan) for name in ("accuracy", "loss")}
    if report.num_examples < 1 or not all(map(math.isfinite, figures.values())) or not 0 <= figures["accuracy"] <= 1:
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
        row |= {
            "upload_bytes": payload_bytes(report),
            "num_examples": report.num_examples,
            "train_macs": report.train_macs,
            "peak_memory_bytes": report.peak_memory_bytes,
            "measured_compute_s": report.compute_s,
            **{name: value for name, value in report.metrics.items() if name not in row},
        }
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
        "coverage": {key: mean / merged.num_merged for key, mean in merged.mean_holders().items()},
        "coverage_least": coverage_least,
        "coverage_most": coverage_most,
        "merge_cpu_s": cpu_s,
    }
