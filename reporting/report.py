"""The report of one run: one HTML file that needs nothing but a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from reporting.figures import draw_all
from reporting.log import EVENTS_FILE, RunLog, read_events
from reporting.page import Column, Section, fill
from reporting.style import clean
from reporting.summary import STATUSES, SUMMARY_FILE, summarise
from reporting.units import (
    MISSING,
    format_bytes,
    format_count,
    format_memory,
    format_percent,
    format_ratio,
    format_seconds,
)
from reporting.write import write_json, write_text

REPORT_FILE = "report.html"
MAX_ROWS = 1000
MAX_WARNINGS = 30

T = TypeVar("T")

_LEDGER: tuple[Column, ...] = (
    ("client", False),
    ("device", True),
    ("examples", False),
    ("MACs", False),
    ("down", False),
    ("up", False),
    ("compute", False),
    ("links", False),
    ("busy", False),
    ("engine", False),
    ("waiting", False),
    ("was last", False),
    ("held up", False),
    ("memory", False),
    ("retention", False),
    ("merged", False),
    ("weight", False),
)
_TARGETS: tuple[Column, ...] = (
    ("target", True),
    ("accuracy", False),
    ("time", False),
    ("round", False),
    ("bytes", False),
    ("MACs", False),
)


def write_report(run_folder: str | Path) -> Path:
    """Read the event log of ``run_folder`` and write ``report.html`` and ``summary.json`` beside it, atomically.

    Returns the path of the report. Works on runs that go on, failed or were killed. Raises ``reporting.log.LogError``
    when the log cannot be read, ``OSError`` when the folder cannot be written.
    """
    folder = Path(run_folder)
    log = read_events(folder)
    summary = summarise(log)
    write_json(folder / SUMMARY_FILE, summary)
    return write_text(folder / REPORT_FILE, make_page(log, summary))


def make_page(log: RunLog, summary: dict[str, Any]) -> str:
    """Return the report as HTML; ``summary``: ``summarise(log)``."""
    pictures = draw_all(log)
    sections = [Section(name, picture.title, picture) for name, picture in pictures.items()]
    sections = [_with_table(section, log, summary) for section in sections]
    if "ledger" not in pictures:
        sections.append(_with_table(Section("ledger", "Budget ledger"), log, summary))
    seed = "" if log.run.seed is None else f" · seed {log.run.seed}"
    subtitle = (
        f"{summary['num_clients']} clients · {summary['num_rounds']} rounds · "
        f"{format_count(log.run.num_parameters)} parameters{seed}"
        f" · {format_seconds(summary['total_wall_s'])} of real time"
    )
    settings = _pairs(log.run.config)
    return fill(
        "report",
        title=clean(f"{log.run.strategy} · {log.run.model} on {log.run.data}", 120),
        run=log.run,
        status=log.status,
        subtitle=subtitle,
        headlines=_headlines(summary),
        warnings=_warnings(log),
        sections=sections,
        pairs=[settings[: -(-len(settings) // 2)], settings[-(-len(settings) // 2) :], _pairs(log.run.versions)],
        log_name=EVENTS_FILE,
    )


Card = tuple[str, str, str]


def _headlines(summary: dict[str, Any]) -> list[Card]:
    """Return (name, value, small print) of the cards on top."""
    return [*_accuracy_cards(summary), *_time_cards(summary), *_cost_cards(summary)]


def _accuracy_cards(summary: dict[str, Any]) -> list[Card]:
    best, spread = format_percent(summary["best_accuracy"], 2), summary["federated"]
    cards = [("final accuracy", format_percent(summary["final_accuracy"], 2), f"best {best}, {summary['evaluation']}")]
    if spread and spread["num_clients"]:
        ends = f"clients from {format_percent(spread['min'], 0)} to {format_percent(spread['max'], 0)}"
        return [*cards, ("on the clients' own data", format_percent(spread["accuracy"], 2), ends)]
    when = "" if summary["best_accuracy_round"] is None else f"in round {summary['best_accuracy_round']}"
    return [*cards, ("best accuracy", best, when)]


def _time_cards(summary: dict[str, Any]) -> list[Card]:
    reached = next((row for row in summary["time_to_accuracy"] if row["target"] == "95 % of best"), None)
    return [
        ("total time", format_seconds(summary["total_time_s"]), f"{summary['num_merges']} merges"),
        (
            "straggler wait",
            format_percent(summary["straggler_wait_ratio"]),
            f"first {format_percent(summary['straggler_wait_ratio_first'], 0)}, "
            f"last {format_percent(summary['straggler_wait_ratio_last'], 0)} · "
            f"utilisation {format_percent(summary['utilisation_ratio'], 0)}",
        ),
        (
            "time to 95 % of best",
            format_seconds(reached["time_s"] if reached else None),
            f"round {reached['server_round']}, {format_percent(reached['accuracy'])}" if reached else "",
        ),
        (
            "time per round, last five",
            format_seconds(summary["round_time_s_last"]),
            f"first five: {format_seconds(summary['round_time_s_first'])}",
        ),
    ]


def _cost_cards(summary: dict[str, Any]) -> list[Card]:
    down, up = summary["download_bytes"], summary["upload_bytes"]
    counts, n_star = summary["num_arrivals"], summary["n_star_final"]
    lost = sum(counts[status] for status in STATUSES) - counts["merged"]
    causes = ", ".join(f"{counts[status]} {status}" for status in STATUSES[1:] if counts[status])
    return [
        ("bytes sent", format_bytes(down + up), f"{format_bytes(down)} down, {format_bytes(up)} up"),
        ("training MACs", format_count(summary["train_macs"]), "all clients, forward and backward"),
        (
            "least-trained entry (N*)",
            MISSING if n_star is None else f"{n_star:g} {'client' if n_star == 1 else 'clients'}",
            "" if n_star is None else f"at the last merge; lowest {summary['n_star_min']:g}",
        ),
        ("replies merged", f"{counts['merged']:,}", f"{lost} lost: {causes}" if lost else "none lost"),
    ]


def _warnings(log: RunLog) -> list[str]:
    found = list(log.problems)
    if log.status == "unfinished":
        found.append("The log has no end: the run goes on or was killed.")
    elif log.status != "completed":
        found.append(f"The run {log.status}: {log.end.reason if log.end else ''}")
    if log.num_resumes:
        found.append(f"The run was resumed {log.num_resumes} time(s); real time is that of the rounds kept.")
        found += [f"It {row.message}." for row in log.resumes]
    found += [
        f"Round {row.server_round}: {row.message}" if row.server_round is not None else row.message
        for row in log.warnings
    ]
    reasons: dict[str, list[int]] = {}
    for row in log.arrivals:
        if row.status in ("failed", "rejected"):
            reasons.setdefault(f"{row.status}: {row.reason or 'no reason given'}", []).append(row.partition_id)
    for reason, partitions in reasons.items():
        who = ", ".join(str(key) for key in sorted(set(partitions))[:8])
        found.append(f"{len(partitions)} × {clean(reason, 300)} (client {who})")
    found += _always_late(log)
    if len(found) > MAX_WARNINGS:
        found = [*found[:MAX_WARNINGS], f"… and {len(found) - MAX_WARNINGS} more in the event log."]
    return found


def _always_late(log: RunLog) -> list[str]:
    """Clients of whom nothing was merged because it came too late, every time of several."""
    reasons: dict[int, list[str]] = {}
    for row in log.arrivals:
        if row.status == "late":
            reasons.setdefault(row.partition_id, []).append(row.reason)
    merged = {row.partition_id for row in log.arrivals if row.status == "merged"}
    return [
        f"Client {partition_id}: nothing of it is in the model, all its {len(its)} answers came too late "
        f"({clean(its[-1], 100)}). Raise loop.max-staleness or loop.deadline-s, or give it less to do."
        for partition_id, its in sorted(reasons.items())
        if len(its) > 1 and partition_id not in merged
    ]


def _with_table(section: Section, log: RunLog, summary: dict[str, Any]) -> Section:
    """Return ``section`` with the table that belongs to its picture, if one does."""
    if section.name == "accuracy":
        targets = tuple(
            (
                row["target"],
                format_percent(row["accuracy"], 1),
                format_seconds(row["time_s"]),
                MISSING if row["server_round"] is None else str(row["server_round"]),
                format_bytes(row["total_bytes"]),
                format_count(row["train_macs"]),
            )
            for row in summary["time_to_accuracy"]
        )
        return Section(
            section.name,
            section.title,
            section.picture,
            _TARGETS,
            targets,
            table_note="What it took to reach each accuracy for the first time.",
        )
    if section.name == "ledger":
        ledger = summary["ledger"]
        has_engine = any(row["overhead_s"] for row in ledger)  # simulations have none
        note = (
            "Links: download and upload. Busy: share of the run's time. Held up: how much sooner its rounds would have "
            "closed without it. Merged: of all its replies. Weight: share of the merges' weight, all merges counted "
            "alike."
        )
        if has_engine:
            note += " Engine: what messages took beside (polls, queues, starting processes)."
        if len(ledger) > MAX_ROWS:
            note += f" The first {MAX_ROWS} of {len(ledger)} clients; all are in summary.json."

        def shown(cells: tuple[T, ...]) -> tuple[T, ...]:
            named = zip(cells, _LEDGER, strict=True)
            return tuple(cell for cell, (name, _) in named if has_engine or name != "engine")

        rows = tuple(shown(_ledger_cells(row)) for row in ledger[:MAX_ROWS])
        total = shown(_ledger_total(ledger, summary["utilisation_ratio"]))
        return Section(section.name, section.title, section.picture, shown(_LEDGER), rows, total, note)
    return section


def _ledger_cells(row: dict[str, Any]) -> tuple[str, ...]:
    depth = "" if row["final_depth"] is None else f", depth {row['final_depth']}"
    memory = format_memory(row["peak_memory_bytes"])
    return (
        str(row["partition_id"]),
        clean(row["device"], 28),
        str(row["num_examples"]),
        format_count(row["train_macs"]),
        format_bytes(row["download_bytes"]),
        format_bytes(row["upload_bytes"]),
        format_seconds(row["compute_s"]),
        format_seconds(row["download_s"] + row["upload_s"]),
        format_percent(row["utilisation_ratio"], 0),
        format_seconds(row["overhead_s"]),
        format_seconds(row["wait_s"]),
        f"{row['num_times_last']} ×",
        format_seconds(row["held_up_s"]),
        memory,
        format_ratio(row["final_retention_ratio"]) + depth,
        _merged(row["num_merged"], _lost(row)),
        format_percent(row["weight_ratio"], 0),
    )


def _ledger_total(ledger: list[dict[str, Any]], utilisation_ratio: float | None) -> tuple[str, ...]:
    def total(name: str) -> Any:
        return sum(row[name] for row in ledger)

    return (
        "all",
        "",
        str(total("num_examples")),
        format_count(total("train_macs")),
        format_bytes(total("download_bytes")),
        format_bytes(total("upload_bytes")),
        format_seconds(total("compute_s")),
        format_seconds(total("download_s") + total("upload_s")),
        format_percent(utilisation_ratio, 0),
        format_seconds(total("overhead_s")),
        format_seconds(total("wait_s")),
        "",
        format_seconds(total("held_up_s")),
        format_memory(max((row["peak_memory_bytes"] or 0 for row in ledger), default=None)),
        "",
        _merged(total("num_merged"), sum(map(_lost, ledger))),
        "",
    )


def _merged(num_merged: int, num_lost: int) -> str:
    return f"{num_merged} of {num_merged + num_lost}"


def _lost(row: dict[str, Any]) -> int:
    return sum(row[f"num_{status}"] for status in STATUSES[1:])


def _pairs(values: Any) -> list[tuple[str, str]]:
    shown = []
    for name, value in sorted(values.items()):
        text = ("true" if value else "false") if isinstance(value, bool) else "" if value is None else str(value)
        shown.append((str(name), text or MISSING))
    return shown
