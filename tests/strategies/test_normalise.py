"""FedNova's pieces: by hand, and against the formula of the paper on random clients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.normalise import NormaliseError, StepTally, scaled


def streamed(start: torch.Tensor, ends: list[torch.Tensor], distances: list[float], weights: list[float]):
    """The round as a strategy does it: scale every answer, average, scale the mean."""
    tally, total = StepTally(), torch.zeros_like(start)
    for end, distance, weight in zip(ends, distances, weights, strict=True):
        total += weight * scaled({"w": end}, {"w": start}, {"w"}, tally.factor(distance))["w"]
        tally = tally.noted(distance, weight)
    return scaled({"w": total / tally.weight}, {"w": start}, {"w"}, tally.effective)["w"]


def test_two_clients_by_hand():
    """x = 0, y = (2, 6), a = (1, 3), p = (3/4, 1/4): d/a = 2 and 2, tau_eff = 1.5; FedAvg would say 3."""
    got = streamed(torch.tensor([0.0]), [torch.tensor([2.0]), torch.tensor([6.0])], [1.0, 3.0], [3.0, 1.0])
    assert got.tolist() == pytest.approx([3.0 * (0.75 * 2 / 3 + 0.25 * 2 / 3) * 1.5])


clients = st.lists(st.tuples(st.floats(0.5, 300), st.floats(0.1, 500)), min_size=1, max_size=6)


@given(clients, st.integers(0, 10**6))
def test_the_streamed_round_is_the_papers_equation(pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(7, generator=generator, dtype=torch.float64)
    ends = [start + torch.randn(7, generator=generator, dtype=torch.float64) for _ in pairs]
    distances, weights = [a for a, _ in pairs], [w for _, w in pairs]
    p = [w / sum(weights) for w in weights]
    effective = sum(share * a for share, a in zip(p, distances, strict=True))
    step = sum(share * (end - start) / a for share, end, a in zip(p, ends, distances, strict=True))
    torch.testing.assert_close(streamed(start, ends, distances, weights), start + effective * step)


@given(st.floats(0.5, 300), st.lists(st.floats(0.1, 500), min_size=1, max_size=6))
def test_equal_distances_change_nothing_to_the_bit(distance, weights):
    tally, state = StepTally(), {"w": torch.randn(3)}
    for weight in weights:
        assert scaled(state, {"w": torch.zeros(3)}, {"w"}, tally.factor(distance))["w"] is state["w"]
        tally = tally.noted(distance, weight)
    assert tally.effective == 1.0


def test_buffers_are_left_as_they_are():
    state, start = (
        {"w": torch.ones(2), "running_mean": torch.ones(2)},
        {"w": torch.zeros(2), "running_mean": torch.zeros(2)},
    )
    got = scaled(state, start, {"w"}, 0.5)
    assert got["w"].tolist() == [0.5, 0.5]
    assert got["running_mean"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("distance", [0.0, -1.0, math.nan, math.inf])
def test_a_client_without_steps_is_turned_away(distance):
    with pytest.raises(NormaliseError, match="num-steps"):
        StepTally().factor(distance)


def test_an_empty_tally_changes_nothing():
    assert StepTally().effective == 1.0
