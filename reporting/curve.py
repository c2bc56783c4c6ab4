"""Accuracy as a function of rounds, time and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reporting.log import RunLog


@dataclass(frozen=True)
class Point:
    """The global model at one evaluation, and what had been spent by then."""

    server_round: int
    time_s: float
    total_bytes: float
    train_macs: float
    accuracy: float
    loss: float | None


def primary_where(log: RunLog) -> str:
    """Return which evaluation the headline figures speak of: central where there is one, else federated."""
    return "central" if any(row.where == "central" for row in log.evaluations) else "federated"


def accuracy_curve(log: RunLog, where: str | None = None) -> tuple[Point, ...]:
    """Return one point per evaluation at ``where`` (default: ``primary_where``), in the order of the log.

    Bytes and MACs count every arrival written before the evaluation, whatever became of it: a rejected or late reply
    has cost its client as much as a merged one.
    """
    where = where or primary_where(log)
    points = []
    arrivals = sorted(log.arrivals, key=lambda row: row.line)
    index, total_bytes, train_macs = 0, 0.0, 0.0
    for row in sorted(log.evaluations, key=lambda row: row.line):
        while index < len(arrivals) and arrivals[index].line < row.line:
            total_bytes += arrivals[index].download_bytes + arrivals[index].upload_bytes
            train_macs += arrivals[index].train_macs
            index += 1
        if row.where == where and row.accuracy is not None and math.isfinite(row.accuracy):
            points.append(Point(row.server_round, row.time_s, total_bytes, train_macs, row.accuracy, row.loss))
    return tuple(points)


def first_reaching(curve: Sequence[Point], target: float) -> Point | None:
    """Return the first point whose accuracy is at least ``target``; None when none is. Nothing is interpolated."""
    return next((point for point in curve if point.accuracy >= target), None)


def last_within(curve: Sequence[Point], axis: str, limit: float) -> Point | None:
    """Return the last point whose ``axis`` (a field of ``Point``) is at most ``limit``; None when none is."""
    # sums of the same bytes in another order differ in the last digits
    within = [point for point in curve if getattr(point, axis) <= limit * (1 + 1e-9)]
    return within[-1] if within else None
