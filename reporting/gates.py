"""Pictures of dynamic pruning: what gates did, and where they were measured to pay.

Functions of a ``View`` that return a ``Picture``, or None where the log has nothing to show.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from statistics import fmean, median

from matplotlib.axes import Axes

from reporting.rows import Gates
from reporting.style import AMOUNT, BLUE, GREEN, MUTED, ORANGE, PURPLE, SURFACE, clean, hide_grid, render
from reporting.units import format_percent
from reporting.view import Picture, View, format_axis, make_figure, set_legend_above

SHOWN = {
    "entropy": ("entropy of the winners", BLUE),
    "overlap": ("overlap of two classes", ORANGE),
    "agreement": ("agreement with shared winners", GREEN),
    "never_used_ratio": ("units never used", PURPLE),
}
"""Statistic -> its label and colour."""

MAX_LAYERS, MAX_NAMES = 40, 16
"""Layers that are drawn; layers that a sentence names."""


def draw_gates(view: View) -> Picture | None:
    """What gates did over rounds, layer by layer at the end, and how far classes share winners."""
    rows = [row for row in view.log.gates if row.layers]
    if not rows:
        return None
    last = rows[-1]
    has_classes = len(last.overlaps) > 1
    figure, axes = make_figure(1, 3 if has_classes else 2, 3.3, width_ratios=(1, 1.2, 0.9)[: 3 if has_classes else 2])
    _draw_rounds(axes[0], rows)
    _draw_layers(axes[1], last)
    if has_classes:
        _draw_overlaps(axes[2], last)
    notes = [
        "Means over clients. Entropy: of how often each unit wins, as a share of what equal frequencies have. Overlap: "
        "of two classes' winners, 1 where they are the same, blank where no client has both. Agreement: of a sample's "
        "own winners with those that it was given together with others. Never used: won for no sample of a "
        "client in the round."
    ]
    if len(last.layers) > MAX_LAYERS:
        notes.append(f"The first {MAX_LAYERS} of {len(last.layers)} layers are drawn.")
    share = format_percent(_mean(last, "never_used_ratio"))
    return Picture(
        "Gates",
        render(figure, "gates", "What the gates did", f"In the last round {share} of the units won for no sample."),
        " ".join(notes),
    )


def draw_plan(view: View) -> Picture | None:
    """Time of every gated layer whole and gated, as clients measured it: the median over clients."""
    times: dict[str, list[tuple[float, float]]] = {}
    for row in view.log.plans:
        for name, spent in row.layers.items():
            if "dense_s" in spent and "gated_s" in spent:
                times.setdefault(name, []).append((spent["dense_s"], spent["gated_s"]))
    if not times:
        return None
    names = list(times)[:MAX_LAYERS]
    dense, gated = ([median(pair[side] for pair in times[name]) for name in names] for side in (0, 1))
    figure, (ax,) = make_figure(1, 1, 2.8)
    places = range(len(names))
    ax.bar([x - 0.2 for x in places], dense, width=0.38, color=MUTED, label="whole")
    ax.bar([x + 0.2 for x in places], gated, width=0.38, color=GREEN, label="gated, with its predictor")
    _set_layer_ticks(ax, names, 0.0)
    ax.set_title("one training pass of a layer", pad=20)
    format_axis(ax, "y", "seconds")
    set_legend_above(ax)
    hide_grid(ax, "x")
    pays = sum(mine < theirs for mine, theirs in zip(gated, dense, strict=True))
    note = f"Median over clients: gating took less time in {pays} of {len(names)} layers drawn. {_plan(view, times)}"
    return Picture("Where gating pays", render(figure, "plan", "Times of layers whole and gated", note), note)


def _plan(view: View, measured: Collection[str]) -> str:
    """The plan in force at the end: which layers were left dense."""
    plans = [row.dense for row in view.log.gates if row.dense is not None]
    if not plans:  # a log from before plans were written
        return "Where it does not pay, layers are left dense."
    left = plans[-1]
    if not left:
        return "The plan, from all measured clients' times together, gates all of them."
    shown = ", ".join(clean(name, 28) for name in left[:MAX_NAMES])
    more = f" and {len(left) - MAX_NAMES} more" if len(left) > MAX_NAMES else ""
    return (
        f"The plan, from all measured clients' times together, leaves {len(left)} of {len(measured)} layers dense: "
        f"{shown}{more}."
    )


def _draw_rounds(ax: Axes, rows: list[Gates]) -> None:
    xs = [row.server_round for row in rows]
    for name, (label, colour) in SHOWN.items():
        ax.plot(xs, [_mean(row, name) for row in rows], color=colour, label=label, marker="." if len(xs) < 3 else "")
    ax.plot(xs, [row.density for row in rows], color=MUTED, linestyle=(0, (2, 2)), label="density")
    ax.set_title("over rounds, mean over layers")
    ax.set_ylim(0, 1.03)
    format_axis(ax, "x", "count", "round")
    format_axis(ax, "y", "percent")
    ax.legend(fontsize=6.5, loc="best")


def _draw_layers(ax: Axes, row: Gates) -> None:
    names = list(row.layers)[:MAX_LAYERS]
    for name, (_, colour) in SHOWN.items():
        ax.plot(range(len(names)), [row.layers[n].get(name, 0.0) for n in names], ".-", color=colour, linewidth=0.8)
    _set_layer_ticks(ax, names, 0.0)
    ax.set_title(f"layer by layer, round {row.server_round}")
    ax.set_ylim(0, 1.03)
    format_axis(ax, "y", "percent")


def _draw_overlaps(ax: Axes, row: Gates) -> None:
    size = len(row.overlaps)
    table = [[*line[:size], *[-1.0] * (size - len(line))] for line in row.overlaps]
    # A class overlaps with itself wholly: a 0 there is an older log's, in which 0 stood for no client with both.
    is_old = any(table[i][i] == 0 for i in range(size))
    shown = [[float("nan") if value < 0 or (is_old and not value) else value for value in line] for line in table]
    ax.pcolormesh(shown, cmap=AMOUNT, vmin=0, vmax=1, edgecolors=SURFACE, linewidth=0.6)
    ticks = [x + 0.5 for x in range(size)]
    ax.set_xticks(ticks, [str(x) for x in range(size)], fontsize=6.5)
    ax.set_yticks(ticks, [str(x) for x in range(size)], fontsize=6.5)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    hide_grid(ax)
    apart = [shown[a][b] for a in range(size) for b in range(size) if a != b and not math.isnan(shown[a][b])]
    ax.set_title(f"overlap of classes, mean {format_percent(fmean(apart), 0)}" if apart else "overlap of classes")


def _set_layer_ticks(ax: Axes, names: list[str], offset: float) -> None:
    size = 7 if len(names) <= 16 else 5.5
    places = [x + offset for x in range(len(names))]
    ax.set_xticks(places, [clean(name, 28) for name in names], rotation=45, ha="right", fontsize=size)


def _mean(row: Gates, name: str) -> float:
    return fmean(layer.get(name, 0.0) for layer in row.layers.values())
