"""A comparison as a person reads it: a table for a terminal, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reporting.c3 import TEMPERATURE, TEMPERATURES
from reporting.curve import Point
from reporting.page import Column, Section, fill
from reporting.style import CYCLE, DASHES, clean, render, style
from reporting.units import MISSING, format_bytes, format_count, format_factor, format_percent, format_seconds
from reporting.view import Picture, format_axis, make_figure


def format_table(numbers: dict[str, Any]) -> str:
    """Return the comparison as a plain table of fixed columns, for a terminal."""
    columns, rows = _overview(numbers)
    cells = [tuple(name for name, _ in columns), *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for index, row in enumerate(cells):
        line = "  ".join(
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, (_, is_text) in zip(row, widths, columns, strict=True)
        )
        lines.append(line.rstrip())
        if index == 0:
            lines.append("  ".join("-" * width for width in widths))
    lines += ["", _explain(numbers)]
    lines += [f"note: {text}" for text in numbers["differences"]]
    return "\n".join(lines)


def format_page(numbers: dict[str, Any], curves: Sequence[Sequence[Point]]) -> str:
    """Return the comparison as a self-contained page."""
    columns, rows = _overview(numbers)
    labels = [run["label"] for run in numbers["runs"]]
    sections = [
        Section("overview", "Overview", None, columns, rows, table_note=_explain(numbers)),
        Section("curves", "Accuracy over rounds, time and bytes", _draw(labels, curves, numbers)),
        _targets_section(numbers),
        _c3_section(numbers),
        _settings_section(numbers),
    ]
    first = numbers["runs"][0]
    return fill(
        "comparison",
        title="Comparison: " + clean(", ".join(labels), 120),
        subtitle=f"{clean(first['model'])} on {clean(first['data'])} · {first['num_clients']} clients · "
        f"speed-ups against {first['label']}",
        runs=numbers["runs"],
        headlines=_headlines(numbers),
        warnings=numbers["differences"],
        sections=sections,
    )


def _headlines(numbers: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, value, small print): who wins by each measure."""
    cards = []
    for name, key, limit in (
        ("best at equal rounds", "accuracy_at_equal_rounds", f"{numbers['equal_rounds']} rounds"),
        ("best at equal time", "accuracy_at_equal_time", format_seconds(numbers["equal_time_s"])),
        ("best at equal bytes", "accuracy_at_equal_bytes", format_bytes(numbers["equal_bytes"])),
    ):
        known = [run for run in numbers["runs"] if run[key] is not None]
        if known:
            run = max(known, key=lambda run: run[key])
            winners = [other["label"] for other in known if other[key] == run[key]]
            cards.append((name, _tie(winners), f"{format_percent(run[key])} after {limit}"))
    reached = [run for run in numbers["runs"] if run["targets"][0]["time_s"] is not None]
    if reached:
        run = min(reached, key=lambda run: run["targets"][0]["time_s"])
        row = run["targets"][0]
        cards.append(
            (
                f"first to reach {format_percent(row['accuracy'])}",
                _tie([r["label"] for r in reached if r["targets"][0]["time_s"] == row["time_s"]]),
                f"{format_seconds(row['time_s'])}, {format_factor(row['speedup'])} the first run's speed",
            )
        )
    return cards


def _tie(labels: Sequence[str]) -> str:
    """Return the winners of one measure; more than two would not fit a card."""
    return " = ".join(labels) if len(labels) < 3 else f"{len(labels)} runs tie"


def _targets_section(numbers: dict[str, Any]) -> Section:
    columns: tuple[Column, ...] = (
        ("target", True),
        ("run", True),
        ("accuracy", False),
        ("time", False),
        ("speed-up", False),
        ("round", False),
        ("bytes", False),
        ("bytes saved", False),
    )
    rows = [
        (
            row["target"],
            run["label"],
            format_percent(row["accuracy"]),
            format_seconds(row["time_s"]) if row["time_s"] is not None else "never",
            format_factor(row["speedup"]),
            MISSING if row["server_round"] is None else str(row["server_round"]),
            format_bytes(row["total_bytes"]),
            format_factor(row["bytes_factor"]),
        )
        for index in range(len(numbers["runs"][0]["targets"]))
        for run in numbers["runs"]
        for row in (run["targets"][index],)
    ]
    return Section("targets", "Time to accuracy", None, columns, tuple(rows))


def _c3_section(numbers: dict[str, Any]) -> Section:
    """The score at every temperature, with bytes on the wire and as they are counted: the order depends on both."""
    columns: list[Column] = [("run", True), ("bytes", False), ("counted", False), ("MACs", False)]
    for kind in ("", ", counted"):
        columns += [(f"T = {temperature:g}{kind}", False) for temperature in TEMPERATURES]
    rows = []
    for run in numbers["runs"]:
        cells = [run["label"], format_bytes(run["download_bytes"] + run["upload_bytes"])]
        cells += [format_bytes(run["counted_bytes"]), format_count(run["train_macs"])]
        for kind in ("c3_t", "c3_counted_t"):
            cells += [_score(run, f"{kind}{temperature:g}") for temperature in TEMPERATURES]
        rows.append(tuple(cells))
    note = (
        f"Accuracy times exp(-(bytes / budget + MACs / {format_count(numbers['c3_max_macs'])}) / T). Budgets of bytes: "
        f"{format_bytes(numbers['c3_max_bytes'])}; counted: {format_bytes(numbers['c3_max_counted_bytes'])}. "
        "Counted, of split learning: four bytes for every activation sent (of AdaSplit, that is not 0) and for every "
        "entry of a gradient that comes down."
    )
    return Section("c3", "C3-Score", None, tuple(columns), tuple(rows), table_note=note)


