"""`flower-supernode` with a polling interval that is a setting, and an answer for every client that dies.

A SuperNode that has nothing to do asks its SuperLink every 3 seconds, and looks for the reply of its own client every
half a second. That is up to 3.5 s of each round trip, as much as a small model takes to train. The module's own clock
is replaced by one whose sleeps are shorter: PRUNUS_POLL_S, seconds.

A client that is killed in the moment between taking its task and taking its message gets no error reply, for the
message was never taken, and the SuperNode waits for one for ever. Here the message counts as taken.

Nothing else is touched. Needs the Flower that Prunus pins.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
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


def answer_for_the_dead(states: Any) -> None:
    """Make a class of node states answer for every client whose lease has run out, whatever it had taken by then."""
    answer = states._on_task_tokens_expired

    def expired(state: Any, tasks: Sequence[Any]) -> None:
        runs = {task.run_id for task in tasks}
        with state.lock_msg_store:
            for entry in state.msg_store.values():
                asked = entry.message.metadata
                if asked.run_id in runs and not asked.reply_to_message_id:
                    entry.is_retrieved = True
        answer(state, tasks)

    states._on_task_tokens_expired = expired


def main() -> None:
    """Run the SuperNode."""
    from flwr.supernode import start_client_internal as loop
    from flwr.supernode.cli import flower_supernode
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

    longest_s = float(os.environ.get("PRUNUS_POLL_S", "0.5"))
    if not 0.01 <= longest_s <= 60:
        raise SystemExit(f"PRUNUS_POLL_S: got {longest_s}, expected seconds in [0.01, 60]")
    if hasattr(loop, "time"):
        loop.time = Clock(longest_s)  # type: ignore[assignment]
    else:
        print("PRUNUS_POLL_S has no effect with this version of Flower", file=sys.stderr)
    answer_for_the_dead(InMemoryNodeState)
    flower_supernode()


if __name__ == "__main__":
    main()
