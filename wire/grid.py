"""GridTransport: instructions and reports as Flower messages, over the simulation or the deployment engine."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from pruning.spec import FULL
from wire.check import LIMITS, MAX_METRICS, MAX_NAME, Limits, WireError, check_head, to_tensor
from wire.flat import from_flat, to_flat
from wire.message import Failure, Instruction, Job, Report
from wire.pack import Index, pack, unpack
from wire.roster import HEAD, Roster, push
from wire.spec import spec_from_json, spec_to_json

STATE, COMPANIONS, METRICS = "state", "companions", "metrics"
BLOCK, INDEX = "block", "index"
DAY_S = 86_400.0
PATIENCE = 0.03
"""Part of the time since the last message that the next wait takes: asking for answers is work for the SuperLink."""
MAX_POLL_S = 1.0


class NoClientsError(RuntimeError):
    """The expected clients did not connect in time."""


# --- records --------------------------------------------------------------------------------------------------------


def instruction_to_record(instruction: Instruction) -> RecordDict:
    """Instruction -> Flower records: the tensors, and everything else as one JSON head."""
    head = _plain(instruction, {"state", "companions", "job", "spec", "settings"})
    head |= {
        "job": to_flat(instruction.job),
        "spec": spec_to_json(instruction.spec),
        "settings": dict(instruction.settings),
    }
    return _record(instruction, head)


def record_to_instruction(record: RecordDict) -> Instruction:
    """Flower records -> instruction."""
    head = _head(record)
    tensors = _tensors(record, head.pop(INDEX))
    job = from_flat(Job, head.pop("job"))
    spec = spec_from_json(head.pop("spec")) or FULL
    head["kept_dispatches"] = tuple(head["kept_dispatches"])
    return Instruction(**head, job=job, spec=spec, **tensors)


def report_to_record(report: Report) -> RecordDict:
    """Report -> Flower records; ``metrics`` also as a MetricRecord, where Flower's own tools look."""
    head = _plain(report, {"state", "companions", "narrowed", "metrics"}) | {"narrowed": spec_to_json(report.narrowed)}
    record = _record(report, head)
    record[METRICS] = MetricRecord(
        {"num-examples": report.num_examples, **{k: float(v) for k, v in report.metrics.items()}}
    )
    return record


def record_to_report(record: RecordDict, limits: Limits = LIMITS) -> Report:
    """Flower records -> report, which anybody may have written.

    Raises
    ------
    WireError
        If it is larger than ``limits`` allow, or a field is missing, unknown or of another type.
    """
    check_size(record, limits)
    head = _head(record)
    index = head.pop(INDEX)
    num_tensors = sum(len(items) for items in index.values() if isinstance(items, list))
    if num_tensors > limits.max_reply_tensors:
        raise WireError(f"message: {num_tensors} tensors, at most {limits.max_reply_tensors} allowed")
    head = check_head(head)
    metrics = {k: float(v) for k, v in record[METRICS].items() if k != "num-examples" and isinstance(v, int | float)}
    return Report(**(head | {"narrowed": spec_from_json(head["narrowed"])}), metrics=metrics, **_tensors(record, index))


def check_size(record: RecordDict, limits: Limits) -> None:
    """Raise ``WireError`` unless a message keeps within ``limits``; nothing is decoded."""
    blocks = [_block(record, name) for name in (STATE, COMPANIONS) if name in record]
    found = {
        "bytes of tensors": (sum(map(len, blocks)), limits.max_reply_bytes),
        "characters of text": (len(str(record[HEAD]["json"])), limits.max_reply_text),
        "metrics": (len(record[METRICS]), MAX_METRICS),
        "characters in the name of a metric": (max((len(name) for name in record[METRICS]), default=0), MAX_NAME),
    }
    for what, (number, bound) in found.items():
        if number > bound:
            raise WireError(f"message: {number} {what}, at most {bound} allowed")


def _plain(value: Any, without: set[str]) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value) if field.name not in without}


def _record(message: Instruction | Report, head: Mapping[str, Any]) -> RecordDict:
    index: dict[str, Index] = {}
    records: dict[str, ArrayRecord] = {}
    for name in (STATE, COMPANIONS):
        tensors = getattr(message, name)
        if tensors:
            block, index[name] = pack(tensors)
            records[name] = ArrayRecord({BLOCK: Array(block)})
    return RecordDict({**records, HEAD: ConfigRecord({"json": json.dumps({**head, INDEX: index})})})


def _head(record: RecordDict) -> dict[str, Any]:
    head: dict[str, Any] = json.loads(str(record[HEAD]["json"]))
    if not isinstance(head, dict) or not isinstance(head.get(INDEX), dict):
        raise WireError("message: its head is no table with an index of its tensors")
    return head


