"""FedNova: one round against the paper's equation, and the optimum that FedAvg misses when clients step unequally."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from client_app.handler import handle
from tests.marks import slow_but
from tests.runs import equal_states, final_state, select, tiny_run
from tests.strategies.quadratic import Parabola, bottom_of_the_mean, converged
from wire.flat import ConfigError
from wire.message import Instruction, Report
from zoo import get_model

UNEQUAL = {"data.partition": "dirichlet:0.3", "data.min-size": 20, "model.name": "cnn", "num-rounds": 1}


def norm_by_hand(num_steps: int, momentum: float, pull: float) -> float:
    """||a||_1 by unrolling: the influence of every single gradient on the update, added up."""
    influences = []
    for unit in range(num_steps):
        velocity = distance = 0.0
        for step in range(num_steps):
            velocity = momentum * velocity + (1.0 if step == unit else 0.0) - pull * distance
            distance += velocity
        influences.append(distance)
    return sum(influences)


@pytest.mark.parametrize(
    ("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.5), (0.5, 0.5)], ids=["sgd", "momentum", "proximal", "both"]
)
def test_a_round_is_the_papers_equation_and_buffers_are_averaged(momentum, mu, tmp_path):
    replies: list[tuple[Instruction, Report]] = []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        replies.append((instruction, report))
        return report

    settings = {**UNEQUAL, "train.momentum": momentum, "fednova.mu": mu}
    tiny_run(tmp_path, spy, strategy="fednova", **settings)
    assert len({report.num_steps for _, report in replies}) > 1
    total = sum(report.num_examples for _, report in replies)
    p = [report.num_examples / total for _, report in replies]
    a = [norm_by_hand(report.num_steps, momentum, 0.05 * mu) for _, report in replies]
    effective = sum(share * norm for share, norm in zip(p, a, strict=True))
    parameters = {name for name, _ in get_model("cnn", 10, 1, 8)[0].named_parameters()}
    before = replies[0][0].state
    for key, tensor in final_state(tmp_path).items():
        if not tensor.is_floating_point():
            continue
        x = before[key].double()
        moves = [report.state[key].double() - x for _, report in replies]
        normal = effective * sum(share * move / norm for share, move, norm in zip(p, moves, a, strict=True))
        plain = sum(share * move for share, move in zip(p, moves, strict=True))
        expected = x + (normal if key in parameters else plain)
        torch.testing.assert_close(tensor.double(), expected, atol=2e-6, rtol=1e-4)
        assert key not in parameters or not torch.allclose(normal, plain, atol=1e-6)


@pytest.mark.parametrize("model", slow_but(("mlp",), ("mlp", "cnn")))
def test_equal_steps_make_it_fedavg_and_fedprox_to_the_bit(model, tmp_path):
    """Twelve and eleven examples are one step of 16 each: unequal weights, equal steps."""
    settings: dict[str, Any] = {"num-clients": 3, "num-rounds": 3, "data.max-train": 43, "model.name": model}
    runs = {
        "nova": {"strategy": "fednova"},
        "avg": {"strategy": "fedavg"},
        "nova-prox": {"strategy": "fednova", "fednova.mu": 0.5},
        "prox": {"strategy": "fedprox", "fedprox.mu": 0.5},
    }
    examples = set()
    for name, own in runs.items():
        rows = tiny_run(tmp_path / name, **settings, **own)
        examples = {row["num_examples"] for row in select(rows, "arrival")}
    assert len(examples) > 1
    assert equal_states(final_state(tmp_path / "nova"), final_state(tmp_path / "avg"))
    assert equal_states(final_state(tmp_path / "nova-prox"), final_state(tmp_path / "prox"))
    assert not equal_states(final_state(tmp_path / "nova"), final_state(tmp_path / "nova-prox"))


def test_equal_steps_on_levels_make_it_heterofl(tmp_path):
    settings: dict[str, Any] = {"num-clients": 6, "num-rounds": 2}
    tiny_run(tmp_path / "a", strategy="fednova", **settings, fednova__rates="1,0.5,0.25")
    tiny_run(tmp_path / "b", strategy="heterofl", **settings, heterofl__mask_missing_labels=False)
    assert equal_states(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


UNEVEN = [Parabola(1.0, 0.0, 1, 20), Parabola(1.0, 1.0, 3), Parabola(1.0, 3.0, 5)]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_unequal_steps_do_not_move_the_fixed_point_much(momentum):
    """Equal parabolas: FedAvg ends where the busiest client pulls, FedNova near the optimum."""
    optimum = bottom_of_the_mean(UNEVEN)
    plain = converged("fedavg", UNEVEN, momentum=momentum)
    normal = converged("fednova", UNEVEN, momentum=momentum)
    assert abs(plain - optimum) > 0.2
    assert abs(normal - optimum) < 0.5 * abs(plain - optimum)


def test_with_the_curvature_taken_into_account_the_proximal_norm_is_exact():
    """On a parabola of curvature 1 a proximal client contracts as one of curvature 1 + mu: the fixed point by hand."""
    rate, mu = 0.2, 2.0
    pulls = []
    for client in UNEVEN:
        steps = (1 - (1 - rate * (1 + mu)) ** client.num_steps) / (1 + mu)
        norm = (1 - (1 - rate * mu) ** client.num_steps) / mu
        pulls.append(client.num_examples * steps / norm)
    expected = sum(w * c.bottom for w, c in zip(pulls, UNEVEN, strict=True)) / sum(pulls)
    assert converged("fednova", UNEVEN, mu=mu, num_rounds=80) == pytest.approx(expected, abs=1e-4)


def test_a_report_without_steps_is_turned_away(tmp_path):
    def idle(instruction: Instruction) -> Report:
        report = handle(instruction)
        return replace(report, num_steps=0) if instruction.partition_id == 1 else report

    rows = tiny_run(tmp_path, idle, strategy="fednova", num_rounds=1)
    (row,) = select(rows, "arrival", status="rejected")
    assert row["partition_id"] == 1
    assert "num-steps" in row["reason"]
    assert select(rows, "merge")[0]["num_merged"] == 3


def test_an_optimiser_whose_norm_is_not_known_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"strategy=fednova with train\.optimizer=adam: .*use train\.optimizer=sgd"):
        tiny_run(tmp_path, strategy="fednova", train__optimizer="adam")


@pytest.mark.parametrize("strategy", ["fednova", "adp"])
def test_a_bound_on_updates_is_one_on_what_moves_the_model_whoever_answers_first(strategy, tmp_path):
    """Each normalised update tau_eff d_i / a_i is shortened to the bound."""
    replies: list[tuple[Instruction, Report]] = []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        replies.append((instruction, report))
        return report

    bound, own = 0.1, {"adp.base": "fednova", "adp.mode": "magnitude"} if strategy == "adp" else {}
    extra = {**own, "model.gates": False, "model.name": "mlp", "robust.clip-norm": bound}
    tiny_run(tmp_path, spy, strategy=strategy, **{**UNEQUAL, **extra, "train.momentum": 0.0})
    total = sum(report.num_examples for _, report in replies)
    p, a = [r.num_examples / total for _, r in replies], [r.num_steps for _, r in replies]
    effective = sum(share * norm for share, norm in zip(p, a, strict=True))
    before = replies[0][0].state
    parameters = {name for name, _ in get_model("mlp", 10, 1, 8)[0].named_parameters()}
    moved = {key: torch.zeros_like(t, dtype=torch.float64) for key, t in before.items() if t.is_floating_point()}
    for share, norm, (_, report) in zip(p, a, replies, strict=True):
        factor = {key: effective / norm if key in parameters else 1.0 for key in moved}
        step = {key: factor[key] * (report.state[key].double() - before[key].double()) for key in moved}
        length = float(torch.cat([t.flatten() for t in step.values()]).norm())
        assert length > bound
        for key in moved:
            moved[key] += share * min(1.0, bound / length) * step[key]
    after = final_state(tmp_path)
    for key, expected in moved.items():
        torch.testing.assert_close(after[key].double() - before[key].double(), expected, atol=2e-6, rtol=1e-3)
