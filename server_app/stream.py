"""What a person sees of a run's log on Flower's engine."""

from __future__ import annotations

import re


class StreamFilter:
    """Keeps of a run's log what a person wants to see: the app's own lines and warnings, not the engine's."""

    _COLOUR = re.compile(r"\x1b\[[0-9;]*m")
    _FLOWER_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR) ?:\s*")
    _ENGINE = re.compile(
        r"^\((ClientAppActor|raylet|autoscaler|gcs_server|pid=)|^Using SuperLink|^Successfully (started|installed)"
        r"|^Starting (logstream|Flower Simulation)|^Federation `|^To change federation size"
        r"|^flwr federation simulation-config|^Since flwr 1\.32|Started a local Ray instance|ray/_private/"
        r"|^\s*warnings\.warn\(|^\[?\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+[ \]].*(raylet|ray|core_worker)"
    )

    def __init__(self) -> None:
        self._is_failing = False
        self._is_in_traceback = False  # left to the log as well; the line with the error itself is shown

    def keep(self, line: str) -> str | None:
        """The line to show, or None."""
        text = self._COLOUR.sub("", line).rstrip()
        level = self._FLOWER_LEVEL.match(text)
        message = text[level.end() :] if level else text
        if message.startswith("Simulation raised an exception"):
            self._is_failing = True  # a traceback through the engine follows: the reason is reported at the end
        if message.startswith("Traceback (most recent call last)"):
            self._is_in_traceback = True
        elif message and not message.startswith(" "):
            self._is_in_traceback = False
        if self._is_failing or self._is_in_traceback or not message or self._ENGINE.search(message.lstrip()):
            return None
        is_alarm = level is not None and level[1] in ("WARNING", "ERROR")
        return f"{level[1].lower()}: {message}" if is_alarm and level is not None else message
