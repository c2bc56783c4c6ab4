"""The course of a global round: whose turn it is, who may upload, what has come in."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from strategies.split.orchestrator import Orchestrator, choose, num_granted
from strategies.split.replay import Work, mean_losses
from strategies.split.schedule import Stretch, stretch_at
from wire.activations import ActivationError
from wire.flat import Scalar


class Conversation:
    """State of the present round, and the orchestrator's, which outlives it.

    Parameters
    ----------
    exchange : ``segment``, ``exact`` or ``frozen``.
    num_segments : decisions a round of ``segment``.
    max_steps : that one upload can hold.
    selection, eta, gamma : who may upload.
    seed : of choices.

    Attributes
    ----------
    stretch : what clients are asked to do now; None when only gradients are left to deliver.
    granted : who may upload in this segment.
    is_asking_sizes : whether clients are asked for nothing but how many steps they make a round.
    """

    def __init__(
        self, exchange: str, num_segments: int, max_steps: int, selection: str, eta: float, gamma: float, seed: int
    ) -> None:
        self.exchange, self.num_segments, self.max_steps = exchange, num_segments, max_steps
        self.selection, self.eta, self.gamma, self.seed = selection, eta, gamma, seed
        self.orchestrator = Orchestrator()
        self.steps_of: dict[int, int] = {}
        self._losses: dict[int, list[float]] = {}
        self.open((), False)

    def open(self, clients: Sequence[int], is_sequential: bool) -> None:
        """Begin a round with these clients."""
        self.clients, self.is_sequential = list(clients), is_sequential
        self.granted: tuple[int, ...] = ()
        self.stretch: Stretch | None = None
        self.is_asking_sizes = False
        self._cursor = 0
        self._queue: list[int] = []
        self._asked: set[int] = set()
        self._came: set[int] = set()
        self._heard: set[int] = set()
        self._inbox: list[Work] = []

    def close(self) -> list[int]:
        """Everybody once, and that was the round: the local phase."""
        self._asked = set(self.clients)
        return self.clients

    @property
    def num_steps(self) -> int | None:
        """Steps of the client that makes most; None before anybody said."""
        known = [self.steps_of[pid] for pid in self.clients if pid in self.steps_of]
        return max(known) if known and len(known) == len(self.clients) else None

    @property
    def num_answered(self) -> int:
        """Clients heard from in this round."""
        return len(self._heard)

    def next(self, owed: Collection[int] = ()) -> list[int]:
        """Who is asked next; nobody when the round is over. ``owed``: clients for whom a gradient lies ready."""
        if not self._queue:
            self._queue = self._next_stretch(owed)
        self._asked = set(self._queue[:1] if self.is_sequential else self._queue)
        self._came = set()
        self._queue = [pid for pid in self._queue if pid not in self._asked]
        return sorted(self._asked)

    def _next_stretch(self, owed: Collection[int]) -> list[int]:
        needs_sizes = self.exchange == "exact" or (self.exchange == "segment" and self.num_segments > 1)
        unknown = [pid for pid in self.clients if pid not in self.steps_of]
        self.is_asking_sizes = bool(unknown) and needs_sizes
        if self.is_asking_sizes:
            return unknown
        self.stretch = self._stretch()
        if self.stretch is None:
            return [pid for pid in self.clients if pid in owed]
        busy = [pid for pid in self.clients if self.steps_of.get(pid, self.stretch.stop) > self.stretch.start]
        if self.stretch.decides:
            k = num_granted(self.eta, len(self.clients))
            self.orchestrator, self.granted = choose(
                self.selection, self.orchestrator, mean_losses(self._losses), busy, k, self.gamma, self.seed
            )
            self._losses = {}
        self._cursor = self.stretch.stop
        # Frozen uploads begin when the round's training is done: nobody else has anything left to do then.
        is_late = self.exchange == "frozen" and self.stretch.start > 0
        asked = set(busy) & set(self.granted) if is_late else set(busy)
        return sorted((asked | set(owed)) & set(self.clients))

    def _stretch(self) -> Stretch | None:
        if not self.clients:
            return None
        num_steps = self.num_steps
        segments = {"exact": num_steps or 1, "frozen": 1, "segment": self.num_segments}[self.exchange]
        return stretch_at(self._cursor, num_steps, min(segments, num_steps or segments), self.max_steps)

    def is_over(self) -> bool:
        """Whether the stretch just made was the last."""
        return self._stretch() is None

    def is_first(self, pid: int) -> bool:
        """Whether this is the client's first stretch of the round."""
        return self.stretch is not None and self.stretch.start == 0

    def may_upload(self, pid: int) -> bool:
        """Whether the present request of a client is a grant."""
        return self.stretch is not None and not self.is_asking_sizes and pid in self.granted

    def wish(self, pid: int) -> dict[str, Scalar]:
        """What one client is asked to do: its steps, and when its activations are taken."""
        if self.is_asking_sizes:
            return {"start": 0, "stop": 0, "upload": "none"}
        if self.stretch is None:
            return {"start": self.num_steps or 0, "stop": self.num_steps or 0, "upload": "none"}
        is_frozen, may = self.exchange == "frozen", self.may_upload(pid)
        stop = -1 if is_frozen and not may else self.stretch.stop
        return {
            "start": self.stretch.start,
            "stop": stop,
            "upload": ("after" if is_frozen else "before") if may else "none",
        }

    @property
    def num_granted_steps(self) -> int:
        """The most steps that an upload of the present stretch can hold."""
        assert self.stretch is not None
        return self.stretch.stop - self.stretch.start

    def check(self, pid: int, work: Sequence[Work], round_steps: int) -> None:
        """Raise ``ActivationError`` unless an upload holds exactly the steps that were granted.

        How many a client makes is its own word, which it cannot change in the middle of a round.
        """
        assert self.stretch is not None
        said = self.steps_of.get(pid, round_steps)
        if self.stretch.start > 0 and round_steps != said:
            raise ActivationError(f"report: round_steps: got {round_steps}, it was {said} in this round")
        expected = list(range(self.stretch.start, min(self.stretch.stop, round_steps)))
        got = [item.step for item in work]
        if got != expected:
            what = "truncated" if got == expected[: len(got)] else "out of turn"
            raise ActivationError(f"upload: {what}: expected steps {_span(expected)}, got {_span(got)}")

    def answered(self, pid: int, work: Sequence[Work], round_steps: int) -> None:
        """Take one client's checked answer."""
        self._inbox += work
        self._came.add(pid)
        self._heard.add(pid)
        self.steps_of[pid] = round_steps

    def settle(self) -> bool:
        """Leave out who did not answer: its grant has expired. Returns whether a stretch is complete."""
        silent = self._asked - self._came
        self.clients = [pid for pid in self.clients if pid not in silent]
        self.granted = tuple(pid for pid in self.granted if pid not in silent)
        self._queue = [pid for pid in self._queue if pid not in silent]
        return not self._queue and not self.is_asking_sizes and self.stretch is not None

    def take_inbox(self) -> list[Work]:
        """What has come in, once."""
        inbox, self._inbox = self._inbox, []
        return inbox

    def learn(self, losses: dict[int, list[float]]) -> None:
        """Losses for the next decision."""
        for pid, values in losses.items():
            self._losses.setdefault(pid, []).extend(values)

    def export_state(self) -> dict[str, Any]:
        """What outlives a round."""
        return {
            "orchestrator": self.orchestrator.to_json(),
            "steps_of": {str(pid): steps for pid, steps in self.steps_of.items()},
            "losses": {str(pid): values for pid, values in self._losses.items()},
        }

    def import_state(self, raw: dict[str, Any]) -> None:
        """Go on from ``export_state``."""
        self.orchestrator = Orchestrator.from_json(raw["orchestrator"])
        self.steps_of = {int(pid): steps for pid, steps in raw["steps_of"].items()}
        self._losses = {int(pid): list(values) for pid, values in raw["losses"].items()}


def _span(steps: Sequence[int]) -> str:
    is_row = len(steps) > 0 and list(steps) == list(range(steps[0], steps[0] + len(steps)))
    return f"{steps[0]} to {steps[-1]}" if is_row else (", ".join(map(str, steps)) or "none")
