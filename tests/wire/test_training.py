"""How far local steps go: closed forms, and torch's own optimiser as the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wire.message import TrainConfig
from wire.training import local_distance, step_sums


@pytest.mark.parametrize(
    ("num_steps", "momentum", "pull", "expected"),
    [
        (0, 0.0, 0.0, 0.0),
        (3, 0.0, 0.0, 3.0),
        (3, 0.5, 0.0, 1 + 1.5 + 1.75),
        (3, 0.0, 0.25, 1 + 0.75 + 0.75**2),
        (2, 0.5, 0.25, 1 + (0.5 + 1 - 0.25)),
    ],
)
def test_the_sums_by_hand(num_steps, momentum, pull, expected):
    assert step_sums(num_steps, momentum, pull=pull)[-1] == pytest.approx(expected)


@given(st.integers(1, 200), st.floats(0, 0.99))
def test_momentum_has_the_papers_closed_form(num_steps, beta):
    expected = (num_steps - beta * (1 - beta**num_steps) / (1 - beta)) / (1 - beta)
    assert step_sums(num_steps, beta)[-1] == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 200), st.floats(1e-4, 0.99))
def test_a_proximal_term_has_the_papers_closed_form(num_steps, pull):
    assert step_sums(num_steps, pull=pull)[-1] == pytest.approx((1 - (1 - pull) ** num_steps) / pull, rel=1e-9)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_torchs_sgd_goes_just_as_far_along_a_constant_gradient(momentum, nesterov, mu):
    rate, gradient = 0.1, 3.0
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=momentum, nesterov=nesterov and momentum > 0)
    config = TrainConfig(momentum=momentum, nesterov=nesterov)
    for num_steps in range(1, 30):
        weight.grad = gradient + mu * weight.detach() / 1.0
        optimizer.step()
        distance = local_distance(config, num_steps, rate, mu)
        assert float(weight.detach()) == pytest.approx(-rate * gradient * distance, rel=1e-9)
