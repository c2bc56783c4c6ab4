"""Exchange: who was asked what, when the answer arrives, and in which order answers are handed on.

In simulation the order in which the workers of one machine finish means nothing. Time is virtual there: an answer
arrives when the client's device would have delivered it, and the exchange waits for all outstanding answers before it
hands on the earliest. In deployment the clock is the wall. Strategies do not notice the difference.
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from fleet.clock import Duration, DurationModel, VirtualClock
from pruning.spec import SubModelSpec
from strategies.shelf import Shelf
from strategies.travel import TravelModel
from wire.check import MAX_MACS
from wire.message import Failure, Instruction, Report, payload_bytes

logger = logging.getLogger(__name__)

Taken = TypeVar("Taken")


class Transport(Protocol):
    """How instructions reach clients: ``wire.local.LocalTransport`` or ``wire.grid.GridTransport``."""

    @property
    def window(self) -> int:
        """Requests worth having under way at once."""

    def clients(self) -> list[int]:
        """Partition ids that can be addressed."""

    def send(self, instruction: Instruction) -> None:
        """Send one request."""

    def receive(self, timeout_s: float) -> list[Report | Failure]:
        """Return the answers that are ready; wait up to ``timeout_s`` for the first."""

    def empty_trips(self) -> list[tuple[int, float]]:
        """(partition id, seconds) of round trips that carried nothing, since the last call."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: a request under way.

    Attributes
    ----------
    dispatch, partition_id, server_round, global_version : as in the instruction.
    spec : what the client was sent, so that replies carry no masks.
    start_s : when it was sent, on the run's clock.
    download_bytes : of its tensors.
    work_ratio : how much it was to train, as a multiple of the run's local epochs.
    wants_delta : whether it was asked for steps instead of values.
    """

    dispatch: int
    partition_id: int
    server_round: int
    global_version: int
    spec: SubModelSpec
    start_s: float
    download_bytes: int
    work_ratio: float = 1.0
    wants_delta: bool = False


@dataclass(frozen=True)
class Arrival:
    """An answer, with the request it belongs to and the time it took.

    Attributes
    ----------
    entry : the request.
    answer : a ``Report``, or a ``Failure`` with the reason.
    duration : of its parts, in seconds on the run's clock.
    finish_s : when it arrived, on the run's clock.
    overhead_s : what the engine took beside (process start, polling, queues): no property of the device, and no part of
        its update time. 0 in simulation.
    """

    entry: Entry
    answer: Report | Failure
    duration: Duration
    finish_s: float
    overhead_s: float = 0.0


class Exchange:
    """The ledger, the clock and the transport of one run.

    A simulated device that drops out trains, and its answer is lost. Nobody tells the server: it notices when the round
    has a deadline at the deadline, else when the answer would have come.

    Parameters
    ----------
    transport : carries the messages.
    durations : the simulated fleet's; None in deployment, where the wall clock counts.
    now_s, next_dispatch : where a resumed run goes on.
    shelf : where large answers wait that lie in the virtual future; None to keep them in memory.

    Attributes
    ----------
    deadline_s : when the present round closes whoever is missing, on the run's clock; infinite where it waits.
    """

    def __init__(
        self,
        transport: Transport,
        durations: DurationModel | None,
        now_s: float = 0.0,
        next_dispatch: int = 0,
        reply_timeout_s: float = 600.0,
        shelf: Shelf | None = None,
    ) -> None:
        self.shelf = shelf
        self.transport, self.durations, self.reply_timeout_s = transport, durations, reply_timeout_s
        self.next_dispatch = next_dispatch
        self._clock = VirtualClock(now_s)
        self._wall_zero = time.monotonic() - now_s
        self._last_answer = -math.inf
        self._travel = TravelModel()
        self._queue: deque[tuple[Entry, Callable[[], Instruction]]] = deque()
        self._under_way: dict[int, tuple[Entry, float]] = {}
        self._order: OrderedDict[int, None] = OrderedDict()  # not handed on yet, oldest first
        self._ready: dict[int, Arrival] = {}
        self._by_time: list[tuple[float, int]] = []  # heap over _ready
        self._lost: set[int] = set()  # dispatches whose answers will not arrive
        self.deadline_s = math.inf

    @property
    def is_virtual(self) -> bool:
        """Whether time is simulated."""
        return self.durations is not None

    @property
    def now_s(self) -> float:
        """Seconds since the run began, on the run's clock."""
        return self._clock.now_s if self.is_virtual else time.monotonic() - self._wall_zero

    def advance_to(self, time_s: float) -> None:
        """Move the virtual clock on; never back. The wall needs no help."""
        self._clock.advance_to(max(self._clock.now_s, time_s))

    def busy(self) -> set[int]:
        """Partition ids of the clients with a request under way."""
        held = {arrival.entry.partition_id for arrival in self._ready.values()}
        return held | {e.partition_id for e, _ in self._queue} | {e.partition_id for e, _ in self._under_way.values()}

    def versions(self) -> set[int]:
        """Global versions that the requests under way started from."""
        entries = [e for e, _ in self._queue] + [e for e, _ in self._under_way.values()]
        return {e.global_version for e in [*entries, *(arrival.entry for arrival in self._ready.values())]}

    def held(self) -> list[Arrival]:
        """Answers computed but not yet handed on: they lie in the virtual future."""
        self._pump_until_all_ready()
        return [self._ready[dispatch] for dispatch in sorted(self._ready)]

    def hold(self, arrivals: list[Arrival]) -> None:
        """Take over the held answers of an interrupted run."""
        for arrival in arrivals:
            self._order[arrival.entry.dispatch] = None
            self._set_ready(arrival)

    def dispatch(self, make: Callable[[int], Instruction], entry: Callable[[int], Entry]) -> int:
        """Queue one request. ``make`` builds the instruction when a worker is near, so that few exist at a time."""
        number = self.next_dispatch
        self.next_dispatch += 1
        self._queue.append((entry(number), lambda: make(number)))
        self._order[number] = None
        if not self.is_virtual:
            self._fill()
        return number

    def next_in_dispatch_order(self) -> Arrival | None:
        """Hand on the answer to the oldest request: for barriers, where only the latest arrival matters.

        Nothing is held back, so a round's memory does not grow with its clients.
        """
        while self._order:
            oldest = next(iter(self._order))
            if oldest in self._ready:
                return self._hand_on(oldest)
            self._pump()
        return None

    def next_arrival(self, until_s: float = math.inf) -> Arrival | None:
        """Hand on the next answer in order of time; None if none arrives by ``until_s`` or nothing is under way."""
        if self.is_virtual:
            self._pump_until_all_ready()
        else:
            while not self._ready and (self._under_way or self._queue) and self.now_s < until_s:
                self._pump(max(0.0, min(1.0, until_s - self.now_s)))
        while self._by_time and self._by_time[0][1] not in self._ready:
            heapq.heappop(self._by_time)
        if not self._by_time or (self.is_virtual and self._by_time[0][0] > until_s):
            return None
        finish_s, dispatch = heapq.heappop(self._by_time)
        self.advance_to(finish_s)
        return self._hand_on(dispatch)

    def _set_ready(self, arrival: Arrival) -> None:
        self._ready[arrival.entry.dispatch] = arrival
        heapq.heappush(self._by_time, (arrival.finish_s, arrival.entry.dispatch))

    def _hand_on(self, dispatch: int) -> Arrival:
        del self._order[dispatch]
        if not self._order:
            self._by_time.clear()
        return self._ready.pop(dispatch)

    def _pump_until_all_ready(self) -> None:
        while self._queue or self._under_way:
            self._pump()

    def _fill(self) -> None:
        """Send what the window has room for."""
        while self._queue and (not self.is_virtual or len(self._under_way) < self.transport.window):
            entry, make = self._queue.popleft()
            instruction = make()
            entry = replace(entry, download_bytes=payload_bytes(instruction))
            if self.durations is not None and self.durations.drops_out(entry.partition_id, entry.dispatch):
                self._lost.add(entry.dispatch)
            self._under_way[entry.dispatch] = (entry, time.monotonic())
            self.transport.send(instruction)
            if not self.is_virtual:  # a client cannot begin before its request was handed over, after all before it
                self._under_way[entry.dispatch] = (replace(entry, start_s=self.now_s), time.monotonic())

    def _pump(self, timeout_s: float = 1.0) -> None:
        self._fill()
        if not self._under_way:
            return
        for answer in self._receive(timeout_s):
            self._accept(answer)
        while self._under_way:
            entry, sent = next(iter(self._under_way.values()))  # sent first of all
            if not self._is_overdue(sent):
                break
            del self._under_way[entry.dispatch]
            self._settle(entry, Failure(entry.dispatch, entry.partition_id, self._silence()))

    def _receive(self, timeout_s: float) -> list[Report | Failure]:
        answers = self.transport.receive(timeout_s)
        if answers:
            self._last_answer = time.monotonic()
        return answers

    def _silence(self) -> str:
        return f"no answer in {self.reply_timeout_s:g} s"

    def _is_overdue(self, sent: float) -> bool:
        """In simulation requests queue for few workers: one is overdue only when no other was answered meanwhile."""
        since = max(sent, self._last_answer) if self.is_virtual else sent
        return time.monotonic() - since > self.reply_timeout_s

    def ask_aside(self, instructions: Sequence[Instruction], take: Callable[[Report | Failure], Taken]) -> list[Taken]:
        """Ask beside the ledger and the clock (evaluations); returns the answers in the order asked.

        ``take`` is given each answer when it comes, in no order: what it does not return is not held until the last.
        Of whom nothing comes in time it is given a ``Failure``.
        """
        clients = {item.dispatch: item.partition_id for item in instructions}
        waiting, asked, answers = deque(instructions), dict[int, float](), dict[int, Taken]()
        while waiting or asked:
            while waiting and len(asked) + len(self._under_way) < max(self.transport.window, len(self._under_way) + 1):
                asked[waiting[0].dispatch] = time.monotonic()
                self.transport.send(waiting.popleft())
            for answer in self._receive(1.0):
                if answer.dispatch in asked:
                    del asked[answer.dispatch]
                    answers[answer.dispatch] = take(answer)
                else:
                    self._accept(answer)
            for dispatch in [d for d, sent in asked.items() if self._is_overdue(sent)]:
                del asked[dispatch]
                answers[dispatch] = take(Failure(dispatch, clients[dispatch], self._silence()))
        return [answers[item.dispatch] for item in instructions if item.dispatch in answers]

    def _accept(self, answer: Report | Failure) -> None:
        """Match an answer with the ledger; one to a request not under way is unknown or repeated: nobody waits."""
        entry, _ = self._under_way.pop(answer.dispatch, (None, 0.0))
        if entry is None:  # no row: what nobody asked for must not change the log of a run
            words = "an answer of client %d to request %d is left out: nobody waits for it (unknown, repeated or late)"
            logger.warning(words, answer.partition_id, answer.dispatch)
            return
        if entry.partition_id != answer.partition_id:
            answer = Failure(entry.dispatch, entry.partition_id, f"answer signed by client {answer.partition_id}")
        self._settle(entry, answer)

    def _settle(self, entry: Entry, answer: Report | Failure) -> None:
        """Note an answer and when it arrives."""
        upload_bytes = payload_bytes(answer) if isinstance(answer, Report) else 0
        train_macs = answer.train_macs if isinstance(answer, Report) else 0.0
        if not 0 <= train_macs <= MAX_MACS:
            train_macs = 0.0  # the strategy rejects such a report; until then it needs a time
        overhead_s = 0.0
        if self.durations is not None:
            duration = self.durations.duration(
                entry.partition_id, entry.dispatch, train_macs, entry.download_bytes, upload_bytes, entry.start_s
            )
            finish_s = entry.start_s + duration.update_time_s
            if entry.dispatch in self._lost:
                self._lost.remove(entry.dispatch)
                answer = Failure(entry.dispatch, entry.partition_id, "the device dropped out")
                if entry.start_s < self.deadline_s < math.inf:
                    finish_s = self.deadline_s
                    duration = _within(duration, finish_s - entry.start_s)
        else:
            finish_s = self.now_s
            duration, overhead_s = self._measured(entry, answer, upload_bytes, finish_s - entry.start_s)
        if self.shelf is not None:
            answer = self.shelf.put(answer)
        self._set_ready(Arrival(entry, answer, duration, finish_s, overhead_s))

    def _measured(
        self, entry: Entry, answer: Report | Failure, upload_bytes: int, elapsed_s: float
    ) -> tuple[Duration, float]:
        """What the device took, measured by both sides, and what the engine took beside it."""
        for partition_id, travel_s in self.transport.empty_trips():
            self._travel.observe(partition_id, 0, travel_s)
        if not isinstance(answer, Report):
            return Duration(0.0, 0.0, 0.0), elapsed_s
        times_s = (answer.compute_s, answer.busy_s)
        if not all(math.isfinite(seconds) and seconds >= 0 for seconds in times_s):
            times_s = (0.0, 0.0)  # the strategy rejects such a report; until then it needs a time
        compute_s = min(times_s[0], elapsed_s)
        busy_s = min(max(times_s), elapsed_s)  # a client that lies cannot have worked for longer than it was away
        num_bytes = entry.download_bytes + upload_bytes
        self._travel.observe(entry.partition_id, num_bytes, elapsed_s - busy_s)
        transfer_s = min(self._travel.transfer_s(entry.partition_id, num_bytes), elapsed_s - busy_s)
        share = entry.download_bytes / max(1, num_bytes)
        duration = Duration(transfer_s * share, compute_s, transfer_s * (1 - share))
        return duration, elapsed_s - duration.update_time_s


def _within(duration: Duration, seconds: float) -> Duration:
    """What of an update lies within its first ``seconds``."""
    download_s = min(duration.download_s, seconds)
    compute_s = min(duration.compute_s, seconds - download_s)
    return Duration(download_s, compute_s, min(duration.upload_s, seconds - download_s - compute_s))
