"""Pictures of who holds what: widths and coverage of the model, labels of the data.

Functions of a ``View`` that return a ``Picture``, or None where the log has nothing to show.
"""

from __future__ import annotations

from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reporting.rows import Merge
from reporting.style import AMOUNT, BLUE, GREEN, INK, MUTED, SKY, SURFACE, clean, hide_grid, render
from reporting.summary import coverage_gaps
from reporting.units import format_percent
from reporting.view import Picture, View, format_axis, make_figure, set_client_ticks, set_legend_above


def draw_widths(view: View) -> Picture | None:
    """Units that each client keeps of each group at its last arrival, as a heat map."""
    last = {key: rows[-1].widths for key, rows in view.by_client.items() if rows}
    full: dict[str, int] = {}
    for row in view.log.arrivals:
        for name, kept in row.widths.items():
            full[name] = max(full.get(name, 0), kept)
    keys = [key for key in view.shown if key in last]
    if not keys or not full:
        return None
    # a group that a reply does not name is whole, and then the log need not hold its size anywhere
    has_whole = any(name not in last[key] for key in keys for name in full)
    names = _spread(list(full), 60)
    shares = [[last[key].get(name, full[name]) / max(1, full[name]) for name in names] for key in keys]
    cell = 0.24 if len(keys) <= 20 else 0.18
    figure, (ax,) = make_figure(1, 1, cell * len(keys) + (1.75 if len(names) > 8 else 1.35))
    mesh = ax.pcolormesh(shares, cmap=AMOUNT, vmin=0, vmax=1, edgecolors=SURFACE, linewidth=1.0)
    if len(names) <= 24:
        size = 7 if len(names) <= 16 else 6
        for y, key in enumerate(keys):
            for x, name in enumerate(names):
                _cell_text(ax, x + 0.5, y + 0.5, last[key].get(name, "all"), shares[y][x] > 0.55, size)
    set_client_ticks(ax, {key: y + 0.5 for y, key in enumerate(keys)}, view)
    ax.invert_yaxis()
    _set_group_ticks(ax, names)
    hide_grid(ax)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=ax, fraction=0.03, pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * 100:.0f} %"))
    least = format_percent(min((share for row in shares for share in row if share), default=0.0))
    notes = ["Numbers are kept units, at each client's last reply."]
    notes += ["0: in blocks that the client does not hold."] if any(0 in row for row in shares) else []
    notes += ['Groups that a reply does not name are kept whole ("all").'] if has_whole else []
    notes += ["Colour is the share of the widest number in the log.", view.note]
    notes += [f"{len(names)} of {len(full)} groups are drawn."] if len(names) < len(full) else []
    return Picture(
        "Widths at the end",
        render(
            figure, "widths", "Kept units per group and client", f"The narrowest cell keeps {least} of the widest seen."
        ),
        " ".join(note for note in notes if note),
    )


def _spread(names: list[str], most: int) -> list[str]:
    """At most ``most`` of the names, evenly spread, first and last among them."""
    if len(names) <= most:
        return names
    step = (len(names) - 1) / (most - 1)
    return [names[round(i * step)] for i in range(most)]


def _set_group_ticks(ax: Axes, names: list[str]) -> None:
    short = len(names) <= 8
    ax.set_xticks(
        [x + 0.5 for x in range(len(names))],
        [clean(name, 28) for name in names],
        rotation=0 if short else 40,
        ha="center" if short else "right",
        rotation_mode="anchor",
        fontsize=7 if len(names) <= 30 else 5.5,
    )
    ax.tick_params(axis="x", length=0)


