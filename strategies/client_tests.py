"""Clients' own tests of what they would deploy: asked beside the ledger and the clock, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from strategies.answers import FAULTS, check_tested, describe
from strategies.exchange import Exchange
from strategies.setting import Order, Setting
from wire.message import Failure, Instruction, Report, State, payload_bytes

EVALUATION_DISPATCH = 10**9
"""Evaluations are numbered apart, so that evaluating more often does not change what is trained."""

NUM_NAMED = 5
"""Clients whose reasons a warning names; the evaluation's row has all."""


@dataclass(frozen=True)
class _Heard:
    """What stays of one answer: its bytes, and the test, None for one that goes on, or why there is none."""

    partition_id: int
    upload_bytes: int
    outcome: Report | str | None


def evaluation_request(blank: Instruction, order: Order, sub_model: State, setting: Setting) -> Instruction:
    """The request to test ``order``, from one that still lacks its number and its tensors."""
    own = {"own-classes": setting.own_classes, "own-statistics": setting.own_statistics}
    return replace(
        blank,
        dispatch=EVALUATION_DISPATCH + blank.server_round * setting.job.num_clients + blank.partition_id,
        state=order.pick(sub_model),
        settings={**order.settings, **own},
        companions=order.companions(),
    )


def ask_tests(
    exchange: Exchange,
    clients: Sequence[int],
    instruct: Callable[[int], Instruction],
    judge: Callable[[Report], Report | None],
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Ask for the tests and return the evaluation's row: means weighted by examples, and every client's accuracy.

    Who brought no test is in the row as ``failed``, client -> reason. Without any test there is no row.

    Parameters
    ----------
    clients : who is tested.
    instruct : partition id -> what it is asked for; called again for a test that goes on.
    judge : finishes a test that the client could only begin; None asks the client again.
    warn : told once who brought no test and why, if anybody did not.
    """
    asked: dict[int, int] = {}  # dispatch -> client

    def take(answer: Report | Failure) -> _Heard:
        pid, num_bytes = asked[answer.dispatch], 0
        outcome: Report | str | None
        try:
            if isinstance(answer, Failure):
                outcome = answer.reason
            elif answer.partition_id != pid:
                outcome = f"answer signed by client {answer.partition_id}"
            else:
                num_bytes, judged = payload_bytes(answer), judge(answer)
                outcome = None if judged is None else check_tested(judged)
        except FAULTS as error:
            outcome = f"turned away: {describe(error)}"
        return _Heard(pid, num_bytes, outcome)

    tests: dict[int, Report] = {}
    failed: dict[int, str] = {}
    waiting, download_bytes, upload_bytes = list(clients), 0, 0
    while waiting:
        instructions = [instruct(pid) for pid in waiting]
        asked |= {item.dispatch: item.partition_id for item in instructions}
        download_bytes += sum(map(payload_bytes, instructions))
        heard = exchange.ask_aside(instructions, take)
        upload_bytes += sum(item.upload_bytes for item in heard)
        for item in heard:
            if isinstance(item.outcome, Report):
                tests[item.partition_id] = item.outcome
            elif item.outcome is not None:
                failed[item.partition_id] = item.outcome
        waiting = [item.partition_id for item in heard if item.outcome is None]
    if failed:
        warn(_lost_tests(failed, len(clients)))
    row = _means([tests[pid] for pid in clients if pid in tests])
    if not row:
        return {}
    row |= {"download_bytes": download_bytes, "upload_bytes": upload_bytes}
    return row | ({"failed": {str(pid): reason for pid, reason in sorted(failed.items())}} if failed else {})


def _means(reports: Sequence[Report]) -> dict[str, Any]:
    """Means weighted by examples, and every client's accuracy; empty without any test."""
    total = sum(report.num_examples for report in reports)
    if not total:
        return {}
    return {
        "accuracy": sum(r.metrics["accuracy"] * r.num_examples for r in reports) / total,
        "loss": sum(r.metrics["loss"] * r.num_examples for r in reports) / total,
        "num_examples": total,
        "clients": {str(r.partition_id): r.metrics["accuracy"] for r in sorted(reports, key=lambda r: r.partition_id)},
    }


def _lost_tests(failed: Mapping[int, str], num_asked: int) -> str:
    """One sentence for all who brought no test, however many they are."""
    some = f"{len(failed)} of {num_asked} tests are missing"
    how_many = "no client's test came back" if len(failed) == num_asked else some
    named = [f"client {pid}: {reason}" for pid, reason in sorted(failed.items())[:NUM_NAMED]]
    rest = f"; and {len(failed) - NUM_NAMED} more" if len(failed) > NUM_NAMED else ""
    return f"{how_many}: {'; '.join(named)}{rest}"
