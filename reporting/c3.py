"""The C3-Score: accuracy discounted by the bandwidth and the client compute that it took.

    C3 = A exp(-(B / B_max + C / C_max) / T)

(AdaSplit, arXiv 2112.01637.) A is the accuracy in [0, 1], B the bytes both ways, C the clients' multiply-accumulates,
B_max and C_max the budgets, T a temperature: the larger, the less costs matter. The order of methods depends on T, so
several are shown.

Bandwidth is known twice. On the wire: all tensors of every message, both ways. Counted, as AdaSplit's authors do: four
bytes for every activation that goes up (of AdaSplit: that is not zero) and for every entry of a gradient that comes
down. Labels and step numbers are not counted, nor are weights beside activations: the clients' halves of SL-basic,
SplitFed and ``client-sync`` are on the wire only. A client and round without any activation or gradient counts as on
the wire, and so does every method that sends weights instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from reporting.log import RunLog

TEMPERATURE = 8.0
TEMPERATURES = (1.0, TEMPERATURE, 64.0)


class C3Error(ValueError):
    """A score of numbers that cannot be."""


@dataclass(frozen=True)
class Budgets:
    """What a run may cost, and what its costs are measured against.

    Attributes
    ----------
    max_bytes : B_max, both ways together.
    max_macs : C_max, of all clients together.
    max_counted_bytes : B_max of counted bytes; None for that of the wire.
    """

    max_bytes: float
    max_macs: float
    max_counted_bytes: float | None = None

    def __post_init__(self) -> None:
        """Check every range."""
        for name, value in (
            ("max-bytes", self.max_bytes),
            ("max-macs", self.max_macs),
            ("max-counted-bytes", self.counted_budget),
        ):
            if not (math.isfinite(value) and value > 0):
                raise C3Error(f"c3: {name}: got {value!r}, expected a positive number")

    @property
    def counted_budget(self) -> float:
        """B_max of counted bytes."""
        return self.max_bytes if self.max_counted_bytes is None else self.max_counted_bytes


@dataclass(frozen=True)
class Spending:
    """What one run came to.

    Attributes
    ----------
    accuracy : in [0, 1].
    total_bytes : on the wire, both ways, training only.
    counted_bytes : the same as the authors count them, see above; ``total_bytes`` for methods that send weights.
    train_macs : of all clients, forward and backward.
    """

    accuracy: float
    total_bytes: float
    counted_bytes: float
    train_macs: float


def c3_score(
    accuracy: float, num_bytes: float, macs: float, budgets: Budgets, temperature: float = TEMPERATURE
) -> float:
    """The score of one run, ``num_bytes`` measured against ``max_bytes``.

    Raises
    ------
    C3Error
        If the accuracy is outside [0, 1], a cost negative, or the temperature not positive.
    """
    if not 0 <= accuracy <= 1:
        raise C3Error(f"c3: accuracy: got {accuracy!r}, expected a number in [0, 1]; for 90 % give 0.9")
    if not (num_bytes >= 0 and macs >= 0):
        raise C3Error(f"c3: costs: got {num_bytes!r} bytes and {macs!r} MACs, expected numbers >= 0")
    if not temperature > 0:
        raise C3Error(f"c3: temperature: got {temperature!r}, expected a positive number")
    return accuracy * math.exp(-(num_bytes / budgets.max_bytes + macs / budgets.max_macs) / temperature)


def spending_of(log: RunLog) -> Spending | None:
    """What a run came to; None while it has no accuracy.

    The accuracy is that of the last evaluation: the plain mean over clients where they tested what each of them has,
    else the global model's.
    """
    tested = [row for row in log.evaluations if row.accuracy is not None and math.isfinite(row.accuracy)]
    if not tested:
        return None
    last = max(row.server_round for row in tested)
    rows = {row.where: row for row in tested if row.server_round == last}
    federated = rows.get("federated")
    values = [] if federated is None else [v for v in federated.clients.values() if math.isfinite(v)]
    accuracy = fmean(values) if values else next(iter(rows.values())).accuracy or 0.0
    wire = [row.download_bytes + row.upload_bytes for row in log.arrivals]
    counted = [
        total if row.counted_bytes is None else row.counted_bytes for row, total in zip(log.arrivals, wire, strict=True)
    ]
    return Spending(accuracy, sum(wire), sum(counted), sum(row.train_macs for row in log.arrivals))


def budgets_of(runs: Sequence[Spending], max_bytes: float | None = None, max_macs: float | None = None) -> Budgets:
    """The budgets that were given; what was not, is the largest of the compared runs' costs.

    A budget of bytes that was given is that of counted bytes too: so much may cross, however it is counted.
    """
    if max_bytes is not None:
        wire, counted = max_bytes, None
    else:
        wire = max((run.total_bytes for run in runs), default=0.0) or 1.0
        counted = max((run.counted_bytes for run in runs), default=0.0) or 1.0
    macs = max_macs if max_macs is not None else max((run.train_macs for run in runs), default=0.0) or 1.0
    return Budgets(wire, macs, counted)


def scores(run: Spending, budgets: Budgets) -> Mapping[str, float]:
    """The scores at every temperature, as ``c3_t8``, and with counted bytes, as ``c3_counted_t8``.

    Each kind of bytes is measured against the budget of its own kind.
    """
    counted = replace(budgets, max_bytes=budgets.counted_budget)
    found = {}
    for temperature in TEMPERATURES:
        found[f"c3_t{temperature:g}"] = c3_score(run.accuracy, run.total_bytes, run.train_macs, budgets, temperature)
        found[f"c3_counted_t{temperature:g}"] = c3_score(
            run.accuracy, run.counted_bytes, run.train_macs, counted, temperature
        )
    return found


def score_runs(
    logs: Sequence[RunLog], runs: Sequence[MutableMapping[str, Any]], max_bytes: float | None, max_macs: float | None
) -> dict[str, Any]:
    """Give every run of a comparison its ``c3`` and its ``counted_bytes``; returns the budgets."""
    spent = [spending_of(log) for log in logs]
    budgets = budgets_of([item for item in spent if item is not None], max_bytes, max_macs)
    for run, item in zip(runs, spent, strict=True):
        run["c3"] = dict(scores(item, budgets)) if item is not None else None
        run["counted_bytes"] = item.counted_bytes if item is not None else None
    return {
        "c3_max_bytes": budgets.max_bytes,
        "c3_max_counted_bytes": budgets.counted_budget,
        "c3_max_macs": budgets.max_macs,
    }