def draw_coverage(view: View) -> Picture | None:
    """How well every part of the model was trained: N*, uncovered share and the least covered groups."""
    merges = view.log.merges
    stars = [(row.global_version, row.n_star) for row in merges if row.n_star is not None]
    means: dict[str, list[float]] = {}
    for row in merges:
        for name, share in row.coverage.items():
            means.setdefault(name, []).append(share)
    if not stars and not means:
        return None
    figure, axes = make_figure(1, 2, 3.1, width_ratios=(1, 1.1))
    if stars:
        axes[0].plot(
            *zip(*stars, strict=True),
            color=BLUE,
            drawstyle="steps-post",
            label="N*: holders of the least-trained entry",
        )
    merged = [(row.global_version, row.num_merged) for row in merges]
    axes[0].plot(*zip(*merged, strict=True), color=MUTED, linewidth=1.0, drawstyle="steps-post", label="replies merged")
    axes[0].set_title("clients behind every merge", pad=20)
    axes[0].set_ylim(bottom=0, top=max(n for _, n in merged) * 1.12 + 0.5)
    format_axis(axes[0], "x", "count", "global version")
    format_axis(axes[0], "y", "count")
    uncovered = [(row.global_version, row.uncovered_ratio) for row in merges if row.uncovered_ratio is not None]
    set_legend_above(axes[0])
    # the parts of one layer mostly share their history: one bar for all that do
    alike: dict[tuple[float, ...], list[str]] = {}
    for name, shares in means.items():
        alike.setdefault(tuple(round(share, 9) for share in shares), []).append(name)
    parts = {names[0] + (f" +{len(names) - 1}" if names[1:] else ""): list(key) for key, names in alike.items()}
    worst = sorted(parts, key=lambda name: (fmean(parts[name]), name))[:12]
    axes[1].barh(
        range(len(worst)), [fmean(parts[name]) for name in worst], color=SKY, height=0.6, label="mean over the run"
    )
    axes[1].plot(
        [parts[name][-1] for name in worst], range(len(worst)), "D", color=INK, markersize=3.6, label="last merge"
    )
    axes[1].set_yticks(range(len(worst)), [clean(name, 34) for name in worst])
    axes[1].invert_yaxis()
    axes[1].set_xlim(0, 1.02)
    axes[1].set_title("least-trained parts: mean share of clients that hold them", pad=20)
    set_legend_above(axes[1], 1.2)
    hide_grid(axes[1], "y")
    format_axis(axes[1], "x", "percent")
    most = max((share for _, share in uncovered), default=0.0)
    note = f"At most {format_percent(most, 2)} of the entries were held by nobody in one merge; they kept their value."
    if not most:
        note = "Every entry was held by somebody in every merge." if uncovered else ""
    note += _evenness(merges[-1])
    if len(parts) < len(means):
        note += " +N stands for N more parts with the same figures."
    if len(worst) < len(parts):
        note += f" The {len(worst)} least covered of {len(parts)} are drawn."
    return Picture(
        "Coverage",
        render(figure, "coverage", "Coverage of the model", "N* per merge and the least covered groups."),
        note.strip(),
    )


def _evenness(row: Merge) -> str:
    """Whether all entries of a tensor were covered alike in all merges so far."""
    gaps = coverage_gaps(row)
    if not gaps:
        return ""
    key, least, gap = gaps[0]
    if gap < 1e-6:
        return " To date every entry was held as often as any other of its tensor."
    most = format_percent(least + gap)
    span = f"{format_percent(least)} to {most}"
    return f" To date the entries of {clean(key, 40)} differ most: {span} of all answers held them."


def draw_labels(view: View) -> Picture | None:
    """Examples of each label at each client, as a heat map."""
    clients = {client.partition_id: client for client in view.log.clients if client.label_counts}
    keys = [key for key in view.shown if key in clients]
    if not keys:
        return None
    num_labels = max(len(clients[key].label_counts) for key in keys)
    counts = [[*clients[key].label_counts, *[0] * (num_labels - len(clients[key].label_counts))] for key in keys]
    cell = 0.24 if len(keys) <= 20 else 0.18
    figure, axes = make_figure(1, 2, cell * len(keys) + 0.95, sharey=True, width_ratios=(4, 1))
    many = num_labels > 40
    axes[0].pcolormesh(
        counts, cmap=AMOUNT, vmin=0, edgecolors="face" if many else SURFACE, linewidth=0.0 if many else 1.0
    )
    if num_labels <= 20:
        top = max(1, *(max(row) for row in counts))
        for y, row in enumerate(counts):
            for x, count in enumerate(row):
                if count:
                    _cell_text(axes[0], x + 0.5, y + 0.5, count, count / top > 0.55)
        axes[0].set_xticks([x + 0.5 for x in range(num_labels)], [str(x) for x in range(num_labels)])
    axes[0].tick_params(axis="x", length=0)
    axes[0].set_title("examples of each label")
    axes[0].set_xlabel("label")
    axes[0].spines[:].set_visible(False)
    hide_grid(axes[0])
    places = [y + 0.5 for y in range(len(keys))]
    axes[1].barh(places, [clients[key].num_examples for key in keys], color=GREEN, height=0.7)
    axes[1].set_title("examples")
    axes[1].xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    hide_grid(axes[1], "y")
    set_client_ticks(axes[0], dict(zip(keys, places, strict=True)), view)
    axes[0].invert_yaxis()
    return Picture(
        "Label distribution",
        render(figure, "labels", "Label distribution", f"Examples of {num_labels} labels at {len(keys)} clients."),
        view.note,
    )


def _cell_text(ax: Axes, x: float, y: float, count: int | str, on_dark: bool, size: float = 7.0) -> None:
    text = ax.text(x, y, str(count), ha="center", va="center", fontsize=size, color="#fdfdfb" if on_dark else "#20242a")
    # hundreds of them lie inside the axes anyway, and measuring each is slow
    text.set_in_layout(False)
