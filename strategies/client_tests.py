"""Clients' own tests of what they would deploy: asked beside the ledger and the clock, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from strategies.answers import check_tested
from strategies.exchange import Exchange
from wire.message import Failure, Instruction, Report, payload_bytes

EVALUATION_DISPATCH = 10**9
"""Evaluations are numbered apart, so that evaluating more often does not change what is trained."""


@dataclass(frozen=True)
class _Heard:
    """What stays of one answer: its bytes, and the test, None for one that goes on, or why it was turned away."""

    partition_id: int
    upload_bytes: int
    outcome: Report | ValueError | None


def ask_tests(
    exchange: Exchange,
    clients: Sequence[int],
    instruct: Callable[[int], Instruction],
    judge: Callable[[Report], Report | None],
    turn_away: Callable[[int, ValueError], None],
) -> dict[str, Any]:
    """Ask for the tests and return the evaluation's row: means weighted by examples, and every client's accuracy.

    Parameters
    ----------
    clients : who is tested.
    instruct : partition id -> what it is asked for; called again for a test that goes on.
    judge : finishes a test that the client could only begin; None asks the client again.
    turn_away : told of clients whose answers could not be judged.
    """
    asked: dict[int, int] = {}  # dispatch -> client

    def take(answer: Report | Failure) -> _Heard | None:
        if isinstance(answer, Failure) or asked[answer.dispatch] != answer.partition_id:
            return None
        outcome: Report | ValueError | None
        try:
            judged = judge(answer)
            outcome = None if judged is None else check_tested(judged)
        except ValueError as error:
            outcome = error
        return _Heard(answer.partition_id, payload_bytes(answer), outcome)

    tests: dict[int, Report] = {}
    waiting, download_bytes, upload_bytes = list(clients), 0, 0
    while waiting:
        instructions = [instruct(pid) for pid in waiting]
        asked |= {item.dispatch: item.partition_id for item in instructions}
        download_bytes += sum(map(payload_bytes, instructions))
        heard = [item for item in exchange.ask_aside(instructions, take) if item is not None]
        upload_bytes += sum(item.upload_bytes for item in heard)
        for item in heard:
            if isinstance(item.outcome, Report):
                tests[item.partition_id] = item.outcome
            elif item.outcome is not None:
                turn_away(item.partition_id, item.outcome)
        waiting = [item.partition_id for item in heard if item.outcome is None]
    reports = [tests[pid] for pid in clients if pid in tests]
    total = sum(report.num_examples for report in reports)
    if not total:
        return {}
    return {
        "accuracy": sum(r.metrics["accuracy"] * r.num_examples for r in reports) / total,
        "loss": sum(r.metrics["loss"] * r.num_examples for r in reports) / total,
        "num_examples": total,
        "download_bytes": download_bytes,
        "upload_bytes": upload_bytes,
        "clients": {str(r.partition_id): r.metrics["accuracy"] for r in sorted(reports, key=lambda r: r.partition_id)},
    }
