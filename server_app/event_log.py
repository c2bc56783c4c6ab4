"""The event log: one JSON object a line, appended and flushed as things happen."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any


def as_json(row: dict[str, Any]) -> str:
    """One line of JSON; NaN and infinity, which JSON has no words for, become null (a diverged model's loss)."""
    try:
        return json.dumps(row, allow_nan=False, default=float)
    except ValueError:
        plain = json.loads(json.dumps(row, default=float), parse_constant=lambda name: None)
        return json.dumps(plain, allow_nan=False)


@contextmanager
def kept_messages(name: str) -> Iterator[list[str]]:
    """What the package ``name`` warns of meanwhile."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


class EventLog:
    """Writes rows; the only interface between running and reporting.

    Parameters
    ----------
    path : JSONL file, appended to.
    echo : also receives every row (the terminal's progress).
    num_rows, time_s, server_round : rows that a resumed log already has, and where on the run's clock and in which
        round it is.
    """

    def __init__(
        self,
        path: Path,
        echo: Callable[[dict[str, Any]], None] = lambda row: None,
        num_rows: int = 0,
        time_s: float = 0.0,
        server_round: int = 0,
    ) -> None:
        self.num_rows, self.time_s, self.server_round = num_rows, time_s, server_round
        self._echo = echo
        self._began = time.monotonic()
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, with the wall time since the run began in seconds."""
        row = {"event": row["event"], "wall_s": round(time.monotonic() - self._began, 6), **row}
        self._file.write(as_json(row) + "\n")
        self._file.flush()
        self.num_rows += 1
        self.time_s = row.get("time_s", self.time_s)
        if row["event"] in ("merge", "evaluation"):  # what a round ends with
            self.server_round = max(self.server_round, row["server_round"])
        self._echo(row)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
