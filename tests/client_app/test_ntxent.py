"""The supervised NT-Xent loss against the formula written out with loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.objectives.ntxent import has_positive_pair, nt_xent


def by_loops(z: torch.Tensor, y: torch.Tensor, tau: float) -> float:
    terms = []
    for p in range(len(y)):
        s = [float(torch.cosine_similarity(z[p], z[q], dim=0)) / tau for q in range(len(y))]
        for q in range(len(y)):
            if p != q and y[p] == y[q]:
                against = sum(math.exp(s[n]) for n in range(len(y)) if y[n] != y[p])
                terms.append(-math.log(math.exp(s[q]) / (math.exp(s[q]) + against)))
    return sum(terms) / len(terms) if terms else 0.0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.floats(0.07, 2), st.integers(0, 99))
def test_it_is_the_mean_over_positive_pairs(labels, tau, seed):
    z = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = torch.tensor(labels)
    assert float(nt_xent(z, y, tau)) == pytest.approx(by_loops(z, y, tau), rel=1e-6, abs=1e-9)


def test_by_hand_one_pair_and_one_negative():
    """z = e1, e1, e2, tau 1: both terms of the pair are -log(e / (e + 1))."""
    z = torch.tensor([[1.0, 0], [2.0, 0], [0, 3.0]])
    assert float(nt_xent(z, torch.tensor([4, 4, 1]), 1.0)) == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("labels", [[0, 1, 2], [0]])
def test_without_a_positive_pair_the_loss_is_zero_and_so_is_its_gradient(labels):
    z = torch.randn(len(labels), 4, requires_grad=True)
    loss = nt_xent(z, torch.tensor(labels), 0.07)
    loss.backward()
    assert float(loss) == 0.0
    assert not z.grad.any()
    assert not has_positive_pair(torch.tensor(labels))


def test_with_one_class_only_nothing_pushes_and_no_gradient_is_nan():
    z = torch.randn(4, 4, requires_grad=True)
    loss = nt_xent(z, torch.zeros(4, dtype=torch.int64), 0.07)
    loss.backward()
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(z.grad).all()


def test_far_apart_features_at_a_small_temperature_stay_finite():
    z = (torch.randn(8, 4) * 1e4).requires_grad_()
    loss = nt_xent(z, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), 0.01)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()