def _score(run: dict[str, Any], name: str) -> str:
    return MISSING if run["c3"] is None else f"{run['c3'][name]:.3f}"


def _settings_section(numbers: dict[str, Any]) -> Section:
    columns: tuple[Column, ...] = (
        ("run", True),
        ("strategy", True),
        ("model", True),
        ("data", True),
        ("clients", False),
        ("rounds", False),
        ("seed", False),
        ("utilisation", False),
        ("status", True),
        ("folder", True),
    )
    rows = tuple(
        (
            run["label"],
            clean(run["strategy"]),
            clean(run["model"]),
            clean(run["data"]),
            str(run["num_clients"]),
            str(run["num_rounds"]),
            MISSING if run["seed"] is None else str(run["seed"]),
            format_percent(run["utilisation_ratio"], 0),
            run["status"],
            run["folder"],
        )
        for run in numbers["runs"]
    )
    return Section("runs", "The runs", None, columns, rows)


def _draw(labels: Sequence[str], curves: Sequence[Sequence[Point]], numbers: dict[str, Any]) -> Picture:
    with style():
        figure, axes = make_figure(1, 3, 4.0, sharey=True)
        target = numbers["runs"][0]["targets"][0]["accuracy"]
        for ax, name, title in zip(
            axes, ("server_round", "time_s", "total_bytes"), ("rounds", "time", "bytes, both ways"), strict=True
        ):
            for index, (label, curve) in enumerate(zip(labels, curves, strict=True)):
                ax.plot(
                    [getattr(point, name) for point in curve],
                    [point.accuracy for point in curve],
                    label=clean(label, 40),
                    color=CYCLE[index % len(CYCLE)],
                    linestyle=DASHES[index % len(DASHES)],
                )
            ax.axhline(target, color="#808080", linewidth=0.7, linestyle=(0, (2, 2)), zorder=0.5)
            ax.set_title(f"against {title}")
            ax.set_xlim(left=0)
            format_axis(ax, "x", {"server_round": "count", "time_s": "seconds", "total_bytes": "bytes"}[name])
        format_axis(axes[0], "y", "percent")
        axes[0].annotate(f"{format_percent(target)}", (0, target), (3, 2), textcoords="offset points", fontsize=7)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
        words = ", ".join(
            f"{label} {format_percent(curve[-1].accuracy)}" for label, curve in zip(labels, curves, strict=True)
        )
        return Picture(
            "Accuracy",
            render(figure, "curves", "Accuracy of every run", f"Final accuracies: {words}."),
            f"Dotted: {numbers['runs'][0]['targets'][0]['target']}.",
        )


def _overview(numbers: dict[str, Any]) -> tuple[tuple[Column, ...], tuple[tuple[str, ...], ...]]:
    targets = numbers["runs"][0]["targets"]
    has_family = any(run["family_best_accuracy"] is not None for run in numbers["runs"])
    columns: list[Column] = [
        ("run", True),
        ("final", False),
        ("best", False),
        *([("family best", False)] if has_family else []),
        ("total time", False),
        ("= rounds", False),
        ("speed-up", False),
        ("= time", False),
        ("= bytes", False),
    ]
    for row in targets:
        columns += [(f"to {format_percent(row['accuracy'])}", False), ("speed-up", False)]
    columns += [("bytes", False), ("MACs", False), ("C3", False), ("waiting", False)]
    rows = []
    for run in numbers["runs"]:
        cells = [run["label"], format_percent(run["final_accuracy"]), format_percent(run["best_accuracy"])]
        cells += [format_percent(run["family_best_accuracy"])] if has_family else []
        cells += [
            format_seconds(run["total_time_s"]),
            format_percent(run["accuracy_at_equal_rounds"]),
            format_factor(run["speedup_at_equal_rounds"]),
            format_percent(run["accuracy_at_equal_time"]),
            format_percent(run["accuracy_at_equal_bytes"]),
        ]
        for row in run["targets"]:
            cells += [
                format_seconds(row["time_s"]) if row["time_s"] is not None else "never",
                format_factor(row["speedup"]),
            ]
        cells += [
            format_bytes(run["download_bytes"] + run["upload_bytes"]),
            format_count(run["train_macs"]),
            _score(run, f"c3_t{TEMPERATURE:g}"),
            format_percent(run["straggler_wait_ratio"], 0),
        ]
        rows.append(tuple(cells))
    return tuple(columns), tuple(rows)


def _explain(numbers: dict[str, Any]) -> str:
    return (
        f"= rounds: accuracy after {numbers['equal_rounds']} rounds, and the speed-up in time for them; "
        f"= time: accuracy after {format_seconds(numbers['equal_time_s'])}; "
        f"= bytes: accuracy after {format_bytes(numbers['equal_bytes'])} both ways. "
        f"First target: {numbers['runs'][0]['targets'][0]['target']}. Speed-ups are against {numbers['first']}. "
        f"C3: accuracy times exp(-(bytes / {format_bytes(numbers['c3_max_bytes'])} + MACs / "
        f"{format_count(numbers['c3_max_macs'])}) / {TEMPERATURE:g})."
    )
