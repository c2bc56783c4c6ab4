"""The Flower ClientApp: Flower messages in and out of the client handler."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.handler import handle
from client_app.site import Site
from wire.grid import record_to_instruction, report_to_record
from wire.roster import partition_record

app = ClientApp()
_imported_s = time.perf_counter()
_num_messages = 0


@app.query()
def who(message: Message, context: Context) -> Message:
    """Say which partition of the data this client holds, and how long its process has been at work."""
    began_s = _begin()
    partition_id = int(context.node_config["partition-id"])
    return Message(content=partition_record(partition_id, _busy_s(began_s)), reply_to=message)


@app.train()
@app.evaluate()
def work(message: Message, context: Context) -> Message:
    """Carry out one instruction."""
    began_s = _begin()
    report = handle(record_to_instruction(message.content), Site.of(context.node_config))
    return Message(content=report_to_record(replace(report, busy_s=_busy_s(began_s))), reply_to=message)


def _begin() -> float:
    """When the work on this message began, by ``time.perf_counter``: the first includes the start of the process."""
    global _num_messages
    _num_messages += 1
    now_s = time.perf_counter()
    return now_s - process_age_s() if _num_messages == 1 else now_s


def _busy_s(began_s: float) -> float:
    return time.perf_counter() - began_s


def process_age_s() -> float:
    """Seconds since this process was started; since this module was imported where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter() - _imported_s
