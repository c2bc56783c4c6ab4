"""The terminal while a run goes on: one line per round, with a dash for accuracy where it was not evaluated.

::

    round  12/30   accuracy 91.4 %   time 2 min 22 s   real 41.0 s, about 1 min 02 s left   merged 10
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from reporting.units import MISSING, format_percent, format_seconds


class Progress:
    """Prints progress from the same rows that are written to the event log.

    On a terminal the line of the round that goes on is rewritten as replies arrive; into a pipe or a file only finished
    lines are written, without control characters. A stream that fails (closed pipe) silences progress, never the run.
    """

    def __init__(self, num_rounds: int | None = None, stream: TextIO | None = None) -> None:
        """Write to ``stream`` (default: standard error); ``num_rounds`` is taken from the ``run`` row if not given."""
        self._stream = sys.stderr if stream is None else stream
        self._is_tty = bool(getattr(self._stream, "isatty", bool)())
        self._num_rounds = num_rounds
        self._num_merged = self._num_lost = self._num_running = 0
        self._round = 0
        self._printed: tuple[int, str] | None = None
        # the last merge, until its evaluation is here or the next round shows that there is none
        self._merge: Mapping[str, Any] | None = None
        self._line_length = 0
        # (round, wall seconds) at the start, and when the first round was done: the first pays for starting up
        self._anchors: list[tuple[int, float]] = []

    def on_event(self, row: Mapping[str, Any]) -> None:
        """Take one row of the event log, in the order of writing."""
        handler = getattr(self, f"_on_{row.get('event')}", None)
        if handler is not None:
            handler(row)

    def remaining_s(self, server_round: int, wall_s: float) -> float | None:
        """Return the estimated wall time left in seconds; None before anything is known."""
        if self._num_rounds is None or not self._anchors:
            return None
        start_round, start_s = self._anchors[-1] if self._anchors[-1][0] < server_round else self._anchors[0]
        if server_round <= start_round:
            return None
        return (wall_s - start_s) / (server_round - start_round) * max(0, self._num_rounds - server_round)

    def _on_run(self, row: Mapping[str, Any]) -> None:
        config = row.get("config") or {}
        if self._num_rounds is None and isinstance(config.get("num-rounds"), int):
            self._num_rounds = config["num-rounds"]
        self._anchors = []
        self._write_line(
            f"{row.get('strategy', '?')}: {row.get('model', '?')} on {row.get('data', '?')}, "
            f"{row.get('num_clients', '?')} clients, "
            f"{self._num_rounds if self._num_rounds is not None else '?'} rounds"
        )

    def _on_arrival(self, row: Mapping[str, Any]) -> None:
        self._show_merge()
        self._note_round(row)
        if row.get("status") == "merged":
            self._num_merged += 1
        else:
            self._num_lost += 1
        self._num_running += 1
        if self._is_tty:
            self._rewrite(f"round {self._counter(self._round)}   {self._num_running} replies")

    def _on_merge(self, row: Mapping[str, Any]) -> None:
        self._show_merge()
        self._note_round(row)
        self._num_running = 0
        server_round, wall_s = int(row.get("server_round", 0)), _number(row.get("wall_s")) or 0.0
        if len(self._anchors) == 1:
            self._anchors.append((server_round, wall_s))
        self._merge = row

    def _on_evaluation(self, row: Mapping[str, Any]) -> None:
        server_round, where = int(row.get("server_round", 0)), str(row.get("where", "central"))
        if self._merge is not None and int(self._merge.get("server_round", 0)) == server_round:
            self._merge = None
        self._show_merge()
        accuracy, wall_s = format_percent(_number(row.get("accuracy"))), _number(row.get("wall_s")) or 0.0
        if not self._anchors:
            self._anchors.append((server_round, wall_s))
        if self._printed is not None and self._printed[0] == server_round and self._printed[1] != where:
            values = [value for value in map(_number, (row.get("clients") or {}).values()) if value is not None]
            spread = f" ({format_percent(min(values), 0)} to {format_percent(max(values), 0)})" if values else ""
            indent = " " * (6 + len(self._counter(server_round)))
            self._write_line(f"{indent}   {'clients' if where == 'federated' else where} {accuracy}{spread}")
            return
        self._write_round(row, accuracy, where)

    def _on_warning(self, row: Mapping[str, Any]) -> None:
        self._write_line(f"warning: {row.get('message', '')}")

    def _on_resume(self, row: Mapping[str, Any]) -> None:
        self._write_line(str(row.get("message", "")))

    def _on_end(self, row: Mapping[str, Any]) -> None:
        self._show_merge()
        reason = f": {row['reason']}" if row.get("reason") else ""
        self._write_line(
            f"{row.get('status', '?')}{reason} after {row.get('num_rounds', MISSING)} rounds, "
            f"{format_seconds(_number(row.get('time_s')))} on the run's clock, "
            f"{format_seconds(_number(row.get('wall_s')))} of real time"
        )

    def _show_merge(self) -> None:
        """Write the line of a round that was not evaluated."""
        if self._merge is not None:
            row, self._merge = self._merge, None
            self._write_round(row, MISSING, "")

    def _write_round(self, row: Mapping[str, Any], accuracy: str, where: str) -> None:
        server_round, wall_s = int(row.get("server_round", 0)), _number(row.get("wall_s")) or 0.0
        left_s = self.remaining_s(server_round, wall_s)
        left = f", about {format_seconds(left_s)} left" if left_s else ""
        lost = f", lost {self._num_lost}" if self._num_lost else ""
        time = format_seconds(_number(row.get("time_s")))
        self._write_line(
            f"round {self._counter(server_round)}   accuracy {accuracy:>7}   time {time:>12}   "
            f"real {format_seconds(wall_s)}{left}   merged {self._num_merged}{lost}"
        )
        self._printed = (server_round, where)
        self._num_merged = self._num_lost = 0

    def _note_round(self, row: Mapping[str, Any]) -> None:
        server_round = int(row.get("server_round", 0))
        if not self._anchors:  # no evaluation before the first round: count from the first sign of life
            self._anchors.append((server_round - 1, _number(row.get("wall_s")) or 0.0))
        self._round = server_round

    def _counter(self, server_round: int) -> str:
        if self._num_rounds is None:
            return f"{server_round:4d}"
        return f"{server_round:{len(str(self._num_rounds))}d}/{self._num_rounds}"

    def _write_line(self, text: str) -> None:
        self._put(self._erase() + _printable(text) + "\n")
        self._line_length = 0

    def _rewrite(self, text: str) -> None:
        self._put(self._erase() + _printable(text))
        self._line_length = len(text)

    def _erase(self) -> str:
        return "\r" + " " * self._line_length + "\r" if self._line_length else ""

    def _put(self, text: str) -> None:
        try:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):  # a closed pipe, a closed file
            pass


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _printable(text: str) -> str:
    """Keep control characters in a client's message from steering the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)
