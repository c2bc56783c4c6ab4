"""A split model's client: its steps do not depend on how they are asked for, and what it sends is what it computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from client_app.handler import handle
from client_app.objectives.base import ObjectiveError
from client_app.objectives.half import make_head
from client_app.site import NOWHERE, Site, SiteError
from client_app.store import ClientStore
from tests.client_app.conftest import MakeInstruction
from wire.message import DataConfig, Instruction, Report
from wire.smashed import unpack_upload
from zoo import get_model

SETTINGS: dict[str, Any] = {
    "cut": "1",
    "seed": 0,
    "partition": 0,
    "learning-rate": 0.01,
    "labels": 10,
    "precision": "fp32",
    "temperature": 0.07,
    "beta": 0.0,
    "round": 1,
    "start": 0,
    "stop": -1,
    "upload": "before",
}


@pytest.fixture
def ask(make_instruction: MakeInstruction, tmp_path):
    """Ask a client with a memory; each request goes on from the one before."""
    last = -1
    site = NOWHERE

    def do(objective: str = "contrastive", train: dict[str, Any] | None = None, **changes: Any) -> Report:
        nonlocal last, site
        site = changes.pop("site", NOWHERE)
        options = {"batch_size": 16, "optimizer": "adam", **(train or {})}
        plain = make_instruction("mlp", train=options, job={"store_dir": str(tmp_path)})
        settings = SETTINGS | {key.replace("_", "-"): value for key, value in changes.items() if key != "companions"}
        request: Instruction = replace(
            plain,
            objective=objective,
            settings=settings,
            state={},
            is_partial=True,
            dispatch=last + 1,
            last_dispatch=last,
            companions=changes.get("companions", {}),
        )
        last += 1
        return handle(request, site)

    return do


def memory(tmp_path, dispatch: int) -> dict[str, Any]:
    return ClientStore(str(tmp_path), 0).load(dispatch)["objective"]


def steps_of(report: Report) -> list[torch.Tensor]:
    return [step.activations for step in unpack_upload(report.companions, (200,), 10, 1000, 1000)]


def test_stretches_give_the_same_activations_and_weights_as_one_request(ask, tmp_path):
    whole = steps_of(ask())
    weights = memory(tmp_path, 0)["part"]
    for file in tmp_path.glob("*.pt"):
        file.unlink()
    parts = [steps_of(ask(start=a, stop=a + 1))[0] for a in range(4)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(parts, whole, strict=True))
    pieces = memory(tmp_path, 4)["part"]
    assert all(torch.equal(weights[key], pieces[key]) for key in weights)


def test_activations_are_those_before_the_update(ask, tmp_path):
    first = steps_of(ask(start=0, stop=1))[0]
    untrained = steps_of(ask(start=0, stop=1, train_client=False, upload="before"))[0]
    assert first.shape == untrained.shape
    assert not torch.equal(first, untrained)  # the second request looks at the same batch after the update


def test_beta_pushes_activations_towards_zero(ask, tmp_path):
    def size(beta: float) -> float:
        for file in tmp_path.glob("*.pt"):
            file.unlink()
        for number in range(1, 6):
            report = ask(beta=beta, round=number)
        return float(steps_of(report)[-1].abs().mean())

    assert size(0.01) < 0.7 * size(0.0)


def test_a_batch_without_a_positive_pair_is_uploaded_and_skipped(ask, tmp_path):
    before = ask(start=0, stop=0, upload="none")
    report = ask(start=0, stop=1, train={"batch_size": 1})
    assert before.num_steps == report.num_steps == 0
    assert len(report.companions["labels"]) == 1
    assert "loss" not in report.metrics
    first, second = memory(tmp_path, 0)["part"], memory(tmp_path, 1)["part"]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_client_whose_first_answer_was_lost_begins_again_from_the_same_weights(ask, tmp_path):
    report = ask(start=0, stop=1)
    for file in tmp_path.glob("*.pt"):
        file.unlink()
    assert all(torch.equal(a, b) for a, b in zip(steps_of(ask(start=0, stop=1)), steps_of(report), strict=True))


def test_the_local_phase_goes_on_where_an_interrupted_client_left_it(ask, tmp_path):
    whole = ask(round=3, local_rounds=3)
    assert not whole.companions
    assert whole.metrics["round_steps"] == 4
    weights = memory(tmp_path, 0)["part"]
    for file in tmp_path.glob("*.pt"):
        file.unlink()
    ask(round=2, local_rounds=2)  # the server died; the answer was never merged
    (tmp_path / "000000-000000000001.pt").unlink()
    rest = ask(round=3, local_rounds=3)
    assert rest.train_macs == whole.train_macs / 3
    assert all(torch.equal(weights[key], memory(tmp_path, 2)["part"][key]) for key in weights)


def test_a_client_that_was_away_in_the_local_phase_catches_up_as_if_it_had_not_been(ask, tmp_path):
    """The others' rate is on schedule by then; a local round is made at the rate of the local phase."""
    train = {"learning_rate": 0.01}
    ask(round=3, local_rounds=3, train=train)
    ask(round=4, local_rounds=3, learning_rate=0.001, train=train)
    punctual = memory(tmp_path, 1)["part"]
    for file in tmp_path.glob("*.pt"):
        file.unlink()
    ask(round=4, local_rounds=3, learning_rate=0.001, train=train)
    late = memory(tmp_path, 2)["part"]
    assert all(torch.equal(punctual[key], late[key]) for key in late)


