"""One run in numbers: what ``summary.json`` holds. The ledger has the same columns for every strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median, pstdev
from typing import Any

from reporting.curve import Point, accuracy_curve, first_reaching, primary_where
from reporting.log import RunLog
from reporting.rows import Arrival, ClientInfo, Evaluation, Merge
from reporting.waiting import Closing, Wait, find_waits

SUMMARY_FILE = "summary.json"
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
SHARES_OF_BEST = (0.9, 0.95, 0.99)
STATUSES = ("merged", "rejected", "failed", "late")


def summarise(log: RunLog, targets: Sequence[float] = TARGETS) -> dict[str, Any]:
    """Return the numbers of one run; keys carry their units.

    Parameters
    ----------
    log : the run, finished or not.
    targets : accuracies (0 to 1) whose first time of reaching is reported, beside 90, 95 and 99 % of the run's best.

    Notes
    -----
    ``utilisation_ratio``: see ``utilisation``.
    ``round_time_s_first``, ``_last``: mean time between the first and the last five merges.
    ``straggler_wait_ratio``: waiting / (waiting + update time), over all arrivals (``reporting.waiting``).
    """
    waits, closings = find_waits(log)
    return {
        **_identity(log),
        **_accuracy(log, targets),
        **_times(log, waits, closings),
        **_costs(log),
        **_coverage(log),
        "num_arrivals": {status: sum(row.status == status for row in log.arrivals) for status in STATUSES},
        "num_warnings": len(log.warnings),
        "log_problems": list(log.problems),
        "ledger": ledger(log, waits, closings),
    }


def _identity(log: RunLog) -> dict[str, Any]:
    return {
        "strategy": log.run.strategy,
        "model": log.run.model,
        "data": log.run.data,
        "seed": log.run.seed,
        "num_clients": _num_clients(log),
        "num_parameters": log.run.num_parameters,
        "status": log.status,
        "reason": log.end.reason if log.end else "the log has no end row: the run goes on or was killed",
        "num_rounds": log.num_rounds,
        "num_merges": len(log.merges),
        "num_resumes": log.num_resumes,
    }


def utilisation(busy_s: float, num_clients: int, total_time_s: float) -> float | None:
    """Share of all clients' time in which they worked for the run: busy time / (clients x time of the run), in [0, 1].

    The same for every loop, synchronous or not. Busy is a client from the start of a request's download to the end of
    its upload (its update time), whatever became of the answer: also late, rejected and failed ones count. The clients
    are all of the run, asked or not. What is still under way when the run ends is in no log and does not count: a run
    that waits for everybody has none, one that does not is understated by at most one request a client. Co-S2P's
    authors count training alone, without transfers.

    Parameters
    ----------
    busy_s : sum of the update times of all arrivals, seconds.
    total_time_s : from the start of the run to its end, on its clock (virtual in simulation, else the wall's).

    Returns
    -------
    None for a run without time.
    """
    capacity_s = num_clients * total_time_s
    return busy_s / capacity_s if capacity_s > 0 else None


def _num_clients(log: RunLog) -> int:
    return max(log.run.num_clients, len(log.clients))


def _accuracy(log: RunLog, targets: Sequence[float]) -> dict[str, Any]:
    where = primary_where(log)
    curve = accuracy_curve(log, where)
    best = max(curve, key=lambda point: point.accuracy, default=None)
    finite_losses = [point.loss for point in curve if point.loss is not None]
    return {
        "evaluation": where,
        "final_accuracy": curve[-1].accuracy if curve else None,
        "final_loss": finite_losses[-1] if finite_losses else None,
        "best_accuracy": best.accuracy if best else None,
        "best_accuracy_round": best.server_round if best else None,
        "best_accuracy_time_s": best.time_s if best else None,
        "federated": federated_spread(log.evaluations),
        "family": family_rows(log.evaluations),
        "time_to_accuracy": time_to_accuracy(curve, targets),
    }


def _times(log: RunLog, waits: Sequence[Wait], closings: Sequence[Closing]) -> dict[str, Any]:
    total_time_s = log.total_time_s
    busy_s = sum(row.update_time_s for row in log.arrivals)
    wait_s = sum(wait.wait_s for wait in waits)
    merge_times = [0.0, *(row.time_s for row in log.merges)]
    round_times = [after - before for before, after in pairwise(merge_times)]
    return {
        "total_time_s": total_time_s,
        "total_wall_s": log.wall_s,
        "round_time_s_first": fmean(round_times[:5]) if round_times else None,
        "round_time_s_last": fmean(round_times[-5:]) if round_times else None,
        "utilisation_ratio": utilisation(busy_s, _num_clients(log), total_time_s),
        "straggler_wait_s": wait_s,
        "straggler_wait_ratio": wait_s / (wait_s + busy_s) if wait_s + busy_s > 0 else None,
        "straggler_wait_ratio_first": closings[0].wait_ratio if closings else None,
        "straggler_wait_ratio_last": closings[-1].wait_ratio if closings else None,
    }


def _costs(log: RunLog) -> dict[str, Any]:
    return {
        "merge_cpu_s": sum(row.merge_cpu_s for row in log.merges),
        "download_bytes": round(sum(row.download_bytes for row in log.arrivals)),
        "upload_bytes": round(sum(row.upload_bytes for row in log.arrivals)),
        "train_macs": sum(row.train_macs for row in log.arrivals),
    }


def _coverage(log: RunLog) -> dict[str, Any]:
    stars = [row.n_star for row in log.merges if row.n_star is not None]
    uncovered = [row.uncovered_ratio for row in log.merges if row.uncovered_ratio is not None]
    gaps = coverage_gaps(log.merges[-1]) if log.merges else []
    return {
        "n_star_min": min(stars) if stars else None,
        "n_star_median": median(stars) if stars else None,
        "n_star_final": stars[-1] if stars else None,
        "uncovered_ratio_max": max(uncovered) if uncovered else None,
        "coverage_gap": gaps[0][2] if gaps else None,
    }


def coverage_gaps(row: Merge) -> list[tuple[str, float, float]]:
    """(key, share of all answers that held its least covered entry, gap to its most covered one), widest gap first."""
    found = [
        (key, least, row.coverage_most[key] - least)
        for key, least in row.coverage_least.items()
        if key in row.coverage_most
    ]
    return sorted(found, key=lambda item: (-item[2], item[0]))


def time_to_accuracy(curve: Sequence[Point], targets: Sequence[float]) -> list[dict[str, Any]]:
    """Return one row per target: the first evaluation at or above it, or nulls where it was never reached."""
    best = max((point.accuracy for point in curve), default=None)
    wanted = [(f"{target * 100:g} %", target) for target in targets]
    if best is not None:
        wanted += [(f"{share * 100:g} % of best", share * best) for share in SHARES_OF_BEST]
    return [reach(curve, name, target) for name, target in wanted]


def reach(curve: Sequence[Point], name: str, target: float) -> dict[str, Any]:
    """Return what it took to get to the accuracy ``target``; nulls where it was never reached."""
    point = first_reaching(curve, target)
    return {
        "target": name,
        "accuracy": target,
        "time_s": point.time_s if point else None,
        "server_round": point.server_round if point else None,
        "total_bytes": point.total_bytes if point else None,
        "train_macs": point.train_macs if point else None,
    }


def federated_spread(evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Return the last federated evaluation: weighted accuracy and the spread over clients; None without one."""
    rows = [row for row in evaluations if row.where == "federated"]
    if not rows:
        return None
    values = sorted(value for value in rows[-1].clients.values() if math.isfinite(value))
    return {
        "accuracy": rows[-1].accuracy,
        "num_clients": len(values),
        "min": values[0] if values else None,
        "p10": quantile(values, 0.1) if values else None,
        "median": median(values) if values else None,
        "max": values[-1] if values else None,
        "std": pstdev(values) if values else None,
    }


def family_rows(evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Return the last evaluation of the family, smallest member first, and its best member; None without one."""
    rows = [row for row in evaluations if row.family]
    if not rows:
        return None
    members = sorted(rows[-1].family, key=lambda member: member.retention_ratio)
    known = [member for member in members if member.best_accuracy is not None]
    best = max(known, key=lambda member: member.best_accuracy or 0.0, default=None)
    return {
        "server_round": rows[-1].server_round,
        "best": rows[-1].best or None,
        "best_accuracy": best.best_accuracy if best else None,
        "best_retention_ratio": best.retention_ratio if best else None,
        "members": [
            {
                "name": member.name,
                "retention_ratio": member.retention_ratio,
                "accuracy": member.accuracy,
                "accuracy_reestimated": member.accuracy_reestimated,
            }
            for member in members
        ],
    }


def ledger(log: RunLog, waits: Sequence[Wait], closings: Sequence[Closing]) -> list[dict[str, Any]]:
    """Return one row per client: everything it was asked to spend, whatever became of its replies."""
    arrivals: dict[int, list[Arrival]] = {client.partition_id: [] for client in log.clients}
    for row in log.arrivals:
        arrivals[row.partition_id].append(row)
    wait_s = dict.fromkeys(arrivals, 0.0)
    for wait in waits:
        wait_s[wait.arrival.partition_id] += wait.wait_s
    last: dict[int, list[Closing]] = {key: [] for key in arrivals}
    for closing in closings:
        if closing.straggler is not None:
            last[closing.straggler].append(closing)
    found, shares = [], weight_ratios(log)
    for client in log.clients:
        key = client.partition_id
        spent = _ledger_row(client, arrivals[key], wait_s[key], last[key], log.total_time_s)
        found.append({**spent, "weight_ratio": shares.get(key)})
    return found


def weight_ratios(log: RunLog) -> dict[int, float]:
    """Partition -> mean share of the weight in a merge: who taught the model. All shares add up to 1.

    Every merge counts alike, for weights of different merges may have different scales. Empty for a log that has no
    weights. What of the model a client taught is another question: it holds a sub-model.
    """
    merges: dict[int, list[tuple[int, float]]] = {}
    for row in log.arrivals:
        if row.status == "merged" and row.merge_weight:
            merges.setdefault(row.server_round, []).append((row.partition_id, row.merge_weight))
    shares = dict.fromkeys((client.partition_id for client in log.clients), 0.0) if merges else {}
    for weights in merges.values():
        whole = sum(weight for _, weight in weights)
        for partition_id, weight in weights:
            shares[partition_id] = shares.get(partition_id, 0.0) + weight / whole / len(merges)
    return shares


def _ledger_row(
    client: ClientInfo, rows: Sequence[Arrival], wait_s: float, last: Sequence[Closing], total_time_s: float
) -> dict[str, Any]:
    merged = [row for row in rows if row.status == "merged"]
    memory = [row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None]
    staleness = [row.staleness for row in merged if row.staleness is not None]
    ratios = [row.retention_ratio for row in rows if row.retention_ratio is not None]
    depths = [row.depth for row in rows]
    busy_s = sum(row.update_time_s for row in rows)
    counts = {f"num_{status}": sum(row.status == status for row in rows) for status in STATUSES}
    return {
        "partition_id": client.partition_id,
        "device": client.device,
        "num_examples": client.num_examples,
        "train_macs": sum(row.train_macs for row in rows),
        "download_bytes": round(sum(row.download_bytes for row in rows)),
        "upload_bytes": round(sum(row.upload_bytes for row in rows)),
        "download_s": sum(row.download_s for row in rows),
        "compute_s": sum(row.compute_s for row in rows),
        "upload_s": sum(row.upload_s for row in rows),
        "update_time_s": busy_s,
        "utilisation_ratio": utilisation(busy_s, 1, total_time_s),
        "overhead_s": sum(row.overhead_s for row in rows),
        "wait_s": wait_s,
        "num_times_last": len(last),
        "held_up_s": sum(closing.held_up_s for closing in last),
        "peak_memory_bytes": max(memory) if memory else None,
        "memory_bytes": client.memory_bytes,
        "final_retention_ratio": ratios[-1] if ratios else None,
        "mean_retention_ratio": fmean(ratios) if ratios else None,
        "final_depth": depths[-1] if depths else None,
        "mean_staleness": fmean(staleness) if staleness else None,
        **counts,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Return the linearly interpolated quantile of ascending, non-empty ``values``."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)
