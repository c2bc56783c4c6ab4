"""Pictures of time: who waited for whom, and where each client's time went."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from reporting.style import BLUE, MUTED, ORANGE, RED, SKY, WAIT, add_tip, hide_grid, render
from reporting.units import format_percent, format_ratio, format_seconds
from reporting.view import Picture, View, format_axis, make_figure, set_client_ticks, set_legend_above
from reporting.waiting import Closing, Wait

MAX_TIPS = 600
MAX_BINS = 1000  # of the whole run: about the pixels that it is wide
MAX_BOXES = 16_000
PARTS = (("download_s", "download", SKY), ("compute_s", "compute", BLUE), ("upload_s", "upload", ORANGE))


def draw_timeline(view: View) -> Picture | None:
    """Every client and round as bars of download, compute, upload and waiting: all of the run, and its two ends."""
    timed = [w for w in view.waits[0] if w.arrival.start_s is not None and w.arrival.finish_s is not None]
    total_s = view.log.total_time_s
    if not timed or total_s <= 0:
        return None
    closings = view.waits[1]
    num_first = 6 if len(view.shown) <= 20 else 3
    # two windows of equal length: the same span of time holds more rounds where less is waited
    span_s = closings[num_first - 1].merge.time_s if len(closings) > 2 * num_first else total_s
    span_s = total_s if span_s > 0.5 * total_s else span_s
    is_enlarged = span_s < total_s
    windows = [(0.0, total_s), (0.0, span_s), (total_s - span_s, total_s)] if is_enlarged else [(0.0, total_s)]
    names = ["the whole run", "enlarged, the beginning", "enlarged, the end"]
    rows = {key: len(view.shown) - 1 - index for index, key in enumerate(view.shown)}
    drawn = [w for w in timed if w.arrival.partition_id in rows]
    height = max(1.5, 0.19 * len(rows)) if len(rows) > 20 else max(1.3, 0.26 * len(rows))
    heights = [(0.7 if is_enlarged and not index else 1) * height + 0.62 for index in range(len(windows))]
    figure, axes = make_figure(len(windows), 1, sum(heights) + 0.25, height_ratios=heights)
    for index, (ax, (left, right)) in enumerate(zip(axes, windows, strict=True)):
        if is_enlarged and index == 0:
            draw_whole(ax, drawn, rows, [c.merge.time_s for c in closings], total_s)
        else:
            _draw_bars(ax, [w for w in drawn if _end_s(w) > left and (w.arrival.start_s or 0.0) < right], rows)
        inside = [c for c in closings if left - 1e-9 <= c.merge.time_s <= right * (1 + 1e-9)]
        _draw_closings(ax, inside, rows, with_tips=index == 0)
        num_closed = sum(left < c.merge.time_s for c in inside)
        ax.set_title(f"{names[index]}: {num_closed} merges in {format_seconds(right - left)}")
        ax.set_xlim(left, right)
        ax.set_ylim(-0.7, len(rows) - 0.3)
        set_client_ticks(ax, rows, view)
        hide_grid(ax)
        format_axis(ax, "x", "seconds")
    axes[-1].set_xlabel("time on the run's clock")
    _set_legend(figure, axes[0], with_lost=any(w.arrival.status != "merged" for w in timed))
    share = sum(w.wait_s for w in timed) / max(1e-12, sum(w.wait_s + w.arrival.update_time_s for w in timed))
    note = "Vertical lines are merges. "
    if is_enlarged:
        note += (
            "The first panel is the whole run, with what took longest at each of its points; the two below enlarge its "
            "beginning and its end, both over the same length of time. "
        )
    return Picture(
        "Timeline: who waited for whom",
        render(
            figure,
            "timeline",
            "Timeline of every client",
            f"Waiting took {format_percent(share)} of the clients' time.",
        ),
        f"{note}{view.note} Rest the pointer on a bar or a diamond for its figures.".strip(),
    )


def _set_legend(figure: Figure, ax: Axes, with_lost: bool) -> None:
    colours = (*(colour for _, _, colour in PARTS), WAIT)
    handles: list[Artist] = [PolyCollection([], facecolor=colour) for colour in colours]
    names = [*(name for _, name, _ in PARTS), "waiting for the round to close"]
    handles.append(ax.plot([], [], "D", color=RED, markersize=3.6, linestyle="none")[0])
    names.append("last to arrive (the others waited for this one)")
    if with_lost:
        handles.append(ax.plot([], [], color=RED, linewidth=1.4)[0])
        names.append("reply lost")
    figure.legend(handles, names, loc="outside upper right", ncols=6, columnspacing=1.3, handlelength=1.2)


def _end_s(wait: Wait) -> float:
    return (wait.arrival.finish_s or 0.0) + wait.wait_s


def draw_whole(
    ax: Axes, waits: Sequence[Wait], rows: dict[int, int], merge_times_s: Sequence[float], total_s: float
) -> None:
    """Draw every client's whole time in bins, each with what took most of it: as many boxes for any length of run."""
    edges = _edges(merge_times_s, total_s, max(100, min(MAX_BINS, MAX_BOXES // len(rows))))
    widths = np.diff(edges)
    boxes: dict[str, list[list[tuple[float, float]]]] = {colour: [] for colour in (SKY, BLUE, ORANGE, WAIT, RED)}
    spans: dict[int, dict[str, list[tuple[float, float]]]] = {key: {c: [] for c in boxes} for key in rows}
    for wait in waits:
        own, left = spans[wait.arrival.partition_id], wait.arrival.start_s or 0.0
        for name, _, colour in PARTS:
            right = left + getattr(wait.arrival, name)
            own[colour if wait.arrival.status == "merged" else RED].append((left, right))
            left = right
        own[WAIT].append((wait.arrival.finish_s or left, _end_s(wait)))
    for key, own in spans.items():
        seconds = np.stack([_seconds_in(edges, own[colour]) for colour in boxes])
        most = np.where(seconds.max(axis=0) > 0.02 * widths, seconds.argmax(axis=0), -1)
        changes = [0, *(np.flatnonzero(np.diff(most)) + 1).tolist(), len(most)]
        for first, end in pairwise(changes):
            if most[first] >= 0:
                colour = list(boxes)[most[first]]
                half = 0.2 if colour == WAIT else 0.36
                boxes[colour].append(_box(float(edges[first]), float(edges[end]), rows[key], half))
    _add_boxes(ax, boxes)


def _edges(merge_times_s: Sequence[float], total_s: float, num_bins: int) -> NDArray[np.float64]:
    """Edges of about ``num_bins`` bins that begin anew at merges, so that rounds which are alike look alike."""
    step_s, fixed = total_s / num_bins, [0.0]
    for time_s in sorted(merge_times_s):
        if fixed[-1] + step_s <= time_s <= total_s - step_s:
            fixed.append(time_s)
    fixed.append(total_s)
    parts = [np.linspace(a, b, max(1, round((b - a) / step_s)), endpoint=False) for a, b in pairwise(fixed)]
    return np.concatenate([*parts, [total_s]])


def _seconds_in(edges: NDArray[np.float64], spans: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """Seconds of ``spans`` (start, end), which may overlap, within each bin; [number of edges - 1]."""

    def since(times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum over ``times`` of the seconds from each to every edge."""
        count = np.searchsorted(times, edges)
        before: NDArray[np.float64] = np.concatenate([[0.0], np.cumsum(times)])[count]
        return count * edges - before

    table = np.array(spans, np.float64).reshape(-1, 2)
    found: NDArray[np.float64] = np.diff(since(np.sort(table[:, 0])) - since(np.sort(table[:, 1])))
    return found


def _draw_bars(ax: Axes, waits: Sequence[Wait], rows: dict[int, int]) -> None:
    boxes: dict[str, list[list[tuple[float, float]]]] = {colour: [] for colour in (SKY, BLUE, ORANGE, WAIT)}
    lost: list[list[tuple[float, float]]] = []
    for index, wait in enumerate(waits):
        arrival, y = wait.arrival, rows[wait.arrival.partition_id]
        left = arrival.start_s or 0.0
        for name, _, colour in PARTS:
            right = left + getattr(arrival, name)
            box = _box(left, right, y, 0.36)
            # one artist per bar carries its tip; a page with thousands of them would be slow to open
            if colour == BLUE and index < MAX_TIPS and right > left:
                patch = PolyCollection([box], facecolor=BLUE)
                add_tip(patch, _tip(wait))
                patch.set_in_layout(False)
                ax.add_collection(patch, autolim=False)
            else:
                boxes[colour].append(box)
            left = right
        finish_s = arrival.finish_s or left
        boxes[WAIT].append(_box(finish_s, finish_s + wait.wait_s, y, 0.2))
        if arrival.status != "merged":
            lost.append([(arrival.start_s or 0.0, y), (finish_s, y)])
    _add_boxes(ax, boxes)
    if lost:
        ax.add_collection(LineCollection(lost, colors=RED, linewidths=1.4, zorder=4))


def _add_boxes(ax: Axes, boxes: dict[str, list[list[tuple[float, float]]]]) -> None:
    for colour, corners in boxes.items():
        if corners:  # one path for all bars of a colour: a tenth of the bytes of one path each
            path = Path([*chain.from_iterable([*box, box[0]] for box in corners)], _BOX_CODES * len(corners))
            ax.add_patch(PathPatch(path, facecolor=colour, zorder=1 if colour == WAIT else 2))


def _draw_closings(ax: Axes, closings: Sequence[Closing], rows: dict[int, int], with_tips: bool) -> None:
    if not closings:
        return
    many = len(closings) > 60
    ends = [[(closing.merge.time_s, -0.7), (closing.merge.time_s, len(rows) - 0.3)] for closing in closings]
    path = Path([*chain.from_iterable(ends)], [Path.MOVETO, Path.LINETO] * len(ends))
    lines = PathPatch(path, facecolor="none", edgecolor=MUTED, linewidth=0.3 if many else 0.6, zorder=0.5)
    ax.add_patch(lines)
    for index, closing in enumerate(c for c in closings if c.straggler in rows):
        place = closing.merge.time_s, rows[closing.straggler or 0]
        (mark,) = ax.plot(*place, "D", color=RED, markersize=2.0 if many else 3.6, zorder=5)
        if with_tips and index < MAX_TIPS:
            add_tip(mark, _closing_tip(closing))


def _closing_tip(closing: Closing) -> str:
    return (
        f"merge of round {closing.merge.server_round} at {format_seconds(closing.merge.time_s)}, closed by client "
        f"{closing.straggler}, {format_seconds(closing.held_up_s)} after the one before it"
    )


def _tip(wait: Wait) -> str:
    row = wait.arrival
    words = [f"client {row.partition_id}, round {row.server_round}: {row.status}"]
    words += [f"{name} {format_seconds(getattr(row, key))}" for key, name, _ in PARTS]
    if wait.straggler is not None:
        words.append(f"then waited {format_seconds(wait.wait_s)} for client {wait.straggler}")
    if row.retention_ratio is not None:
        words.append(f"retention ratio {format_ratio(row.retention_ratio)}")
    return ", ".join(words)


def draw_waiting(view: View) -> Picture | None:
    """Seconds of every client by what they went into, and round time with its waiting share over rounds."""
    closings = view.waits[1]
    if not closings:
        return None
    rows = [row for row in view.ledger if row["partition_id"] in set(view.shown)]
    figure, axes = make_figure(1, 2, max(2.8, min(6.5, 0.22 * len(rows) + 0.9)), width_ratios=(1.35, 1))
    left = [0.0] * len(rows)
    for key, name, colour in (*PARTS, ("wait_s", "waiting", WAIT)):
        values = [row[key] for row in rows]
        axes[0].barh(range(len(rows)), values, left=left, color=colour, height=0.72, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    set_client_ticks(axes[0], {row["partition_id"]: index for index, row in enumerate(rows)}, view)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    axes[0].set_title("where each client's time went", pad=20)
    set_legend_above(axes[0], 1.0)
    hide_grid(axes[0], "y")
    format_axis(axes[0], "x", "seconds")
    rounds = [closing.merge.server_round for closing in closings]
    axes[1].plot(rounds, [closing.wait_ratio for closing in closings], color=RED)
    axes[1].set_title("share of the participants' time spent waiting", pad=20)
    axes[1].set_ylim(0, max(0.05, *(closing.wait_ratio for closing in closings)) * 1.12)
    format_axis(axes[1], "y", "percent")
    format_axis(axes[1], "x", "count", "round")
    return Picture(
        "Time per client",
        render(
            figure,
            "waiting",
            "Where the clients' time went",
            "Stacked seconds of download, compute, upload and waiting per client.",
        ),
        view.note,
    )


_BOX_CODES = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]


def _box(left: float, right: float, y: float, half: float) -> list[tuple[float, float]]:
    return [(left, y - half), (right, y - half), (right, y + half), (left, y + half)]
