"""GridTransport: instructions and reports as Flower messages, over the simulation or the deployment engine."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from pruning.spec import FULL, SubModelSpec
from wire.flat import from_flat, to_flat
from wire.message import Failure, Instruction, Job, Report

STATE, COMPANIONS, HEAD, METRICS = "state", "companions", "head", "metrics"
PARTITION = "partition-id"


class NoClientsError(RuntimeError):
    """The expected clients did not connect in time."""


# --- records --------------------------------------------------------------------------------------------------------


def spec_to_json(spec: SubModelSpec | None) -> str:
    """A spec as JSON: per group a bitmap in hexadecimal, as long as the highest kept unit."""
    if spec is None:
        return ""
    kept = {}
    for name, units in spec.arrays.items():
        mask = np.zeros(int(units[-1]) + 1, dtype=bool)
        mask[units] = True
        kept[name] = np.packbits(mask).tobytes().hex()
    return json.dumps({"kept": kept, "depth": spec.depth})


def spec_from_json(text: str) -> SubModelSpec | None:
    """Inverse of ``spec_to_json``."""
    if not text:
        return None
    raw = json.loads(text)
    kept = {
        name: np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8))).tolist()
        for name, bits in raw["kept"].items()
    }
    return SubModelSpec.of(kept, raw["depth"])


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
    job = from_flat(Job, head.pop("job"))
    spec = spec_from_json(head.pop("spec")) or FULL
    return Instruction(**head, job=job, spec=spec, **_tensors(record))


def report_to_record(report: Report) -> RecordDict:
    """Report -> Flower records; ``metrics`` also as a MetricRecord, where Flower's own tools look."""
    head = _plain(report, {"state", "companions", "narrowed", "metrics"}) | {"narrowed": spec_to_json(report.narrowed)}
    record = _record(report, head)
    record[METRICS] = MetricRecord(
        {"num-examples": report.num_examples, **{k: float(v) for k, v in report.metrics.items()}}
    )
    return record


def record_to_report(record: RecordDict) -> Report:
    """Flower records -> report."""
    head = _head(record)
    head["label_counts"] = tuple(head["label_counts"])
    metrics = {k: float(v) for k, v in record[METRICS].items() if k != "num-examples" and isinstance(v, int | float)}
    return Report(**(head | {"narrowed": spec_from_json(head["narrowed"])}), metrics=metrics, **_tensors(record))


def _plain(value: Any, without: set[str]) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value) if field.name not in without}


def _record(message: Instruction | Report, head: Mapping[str, Any]) -> RecordDict:
    return RecordDict(
        {
            STATE: ArrayRecord(dict(message.state)),
            COMPANIONS: ArrayRecord(dict(message.companions)),
            HEAD: ConfigRecord({"json": json.dumps(head)}),
        }
    )


def _head(record: RecordDict) -> dict[str, Any]:
    head: dict[str, Any] = json.loads(str(record[HEAD]["json"]))
    return head


def _tensors(record: RecordDict) -> dict[str, Any]:
    """The tensors of a message by field name."""
    found = {}
    for name in (STATE, COMPANIONS):
        arrays = record[name]
        assert isinstance(arrays, ArrayRecord)
        found[name] = dict(arrays.to_torch_state_dict())
    return found


# --- transport ------------------------------------------------------------------------------------------------------


class GridTransport:
    """Speaks to the clients of a Flower grid by partition id.

    Parameters
    ----------
    grid : Flower's grid.
    num_clients : clients to wait for before the first instruction.
    window : requests worth having under way at once.
    reply_timeout_s : time to live of a message: a client that needs longer has failed.
    join_timeout_s : wait this long for the clients to connect.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        window: int = 16,
        reply_timeout_s: float = 600.0,
        join_timeout_s: float = 120.0,
        poll_s: float = 0.02,
    ) -> None:
        self.grid, self.window, self.reply_timeout_s, self.poll_s = grid, window, reply_timeout_s, poll_s
        self._nodes: dict[int, int] = {}
        self._pending: dict[str, tuple[int, int]] = {}
        self._lost: list[Failure] = []
        self._asked: set[int] = set()
        deadline = time.monotonic() + join_timeout_s
        while len(self._find_clients()) < num_clients:
            if time.monotonic() > deadline:
                raise NoClientsError(
                    f"only {len(self._nodes)} of {num_clients} clients connected within {join_timeout_s:g} s; start "
                    "the missing SuperNodes (or simulate as many with num-supernodes), or lower num-clients"
                )
            time.sleep(0.2)

    def clients(self) -> list[int]:
        """Partition ids of the clients that are connected."""
        return sorted(self._find_clients())

    def send(self, instruction: Instruction) -> None:
        """Send one request; a client that is gone answers with a ``Failure``."""
        node = self._nodes.get(instruction.partition_id)
        ids: list[str] = []
        if node is not None:
            message = Message(
                content=instruction_to_record(instruction),
                dst_node_id=node,
                message_type=instruction.action,
                ttl=self.reply_timeout_s,
            )
            ids = [mid for mid in self.grid.push_messages([message]) if mid]
        if ids:
            self._pending[ids[0]] = (instruction.dispatch, instruction.partition_id)
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
                    answers.append(_answer(reply, dispatch, partition_id))
            if answers or not self._pending or time.monotonic() > deadline:
                return answers
            time.sleep(self.poll_s)

    def close(self) -> None:
        """Forget what is still under way."""
        self._pending.clear()

    def _find_clients(self) -> dict[int, int]:
        """Ask nodes not seen before for their partition id; node ids are random, partition ids are not."""
        online = set(self.grid.get_node_ids())
        self._nodes = {pid: node for pid, node in self._nodes.items() if node in online}
        strangers = sorted(online - self._asked)
        if strangers:
            messages = [Message(content=RecordDict(), dst_node_id=n, message_type="query") for n in strangers]
            for reply in self.grid.send_and_receive(messages, timeout=60):
                if reply.has_error():
                    continue  # asked again next time
                self._asked.add(reply.metadata.src_node_id)
                head = reply.content.get(HEAD)
                if isinstance(head, ConfigRecord) and isinstance(head.get(PARTITION), int):
                    self._nodes[int(str(head[PARTITION]))] = reply.metadata.src_node_id
        return self._nodes


def _answer(reply: Message, dispatch: int, partition_id: int) -> Report | Failure:
    if reply.has_error():
        lines = [line.strip() for line in str(reply.error.reason or "").splitlines() if line.strip()]
        return Failure(dispatch, partition_id, f"code {reply.error.code}: {lines[-1] if lines else 'no reason given'}")
    try:
        return record_to_report(reply.content)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        return Failure(dispatch, partition_id, f"unreadable reply: {type(error).__name__}: {error}")


def partition_record(partition_id: int) -> RecordDict:
    """Answer to a query: which partition this client holds."""
    return RecordDict({HEAD: ConfigRecord({PARTITION: partition_id})})


__all__ = [
    "GridTransport",
    "NoClientsError",
    "instruction_to_record",
    "partition_record",
    "record_to_instruction",
    "record_to_report",
    "report_to_record",
    "spec_from_json",
    "spec_to_json",
]
