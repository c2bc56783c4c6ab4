"""Clients' own tests of what they would deploy: asked beside the ledger and the clock, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from strategies.answers import check_tested
from strategies.exchange import Exchange
from wire.message import Instruction, Report, payload_bytes

EVALUATION_DISPATCH = 10**9
"""Evaluations are numbered apart, so that evaluating more often does not change what is trained."""


def ask_tests(
    exchange: Exchange,
    instructions: Sequence[Instruction],
    judge: Callable[[Report], Report],
    turn_away: Callable[[Report, ValueError], None],
) -> dict[str, Any]:
    """Send the requests and return the evaluation's row: means weighted by examples, and every client's accuracy.

    Parameters
    ----------
    instructions : one per client.
    judge : finishes a test that the client could only begin.
    turn_away : told of answers that could not be judged.
    """
    answers = [answer for answer in exchange.ask_aside(instructions) if isinstance(answer, Report)]
    reports = []
    for answer in answers:
        try:
            reports.append(check_tested(judge(answer)))
        except ValueError as error:
            turn_away(answer, error)
    total = sum(report.num_examples for report in reports)
    if not total:
        return {}
    return {
        "accuracy": sum(r.metrics["accuracy"] * r.num_examples for r in reports) / total,
        "loss": sum(r.metrics["loss"] * r.num_examples for r in reports) / total,
        "num_examples": total,
        "download_bytes": sum(map(payload_bytes, instructions)),
        "upload_bytes": sum(map(payload_bytes, answers)),
        "clients": {str(r.partition_id): r.metrics["accuracy"] for r in sorted(reports, key=lambda r: r.partition_id)},
    }
