"""Answers in split learning that are not what was asked for: turned away with the reason, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.handler import handle
from tests.marks import slow_but
from tests.runs import select, tiny_run
from wire.activations import BITMAP, VALUES, decode, encode
from wire.message import Instruction, Report
from wire.smashed import LABELS, STEPS, pack_upload
from zoo import get_model

BASE: dict[str, Any] = {
    "num_clients": 3,
    "num_rounds": 2,
    "train__learning_rate": 0.003,
    "train__local_epochs": 1,
    "train__batch_size": 8,
    "data__max_train": 180,
    "data__partition": "iid",
    "evaluation__every": 9,
}
ADASPLIT: dict[str, Any] = {
    **BASE,
    "strategy": "adasplit",
    "train__optimizer": "adam",
    "adasplit__kappa": 0.0,
    "adasplit__segments": 1,
}
Change = Callable[[Instruction, Report], Report]


def with_steps(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change the step numbers and sizes, [num_steps, 2], of an upload."""

    def changed(instruction: Instruction, report: Report) -> Report:
        if STEPS not in report.companions:
            return report
        return replace(report, companions={**report.companions, STEPS: change(report.companions[STEPS].clone())})

    return changed


def shifted(steps: torch.Tensor) -> torch.Tensor:
    steps[:, 0] += 1
    return steps


def joined(steps: torch.Tensor) -> torch.Tensor:
    """The last step is gone, its samples passed off as the one's before."""
    steps[-2, 1] += steps[-1, 1]
    return steps[:-1]


def cut_short(instruction: Instruction, report: Report) -> Report:
    """The last step is gone, its samples too."""
    sent = report.companions
    if STEPS not in sent:
        return report
    num_samples, steps = len(sent[LABELS]), sent[STEPS][:-1]
    dense = decode({key: sent[key] for key in (VALUES, BITMAP) if key in sent}, (num_samples, 200))
    num_left = int(steps[:, 1].sum())
    return replace(report, companions=pack_upload(encode(dense[:num_left]), sent[LABELS][:num_left], steps))


def changed_mind(instruction: Instruction, report: Report) -> Report:
    """It has said before how many steps it makes a round."""
    return replace(report, metrics={**report.metrics, "round_steps": report.metrics["round_steps"] - 1})


def reversed_(steps: torch.Tensor) -> torch.Tensor:
    steps[:, 0] = steps[:, 0].flip(0)
    return steps


def with_weights(instruction: Instruction, report: Report) -> Report:
    state = get_model("mlp", 10, 1, 8)[0].state_dict()
    half = {key: tensor for key, tensor in state.items() if key.startswith("blocks.0")}
    return report if report.state else replace(report, state=half)


def uninvited(instruction: Instruction, report: Report) -> Report:
    return replace(report, companions={"values": torch.ones(3)})


def rejected(folder: Path, change: Change, who: Callable[[Instruction], bool], **settings: Any) -> str:
    """The reason for which the one answer that was changed is turned away, in a run that goes on."""
    done: list[int] = []

    def faulty(instruction: Instruction) -> Report:
        report = handle(instruction)
        if done or instruction.action != "train" or not who(instruction):
            return report
        answer = change(instruction, report)
        if answer is not report:
            done.append(instruction.partition_id)
        return answer

    rows = tiny_run(folder, faulty, **settings)
    (row,) = select(rows, "arrival", status="rejected")
    assert row["partition_id"] == done[0]
    assert select(rows, "end")[0]["status"] == "completed"
    assert select(rows, "merge")[-1]["num_merged"] == 3, "the next round has everybody again"
    return str(row["reason"])


def is_granted(instruction: Instruction) -> bool:
    return instruction.settings["upload"] != "none"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_steps(shifted), "out of turn: expected steps 0 to 5, got 1 to 6"),
        (cut_short, "truncated: expected steps 0 to 5, got 0 to 4"),
        (with_steps(joined), "steps of at most 9 samples, got 5 of up to 16"),
        (with_steps(reversed_), "out of turn: expected steps 0 to 5, got 5, 4, 3, 2, 1, 0"),
        (with_weights, "sent weights that nobody asked for"),
    ],
)
def test_an_upload_of_other_steps_or_with_weights_is_turned_away(change, reason, tmp_path):
    assert reason in rejected(tmp_path, change, is_granted, **ADASPLIT)


def test_a_client_that_says_in_the_middle_of_a_round_that_it_makes_fewer_steps_is_turned_away(tmp_path):
    settings = {**ADASPLIT, "adasplit__segments": 2}
    got = rejected(tmp_path, changed_mind, lambda i: is_granted(i) and i.settings["start"] > 0, **settings)
    assert "round_steps: got 5, it was 6 in this round" in got


def test_activations_of_a_client_that_was_not_granted_are_turned_away(tmp_path):
    got = rejected(tmp_path, uninvited, lambda i: not is_granted(i), **{**ADASPLIT, "adasplit__eta": 0.4})
    assert "sent ['values'] without a grant" in got


@pytest.mark.parametrize("strategy", slow_but(("sl-basic",), ("sl-basic", "splitfed")))
@pytest.mark.parametrize(
    ("change", "who", "reason"),
    [
        (with_steps(shifted), lambda i: i.settings["start"] == 1, "expected step 1, got [2]"),
        (with_weights, lambda i: i.settings["start"] == 1, "weights in the middle of a round"),
        (uninvited, lambda i: not is_granted(i), "upload: unexpected entries ['values']"),
    ],
)
def test_an_answer_out_of_turn_is_turned_away(strategy, change, who, reason, tmp_path):
    assert reason in rejected(tmp_path, change, who, **{**BASE, "strategy": strategy})


@pytest.mark.parametrize(
    ("strategy", "version"),
    slow_but((("sl-basic", 1), ("splitfed", 1)), [("sl-basic", 1), ("splitfed", 1), ("splitfed", 2)]),
)
def test_a_round_that_no_client_finished_is_an_empty_one_and_the_run_goes_on(strategy, version, tmp_path):
    def weary(instruction: Instruction) -> Report:
        if instruction.action == "train" and instruction.server_round == 1 and instruction.settings["start"] == 1:
            raise RuntimeError("the battery is empty")
        return handle(instruction)

    own = {"splitfed__version": version} if strategy == "splitfed" else {}
    rows = tiny_run(tmp_path, weary, **{**BASE, **own, "strategy": strategy})
    assert [row["message"] for row in select(rows, "warning", server_round=1)] == ["no usable answer in this round"]
    assert [(row["server_round"], row["num_merged"]) for row in select(rows, "merge")] == [(2, 3)]
    assert select(rows, "end")[0]["status"] == "completed"
