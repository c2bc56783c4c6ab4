"""`flower-supernode` with a polling interval that is a setting: PRUNUS_POLL_S, seconds.

A SuperNode that has nothing to do asks its SuperLink every 3 seconds, and looks for the reply of its own client every
half a second. That is up to 3.5 s of each round trip, as much as a small model takes to train. The module's own clock
is replaced by one whose sleeps are shorter; nothing else is touched. Needs the Flower that Prunus pins.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any


class Clock:
    """The module ``time`` with sleeps of at most ``longest_s``."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep, but not for long."""
        time.sleep(min(seconds, self._longest_s))


def main() -> None:
    """Run the SuperNode."""
    from flwr.supernode import start_client_internal as loop
    from flwr.supernode.cli import flower_supernode

    longest_s = float(os.environ.get("PRUNUS_POLL_S", "0.5"))
    if not 0.01 <= longest_s <= 60:
        raise SystemExit(f"PRUNUS_POLL_S: got {longest_s}, expected seconds in [0.01, 60]")
    if hasattr(loop, "time"):
        loop.time = Clock(longest_s)  # type: ignore[assignment]
    else:
        print("PRUNUS_POLL_S has no effect with this version of Flower", file=sys.stderr)
    flower_supernode()


if __name__ == "__main__":
    main()