HALF, HEAD = 4 * (64 * 200 + 200), 4 * (200 * 256 + 256 + 256 * 64 + 64)
ADAM = 4  # weights, gradients, two moments


@pytest.mark.parametrize(
    ("objective", "changes", "least"),
    [
        ("contrastive", {"upload": "none"}, ADAM * (HALF + HEAD)),
        ("split", {"stop": 1, "wait": True}, ADAM * HALF + 16 * 4 * 200),
        ("contrastive", {"upload": "before", "stop": 2}, ADAM * (HALF + HEAD) + 32 * 4 * 200),
    ],
    ids=["the head counts", "no head without a loss of its own", "what is sent up counts"],
)
def test_a_half_that_does_not_fit_the_owners_memory_is_refused_before_training(
    objective, changes, least, ask, tmp_path
):
    with pytest.raises(SiteError, match=f"owner allows {least}"):
        ask(objective, site=Site(memory_bytes=least), **changes)  # the activations of a batch lack
    assert not list(tmp_path.glob("*.pt"))
    room = 17 * 4 * (64 + 3 * 200 + 3 * 256 + 64) + 17 * 4 * 200
    assert ask(objective, site=Site(memory_bytes=least + room), **changes).num_examples


def test_the_peak_counts_the_activations_that_a_step_keeps_and_what_is_sent_up(ask):
    """As with every other objective; a half is mostly activations."""
    quiet, loud = ask(upload="none", stop=1), ask(round=2, stop=1)
    kept = 16 * 4 * (64 + 200 + 256)  # of one batch at least: images, and what either ReLU lets through
    assert quiet.peak_memory_bytes >= ADAM * (HALF + HEAD) + kept
    assert loud.peak_memory_bytes == quiet.peak_memory_bytes + 16 * 4 * 200


def test_a_step_that_only_a_servers_gradient_makes_does_not_pass_through_the_head(ask):
    pulled = ask(stop=0, owed=0, train_client=False, companions={"gradient": torch.ones(16, 200)})
    assert pulled.train_macs == 2 * 64 * 200 * 16


def test_a_device_too_small_for_the_whole_model_trains_the_half_that_fits(ask):
    """The server's half is no matter of the client's memory."""
    limit = ADAM * HALF + 17 * 4 * (64 + 3 * 200)
    assert limit < ADAM * 4 * sum(p.numel() for p in get_model("mlp", 10, 1, 8)[0].parameters())
    assert ask("split", site=Site(memory_bytes=limit), stop=1, wait=True).companions


def test_waiting_for_a_gradient_changes_nothing_and_the_gradient_then_moves_the_weights_as_it_should(ask, tmp_path):
    up = ask("split", start=0, stop=1, wait=True, train={"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0})
    before = memory(tmp_path, 0)["part"]
    gradient = torch.randn(16, 200)
    down = ask(
        "split", start=1, stop=1, owed=0, upload="none", companions={"gradient": gradient},
        train={"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
    )  # fmt: skip
    after = memory(tmp_path, 1)["part"]
    is_active = (steps_of(up)[0] > 0).float()
    expected = before["blocks.0.linear.bias"] - 0.01 * (gradient * is_active).sum(0)
    torch.testing.assert_close(after["blocks.0.linear.bias"], expected)
    assert up.train_macs == 0
    assert down.train_macs == 2 * 64 * 200 * 16


def test_the_loss_reported_beside_a_servers_gradient_is_the_clients_own(ask):
    """What stands for the gradient, sum(a * gradient), has any sign and is nobody's loss."""
    alone = ask(stop=1)
    pulled = ask(round=2, stop=0, owed=0, companions={"gradient": torch.full((16, 200), -10.0)})
    assert 0 < pulled.metrics["loss"] < 10
    assert (pulled.num_steps, alone.num_steps) == (1, 1)


def test_a_servers_gradient_that_is_no_number_is_not_learned_from(ask):
    with pytest.raises(ObjectiveError, match="the server's gradient is no number any more; lower the learning rate"):
        ask("split", round=2, stop=0, owed=0, companions={"gradient": torch.full((16, 200), torch.inf)})


@pytest.mark.parametrize(("shape", "parameters"), [((20, 4, 4), 20 * 128 + 128 + 128 * 64 + 64), ((9, 6), None)])
def test_the_head_is_the_papers_for_images_and_takes_tokens(shape, parameters):
    head = make_head(shape)
    assert head(torch.randn(3, *shape)).shape == (3, 64)
    if parameters:
        assert sum(p.numel() for p in head.parameters()) == parameters


def test_the_head_of_dense_activations():
    head = make_head((800,))
    assert head(torch.randn(3, 800)).shape == (3, 64)
    assert sum(p.numel() for p in head.parameters()) == 800 * 256 + 256 + 256 * 64 + 64


def test_own_classes_are_the_only_answers_of_a_client_that_is_tested_so(make_instruction: MakeInstruction):
    data = DataConfig(max_train=400, partition="label-blocks:5")
    plain = make_instruction("mlp", job={"data": data, "num_clients": 2}, action="evaluate")
    bias = plain.state["heads.0.bias"].clone()
    bias[9] = 100.0  # whatever it sees, it says 9, which this client has not
    plain = replace(plain, state={**plain.state, "heads.0.bias": bias})
    assert handle(plain).metrics["accuracy"] == 0.0
    assert handle(replace(plain, settings={"own-classes": True})).metrics["accuracy"] > 0.0
