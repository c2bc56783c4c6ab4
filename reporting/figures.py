"""Pictures of one run: functions of a ``View`` that return a ``Picture``, or None where the log has nothing to show.

Clients appear in one order everywhere: fastest device first, by the update time each had when it was first asked.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from statistics import median

from matplotlib.axes import Axes

from reporting.curve import accuracy_curve, first_reaching
from reporting.gates import draw_gates, draw_plan
from reporting.log import RunLog
from reporting.maps import draw_coverage, draw_labels, draw_widths
from reporting.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    SPEED,
    add_tip,
    clean,
    hide_grid,
    render,
    style,
)
from reporting.summary import quantile
from reporting.timeline import draw_timeline, draw_waiting
from reporting.units import format_bytes, format_percent, format_seconds
from reporting.view import MAX_CLIENTS, Picture, View, format_axis, make_figure, set_client_ticks, set_legend_above


def draw_accuracy(view: View) -> Picture | None:
    """Accuracy of the global model against time and against bytes."""
    curves = {where: accuracy_curve(view.log, where) for where in ("central", "federated")}
    curves = {where: curve for where, curve in curves.items() if curve}
    if not curves:
        return None
    figure, axes = make_figure(1, 2, 3.0, sharey=True)
    for where, curve in curves.items():
        colour, width = (BLUE, 2.0) if where == next(iter(curves)) else (ORANGE, 1.3)
        for ax, name in ((axes[0], "time_s"), (axes[1], "total_bytes")):
            xs, ys = [getattr(point, name) for point in curve], [point.accuracy for point in curve]
            label = "global model, held-out data" if where == "central" else "mean over the clients' own test data"
            ax.plot(xs, ys, color=colour, linewidth=width, label=label, zorder=3)
            ax.plot(xs[-1:], ys[-1:], "o", color=colour, markersize=4, zorder=4)
            if where == "federated":
                _draw_spread(ax, view.log, {point.server_round: getattr(point, name) for point in curve})
    main = next(iter(curves.values()))
    best = max(point.accuracy for point in main)
    reached = first_reaching(main, 0.95 * best)
    if reached is not None:
        for ax, x, text in (
            (axes[0], reached.time_s, format_seconds(reached.time_s)),
            (axes[1], reached.total_bytes, format_bytes(reached.total_bytes)),
        ):
            ax.plot([x, x], [0, reached.accuracy], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=2)
            ax.annotate(
                f"95 % of best\nafter {text}",
                (x, 0),
                (5, 5),
                textcoords="offset points",
                fontsize=7.5,
                color=MUTED,
                va="bottom",
            )
    axes[0].set_title("against time", pad=20)
    axes[1].set_title("against bytes sent, both ways, all clients", pad=20)
    format_axis(axes[0], "x", "seconds", "time on the run's clock")
    format_axis(axes[1], "x", "bytes")
    format_axis(axes[0], "y", "percent", "accuracy")
    for ax in axes:
        ax.set_ylim(0, 1.0)
        ax.set_xlim(left=0)
    axes[0].tick_params(labelleft=True)
    set_legend_above(axes[0])
    return Picture(
        "Accuracy",
        render(
            figure,
            "accuracy",
            "Accuracy against time and bytes",
            f"Final accuracy {format_percent(main[-1].accuracy)}, best {format_percent(best)}.",
        ),
        " ".join(filter(None, (_spread_note(curves), _depth_note(view.log)))),
    )


def _spread_note(curves: Container[str]) -> str:
    return "The band spans the clients from the 10th to the 90th percentile." if "federated" in curves else ""


def _depth_note(log: RunLog) -> str:
    """Where what was evaluated is not the whole model, since nobody had trained the rest."""
    shallow = [row for row in log.evaluations if row.depth is not None]
    if not shallow:
        return ""
    last = shallow[-1]
    words = f"model is its first {last.depth} blocks: nobody"
    if last.server_round == log.evaluations[-1].server_round:
        return f"The {words} has trained the others."
    return f"Until round {last.server_round} the {words} had trained the others."


def draw_exits(view: View) -> Picture | None:
    """Accuracy of every exit of the global model against time."""
    rows = [row for row in view.log.evaluations if row.where == "central" and len(row.exits) > 1]
    if not rows:
        return None
    most = max(len(row.exits) for row in rows)
    figure, (ax,) = make_figure(1, 1, 2.8)
    for number in range(most):
        points = [(row.time_s, row.exits[number]) for row in rows if len(row.exits) > number]
        place = ", the shallowest" if number == 0 else ", the deepest" if number == most - 1 else ""
        label = f"exit {number + 1}{place}"
        colour = SPEED(0.15 + 0.7 * number / (most - 1))
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, label=label, marker="o", markersize=2.5)
    format_axis(ax, "x", "seconds", "time on the run's clock")
    format_axis(ax, "y", "percent", "accuracy")
    ax.set_ylim(0, 1.0)
    ax.set_xlim(left=0)
    set_legend_above(ax)
    final = ", ".join(format_percent(accuracy) for accuracy in rows[-1].exits)
    return Picture(
        "Exits",
        render(figure, "exits", "Accuracy of every exit against time", f"At the end, shallowest first: {final}."),
        "An exit has a line from where somebody has trained it.",
    )


def _draw_spread(ax: Axes, log: RunLog, x_of_round: dict[int, float]) -> None:
    xs, low, high = [], [], []
    for row in log.evaluations:
        if row.where == "federated" and len(row.clients) > 1 and row.server_round in x_of_round:
            values = sorted(row.clients.values())
            xs.append(x_of_round[row.server_round])
            low.append(quantile(values, 0.1))
            high.append(quantile(values, 0.9))
    if xs:
        ax.fill_between(xs, low, high, color=ORANGE, alpha=0.18, linewidth=0)


def draw_adaptation(view: View) -> Picture | None:
    """Retention ratio and update time of every client over rounds, with the reference that decisions aimed at."""
    if not any(view.by_client.values()):
        return None
    ratios = {
        key: [(r.server_round, r.retention_ratio) for r in rows if r.retention_ratio is not None]
        for key, rows in view.by_client.items()
    }
    times = {key: [(r.server_round, r.update_time_s) for r in rows] for key, rows in view.by_client.items()}
    figure, axes = make_figure(1, 2, 3.2)
    for ax, series in ((axes[0], ratios), (axes[1], times)):
        if len(view.order) > MAX_CLIENTS:
            _draw_quantiles(ax, series)
        else:
            _draw_lines(ax, series, view)
        format_axis(ax, "x", "count", "round")
    for decision in view.log.decisions:
        for ax in axes:
            ax.axvline(decision.server_round + 0.5, color=MUTED, linewidth=0.5, linestyle=(0, (1, 2)), zorder=0.5)
    known = [(d.server_round, d.reference_s) for d in view.log.decisions if d.reference_s is not None]
    if known:
        last = max(row.server_round for row in view.log.arrivals)
        xs = [x for x, _ in known] + [max(last, known[-1][0])]
        ys = [y for _, y in known] + [known[-1][1]]
        axes[1].step(
            xs, ys, where="post", color=INK, linewidth=1.6, linestyle=(0, (4, 1.6)), label="reference", zorder=6
        )
    axes[0].set_ylim(0, 1.04)
    axes[0].set_title("retention ratio (share of the model a client trains)")
    axes[1].set_title("update time (download + compute + upload)")
    axes[1].set_ylim(bottom=0)
    format_axis(axes[1], "y", "seconds")
    if axes[1].get_legend_handles_labels()[0]:
        axes[1].legend(loc="upper right")
    note = "Dotted vertical lines are decisions." if view.log.decisions else ""
    floors = view.log.decisions[-1].floors if view.log.decisions else ()
    if floors:
        named = f"{len(floors)} clients" if len(floors) > 8 else _name_clients(floors)
        note += f" Since the last one {named} may get no smaller sub-model."
    if len(view.order) > MAX_CLIENTS:
        note += " Bands over all clients: everything, the 10th to 90th percentile, and the median."
    else:
        note += " Colours run from the fastest client (teal) to the slowest (red) as the devices were at the start."
    return Picture(
        "Retention ratio and update time",
        render(
            figure,
            "adaptation",
            "Retention ratio and update time over rounds",
            "One line per client, or bands beyond 40 clients.",
        ),
        note.strip(),
    )


def _name_clients(partition_ids: Sequence[int]) -> str:
    *others, last = map(str, partition_ids)
    return f"clients {', '.join(others)} and {last}" if others else f"client {last}"


def _draw_lines(ax: Axes, series: dict[int, list[tuple[int, float]]], view: View) -> None:
    # slowest first, so that the fastest, the usual reference, lies on top
    for key in reversed(view.order):
        if series[key]:
            (line,) = ax.plot(*zip(*series[key], strict=True), color=view.colour(key), linewidth=1.3)
            add_tip(line, f"client {key}")
    drawn = [key for key in view.order if series[key]]
    if len(drawn) < 2:
        return
    fastest, slowest = drawn[0], drawn[-1]
    # name the two ends where they lie apart: before adaptation or after it
    gaps = [series[slowest][place][1] - series[fastest][place][1] for place in (0, -1)]
    place = 0 if abs(gaps[0]) > abs(gaps[1]) else -1
    if not gaps[place]:
        return
    for key, word, above in ((fastest, "fastest", gaps[place] < 0), (slowest, "slowest", gaps[place] > 0)):
        ax.annotate(
            f"client {key}, {word}",
            series[key][place],
            (0, 4 if above else -4),
            textcoords="offset points",
            fontsize=7,
            color=view.colour(key),
            va="bottom" if above else "top",
            ha="left" if place == 0 else "right",
        )


def _draw_quantiles(ax: Axes, series: dict[int, list[tuple[int, float]]]) -> None:
    found: dict[int, list[float]] = {}
    for points in series.values():
        for server_round, value in points:
            found.setdefault(server_round, []).append(value)
    rounds = sorted(found)
    columns = [sorted(found[server_round]) for server_round in rounds]
    ax.fill_between(
        rounds,
        [c[0] for c in columns],
        [c[-1] for c in columns],
        color=BLUE,
        alpha=0.14,
        linewidth=0,
        label="all clients",
    )
    ax.fill_between(
        rounds,
        [quantile(c, 0.1) for c in columns],
        [quantile(c, 0.9) for c in columns],
        color=BLUE,
        alpha=0.25,
        linewidth=0,
        label="10th to 90th percentile",
    )
    ax.plot(rounds, [median(c) for c in columns], color=BLUE, label="median")


def draw_ledger(view: View) -> Picture | None:
    """The budget of every client: MACs, bytes, seconds and peak memory."""
    rows = [row for row in view.ledger if row["partition_id"] in set(view.shown)]
    if not rows or not view.log.arrivals:
        return None
    figure, axes = make_figure(1, 4, max(2.2, min(6.5, 0.2 * len(rows) + 0.9)), sharey=True)
    places = range(len(rows))
    axes[0].barh(places, [row["train_macs"] for row in rows], color=BLUE, height=0.7)
    axes[0].set_title("training MACs")
    axes[1].barh(places, [row["download_bytes"] for row in rows], color=SKY, height=0.7, label="down")
    axes[1].barh(
        places,
        [row["upload_bytes"] for row in rows],
        left=[row["download_bytes"] for row in rows],
        color=ORANGE,
        height=0.7,
        label="up",
    )
    axes[1].set_title("bytes: down, then up")
    axes[2].barh(places, [row["update_time_s"] for row in rows], color=GREEN, height=0.7)
    axes[2].set_title("seconds at work")
    axes[3].barh(places, [row["peak_memory_bytes"] or 0 for row in rows], color=PURPLE, height=0.7)
    axes[3].set_title("peak training memory")
    for ax, quantity in zip(axes, ("macs", "bytes", "seconds", "memory"), strict=True):
        hide_grid(ax, "y")
        format_axis(ax, "x", quantity)
        ax.locator_params(axis="x", nbins=4)
    set_client_ticks(axes[0], {row["partition_id"]: index for index, row in enumerate(rows)}, view)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    return Picture(
        "Budget ledger",
        render(
            figure,
            "ledger",
            "Budget of every client",
            "Bars of MACs, bytes, seconds and peak memory per client; the table below has the numbers.",
        ),
        view.note,
    )


def draw_family(view: View) -> Picture | None:
    """Accuracy of every member of the family against its retention ratio, at the last evaluation of the family."""
    rows = [row for row in view.log.evaluations if row.family]
    if not rows:
        return None
    members = sorted(rows[-1].family, key=lambda member: member.retention_ratio)
    figure, (ax,) = make_figure(1, 1, 2.8)
    for name, label, colour, marker in (
        ("accuracy", "as it is", MUTED, "o"),
        ("accuracy_reestimated", "normalisation statistics re-estimated", BLUE, "o"),
    ):
        points = [(m.retention_ratio, getattr(m, name)) for m in members if getattr(m, name) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=colour, label=label, linewidth=1.3)
    format_axis(ax, "y", "percent", "accuracy")
    ax.set_xlabel("retention ratio")
    ax.set_xlim(0, 1.03)
    if not all(member.name.replace(".", "", 1).isdigit() or member.name in ("base", "") for member in members):
        for member in members:  # names that say more than the axis does
            x, y, name = member.retention_ratio, member.best_accuracy or 0.0, clean(member.name, 28)
            ax.annotate(name, (x, y), (0, 5), textcoords="offset points", fontsize=7.5, ha="center")
    best = f"; best: {clean(rows[-1].best, 28)}" if rows[-1].best else ""
    ax.set_title(f"after round {rows[-1].server_round}{best}")
    ax.legend(loc="lower right")
    return Picture(
        "The family: accuracy by retention ratio",
        render(figure, "family", "Accuracy of every sub-model by retention ratio", f"{len(members)} sub-models."),
        "Every member is cut out of the one global model.",
    )


DRAWINGS = (
    draw_accuracy,
    draw_timeline,
    draw_waiting,
    draw_adaptation,
    draw_widths,
    draw_family,
    draw_exits,
    draw_coverage,
    draw_gates,
    draw_plan,
    draw_ledger,
    draw_labels,
)


def draw_all(log: RunLog) -> dict[str, Picture]:
    """Return every picture the log has rows for, by name (``accuracy``, ``timeline``, ...)."""
    view = View(log)
    with style():
        drawn = {draw.__name__.removeprefix("draw_"): draw(view) for draw in DRAWINGS}
    return {name: picture for name, picture in drawn.items() if picture is not None}
