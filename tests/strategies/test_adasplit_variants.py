"""AdaSplit's variants from end to end: selections, encodings, and every exchange across an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.handler import handle
from server_app.checkpoint import load_checkpoint
from strategies.split.masks import MaskConfig
from tests.marks import slow_but
from tests.runs import equal_states, final_state, select, tiny_run, without_timings
from wire.message import Instruction, Report

BASE: dict[str, Any] = {
    "strategy": "adasplit",
    "num_clients": 3,
    "num_rounds": 3,
    "train__optimizer": "adam",
    "train__learning_rate": 0.003,
    "train__local_epochs": 1,
    "data__max_train": 180,
    "data__partition": "iid",
    "evaluation__every": 9,
    "adasplit__eta": 0.4,
    "adasplit__kappa": 0.34,
    "adasplit__segments": 3,
}
"""One local round, two global ones; one client of three may upload."""


def adasplit(folder: Path, handler: Callable[[Instruction], Report] = handle, **settings: Any) -> list[dict[str, Any]]:
    return tiny_run(folder, handler, **{**BASE, **settings})


@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("selection", ["ucb", "random", "round-robin", "all"])
def test_every_selection_grants_as_many_uploads_as_it_should_and_trains(selection, pipeline, tmp_path):
    granted: dict[tuple[int, int], set[int]] = {}

    def spy(instruction: Instruction) -> Report:
        if instruction.action == "train" and instruction.settings["upload"] != "none":
            place = (instruction.server_round, int(instruction.settings["start"]))
            granted.setdefault(place, set()).add(instruction.partition_id)
        return handle(instruction)

    rows = adasplit(tmp_path, spy, adasplit__selection=selection, adasplit__pipeline=pipeline)
    decisions = [granted[place] for place in sorted(granted)]
    assert len(decisions) == 2 * 3  # rounds, segments
    assert {len(chosen) for chosen in decisions} == {3 if selection == "all" else 1}
    if selection in ("ucb", "round-robin"):  # whoever was never served comes first
        assert set().union(*decisions[:3]) == {0, 1, 2}
    if selection == "round-robin":
        assert decisions[3:] == decisions[:3]
    assert select(rows, "evaluation")[-1]["accuracy"] > select(rows, "evaluation")[0]["accuracy"] + 0.2


@pytest.mark.slow
def test_fp16_halves_the_values_sent_and_hardly_moves_the_result(tmp_path):
    runs = {p: adasplit(tmp_path / p, adasplit__precision=p, adasplit__eta=1.0) for p in ("fp32", "fp16")}
    sent = {p: sum(row["upload_bytes"] for row in select(rows, "arrival")) for p, rows in runs.items()}
    found = {p: select(rows, "evaluation")[-1] for p, rows in runs.items()}
    # Beside the values, which halve, a bit a value and the labels travel.
    assert 0.5 * sent["fp32"] < sent["fp16"] < 0.56 * sent["fp32"]
    assert 0.5 * found["fp32"]["upload_bytes"] < found["fp16"]["upload_bytes"] < 0.56 * found["fp32"]["upload_bytes"]
    assert found["fp16"]["loss"] == pytest.approx(found["fp32"]["loss"], rel=0.01)
    assert found["fp16"]["loss"] != found["fp32"]["loss"]


@pytest.mark.slow
def test_hard_masks_at_their_defaults_mask_a_part_of_their_own_for_every_client_and_the_model_still_learns(tmp_path):
    settings = {"adasplit__eta": 1.0, "train__local_epochs": 4, "adasplit__segments": 1}
    rows = adasplit(tmp_path / "hard", **settings, adasplit__mask__kind="hard")
    clients = load_checkpoint(tmp_path / "hard")[1]["server"]["clients"].values()
    is_masked = torch.stack([torch.sigmoid(client["logits"]) < MaskConfig().threshold for client in clients])
    assert all(0.05 < float(share) < 0.98 for share in is_masked.float().mean(1))
    assert not torch.equal(is_masked[0], is_masked[1])
    unmasked = adasplit(tmp_path / "none", **settings, adasplit__mask__kind="none")
    accuracies = [select(run, "evaluation")[-1]["accuracy"] for run in (rows, unmasked)]
    assert accuracies[0] > accuracies[1] - 0.1


class ServerKilledError(BaseException):
    """Stands for SIGKILL: nothing of the server's runs on."""


EXCHANGES: dict[str, dict[str, Any]] = {
    "frozen": {"exchange": "frozen"},
    "average": {"client_sync": "average"},
    "handoff": {"exchange": "exact", "client_sync": "handoff"},
    "server gradient": {"exchange": "exact", "server_gradient": True},
    "hard masks in fp16": {"mask__kind": "hard", "precision": "fp16"},
}


@pytest.mark.parametrize("name", slow_but(("handoff",), EXCHANGES))
def test_a_run_killed_in_the_middle_of_a_round_ends_as_if_it_had_not_been(name, tmp_path):
    settings = {f"adasplit__{key}": value for key, value in EXCHANGES[name].items()} | {"data__max_train": 120}
    whole = adasplit(tmp_path / "whole", **settings)

    def killed(instruction: Instruction) -> Report:
        if instruction.action == "train" and (instruction.server_round, instruction.partition_id) == (3, 2):
            raise ServerKilledError  # after clients 0 and 1 have worked
        return handle(instruction)

    with pytest.raises(ServerKilledError):
        adasplit(tmp_path / "first", killed, **settings)
    rows = adasplit(tmp_path / "second", resume=str(tmp_path / "first"), **settings)
    assert equal_states(final_state(tmp_path / "second"), final_state(tmp_path / "whole"))
    (first, second) = (load_checkpoint(tmp_path / name)[1]["server"]["clients"] for name in ("whole", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[pid]["logits"], second[pid]["logits"]) for pid in first)
    assert without_timings(rows) == without_timings(whole)
