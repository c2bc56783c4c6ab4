"""What all figures share: the run they look at, the order of its clients, axes and ticks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reporting.log import RunLog
from reporting.rows import Arrival
from reporting.style import SPEED, clean
from reporting.summary import ledger
from reporting.units import format_bytes, format_count, format_memory
from reporting.waiting import Closing, Wait, find_waits

MAX_CLIENTS = 40
WIDTH = 10.8  # inches at 72 points: the page scales it to its own width


@dataclass(frozen=True)
class Picture:
    """One figure of a page. ``note`` says what the picture leaves out or how to read it."""

    title: str
    svg: str
    note: str = ""


class View:
    """One run with everything the figures share, computed once."""

    def __init__(self, log: RunLog) -> None:
        """Look at ``log``."""
        self.log = log

    @cached_property
    def waits(self) -> tuple[tuple[Wait, ...], tuple[Closing, ...]]:
        """``find_waits`` of the log."""
        return find_waits(self.log)

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        """``summary.ledger`` of the log, fastest client first."""
        rows = {row["partition_id"]: row for row in ledger(self.log, *self.waits)}
        return [rows[key] for key in self.order]

    @cached_property
    def by_client(self) -> dict[int, list[Arrival]]:
        """Partition -> its arrivals that cost time, in the order of the log."""
        found: dict[int, list[Arrival]] = {client.partition_id: [] for client in self.log.clients}
        for row in self.log.arrivals:
            if row.update_time_s > 0:
                found[row.partition_id].append(row)
        return found

    @cached_property
    def order(self) -> list[int]:
        """All partitions, fastest first; those never asked come last."""
        first = {key: rows[0].update_time_s if rows else float("inf") for key, rows in self.by_client.items()}
        return sorted(first, key=lambda key: (first[key], key))

    @cached_property
    def shown(self) -> list[int]:
        """At most ``MAX_CLIENTS`` partitions, evenly spaced from fastest to slowest, both ends included."""
        if len(self.order) <= MAX_CLIENTS:
            return self.order
        step = (len(self.order) - 1) / (MAX_CLIENTS - 1)
        return [self.order[round(i * step)] for i in range(MAX_CLIENTS)]

    @property
    def note(self) -> str:
        """What to say under a picture that shows ``shown`` only."""
        if len(self.order) <= MAX_CLIENTS:
            return ""
        return f"{MAX_CLIENTS} of {len(self.order)} clients are drawn, evenly spaced from the fastest to the slowest."

    def colour(self, partition_id: int) -> Any:
        """Colour of a client: its place from fastest to slowest."""
        return SPEED(self.order.index(partition_id) / max(1, len(self.order) - 1))


def make_figure(
    num_rows: int,
    num_columns: int,
    height: float,
    sharey: bool = False,
    width_ratios: Sequence[float] | None = None,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.05)  # type: ignore[union-attr,call-arg]
    axes = figure.subplots(
        num_rows, num_columns, sharey=sharey, squeeze=False, width_ratios=width_ratios, height_ratios=height_ratios
    )
    return figure, list(axes.flat)


def set_client_ticks(ax: Axes, places: dict[int, Any], view: View) -> None:
    devices = {client.partition_id: client.device for client in view.log.clients}
    crowded = len(places) > 20
    texts = [
        f"{key} · {clean(devices[key], 22)}" if devices.get(key, "?") != "?" else f"client {key}" for key in places
    ]
    ax.set_yticks(list(places.values()), texts, fontsize=6 if crowded else 7.5)


def set_legend_above(ax: Axes, handle_length: float = 1.8) -> None:
    """Put the legend in one line between title and axes, where no data can lie under it (the title needs pad=20)."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.995),
        ncols=4,
        columnspacing=1.2,
        handlelength=handle_length,
        borderaxespad=0.2,
    )


def format_axis(ax: Axes, which: str, quantity: str, label: str = "") -> None:
    """Give axis ``which`` (x or y) ticks and tick labels for ``quantity``; call it when the data is drawn.

    ``quantity``: count (whole numbers), percent (of shares), seconds, macs, bytes or memory.
    """
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_label_text(label)
    if quantity == "count":
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    elif quantity == "percent":
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g} %"))
    elif quantity == "seconds":
        high = max(ax.get_xlim() if which == "x" else ax.get_ylim())
        unit_s, unit = next((pair for pair in _TIME_UNITS if high >= 3 * pair[0]), _TIME_UNITS[-1])
        axis.set_major_locator(_UnitLocator(unit_s))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit_s:.6g} {unit}" if value else "0"))
    elif quantity == "memory":
        high = max(ax.get_xlim() if which == "x" else ax.get_ylim())
        unit_bytes = next((1024.0**power for power in (4, 3, 2, 1) if high >= 2 * 1024**power), 1.0)
        axis.set_major_locator(_UnitLocator(unit_bytes))
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_memory(value) if value else "0"))
    else:
        show = format_bytes if quantity == "bytes" else format_count
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: show(value) if value else "0"))


_TIME_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))


class _UnitLocator(MaxNLocator):
    """Ticks at round numbers of a unit (minutes, MiB), not of what the data is measured in."""

    def __init__(self, unit: float, nbins: int = 8) -> None:
        super().__init__(nbins=nbins, steps=[1, 2, 2.5, 5, 10])
        self._unit = unit

    def tick_values(self, vmin: float, vmax: float) -> Any:
        ticks: Any = super().tick_values(vmin / self._unit, vmax / self._unit)
        return ticks * self._unit