def _tensors(record: RecordDict, index: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a message by field name."""
    return {
        name: unpack(to_tensor(_block(record, name)), index[name]) if name in index else {}
        for name in (STATE, COMPANIONS)
    }


def _block(record: RecordDict, name: str) -> bytes:
    arrays = record.get(name)
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [BLOCK]:
        raise WireError(f"message: {name!r} is not one block of bytes")
    return arrays[BLOCK].data


# --- transport ------------------------------------------------------------------------------------------------------


class GridTransport:
    """Speaks to the clients of a Flower grid by partition id.

    Parameters
    ----------
    grid : Flower's grid.
    num_clients : partition ids are 0 to num_clients - 1.
    window : requests worth having under way at once.
    time_to_live_s : of a message, its time in queues included: it must be longer than the slowest client's turn.
    poll_s : shortest wait between two looks for answers.
    join_timeout_s : give up when no further client has connected for so long; also how long a run whose clients are
        all gone waits for one before a round passes without an answer.
    min_clients : clients to wait for before the first instruction; 0 for all.
    limits : of answers.
    num_probes : round trips that carry nothing, made with every client that connects, to know the engine's overhead.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        window: int = 16,
        time_to_live_s: float = DAY_S,
        join_timeout_s: float = 120.0,
        poll_s: float = 0.02,
        limits: Limits = LIMITS,
        num_probes: int = 0,
        min_clients: int = 0,
    ) -> None:
        self.grid, self.window, self.time_to_live_s, self.poll_s = grid, window, time_to_live_s, poll_s
        self.limits, self.join_timeout_s = limits, join_timeout_s
        self._pending: dict[str, tuple[int, int]] = {}
        self._lost: list[Failure] = []
        self._quiet_since = time.monotonic()
        self._roster = Roster(grid, num_clients, num_probes)
        wanted = min_clients or num_clients
        deadline, num_found = time.monotonic() + join_timeout_s, 0
        while len(self._roster.update()) < wanted or self._roster.is_probing:
            if len(self._roster.nodes) > num_found:
                num_found, deadline = len(self._roster.nodes), time.monotonic() + join_timeout_s
            if time.monotonic() > deadline:
                if num_found >= wanted:
                    break  # a probe was lost; nothing depends on it
                raise NoClientsError(
                    f"only {num_found} of {wanted} clients connected within {join_timeout_s:g} s "
                    f"({self._roster.describe()}); start the missing SuperNodes (or simulate as many with "
                    "num-supernodes), or lower num-clients"
                )
            time.sleep(0.1)

    def clients(self) -> list[int]:
        """Partition ids of the clients that are connected; while there are none, waits as long as for one to join."""
        deadline = time.monotonic() + self.join_timeout_s
        while not self._roster.update() and time.monotonic() < deadline:
            time.sleep(0.1)
        return sorted(self._roster.nodes)

    def empty_trips(self) -> list[tuple[int, float]]:
        """(partition id, seconds beside the client's own work) of the probes that came back since the last call."""
        trips, self._roster.trips = self._roster.trips, []
        return trips

    def send(self, instruction: Instruction) -> None:
        """Send one request; a client that is gone answers with a ``Failure``."""
        node = self._roster.nodes.get(instruction.partition_id)
        sent = ""
        if node is not None:
            sent = push(self.grid, node, instruction.action, instruction_to_record(instruction), self.time_to_live_s)
        if sent:
            self._pending[sent] = (instruction.dispatch, instruction.partition_id)
            self._quiet_since = time.monotonic()
        else:
            self._lost.append(Failure(instruction.dispatch, instruction.partition_id, "the client is not connected"))

    def receive(self, timeout_s: float) -> list[Report | Failure]:
        """Return the answers that are ready; wait up to ``timeout_s`` for the first."""
        deadline = time.monotonic() + timeout_s
        while True:
            answers: list[Report | Failure] = list(self._lost)
            self._lost.clear()
            for reply in self.grid.pull_messages(list(self._pending)) if self._pending else ():
                dispatch, partition_id = self._pending.pop(reply.metadata.reply_to_message_id, (-1, -1))
                if dispatch >= 0:
                    answers.append(_answer(reply, dispatch, partition_id, self.limits))
            now = time.monotonic()
            self._quiet_since = now if answers else self._quiet_since
            if answers or not self._pending or now > deadline:
                return answers
            time.sleep(min(MAX_POLL_S, max(self.poll_s, PATIENCE * (now - self._quiet_since))))

    def close(self) -> None:
        """Forget what is still under way."""
        self._pending.clear()


def _answer(reply: Message, dispatch: int, partition_id: int, limits: Limits) -> Report | Failure:
    if reply.has_error():
        lines = [line.strip() for line in str(reply.error.reason or "").splitlines() if line.strip()]
        return Failure(dispatch, partition_id, f"code {reply.error.code}: {lines[-1] if lines else 'no reason given'}")
    try:
        report = record_to_report(reply.content, limits)
    except Exception as error:  # whatever a stranger's bytes do, the run goes on
        return Failure(dispatch, partition_id, f"unreadable reply: {type(error).__name__}: {str(error)[:500]}")
    if (report.dispatch, report.partition_id) != (dispatch, partition_id):
        return Failure(
            dispatch,
            partition_id,
            f"answer to request {dispatch} of client {partition_id} is signed as request {report.dispatch} of client "
            f"{report.partition_id}",
        )
    return report
