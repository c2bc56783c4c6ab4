"""Which of a client's memories a run may have to go back to: those that belong to the checkpoints that are kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from strategies.exchange import Arrival


class KeptDispatches:
    """For each of the newest checkpoints, the requests that a run that goes on from it may say to continue from.

    Parameters
    ----------
    num_checkpoints : that are kept.
    """

    def __init__(self, num_checkpoints: int) -> None:
        self._checkpoints: deque[dict[int, set[int]]] = deque(maxlen=num_checkpoints)

    def note(self, last_dispatch: Mapping[int, int], held: Iterable[Arrival]) -> None:
        """A checkpoint is written; answers that it holds are merged later, and continued from then."""
        kept = {partition_id: {dispatch} for partition_id, dispatch in last_dispatch.items()}
        for arrival in held:
            kept.setdefault(arrival.entry.partition_id, set()).add(arrival.entry.dispatch)
        self._checkpoints.append(kept)

    def of(self, partition_id: int) -> tuple[int, ...]:
        """One client's, in ascending order."""
        return tuple(sorted({d for kept in self._checkpoints for d in kept.get(partition_id, ())}))
