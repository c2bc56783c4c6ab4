"""Delay compensation: the paper's correction, entry by entry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.extract import extract
from pruning.spec import SubModelSpec
from strategies.delay import compensate, compensate_report, first_mean_square
from strategies.loop import LoopConfig
from tests.strategies.scalar import small_model
from wire.message import Report
from zoo import get_model

numbers = st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4)


def test_one_entry_by_hand():
    """d = -.2, nothing seen before, m = .75: the mean square is .01, lambda is 2 / .1, and w has moved by .3 since."""
    step, mean_square = compensate(*map(torch.tensor, (-0.2, 1.3, 1.0, 0.0)), 2.0, 0.75)
    assert float(mean_square) == pytest.approx(0.01)
    assert float(step) == pytest.approx(-0.2 - 0.04 * 2 / 0.1 * 0.3, rel=1e-4)


@given(numbers, numbers, numbers, numbers, st.floats(0, 5), st.floats(0, 0.99))
def test_it_is_the_papers_equation_for_all_numbers(step, now, sent, before, strength, momentum):
    """In terms of gradients, as the paper writes it: w - eta (g + lambda g g (w - w_bak)), with eta = 1."""
    before = np.abs(np.float32(before))
    d, w, w_bak = np.float64(np.float32(step)), np.float64(np.float32(now)), np.float64(np.float32(sent))
    g = -d
    mean_square = momentum * before + (1 - momentum) * g * g
    expected = w - (g + strength / np.sqrt(mean_square + 1e-7) * g * g * (w - w_bak))
    got, kept = compensate(*map(torch.tensor, (step, now, sent, before.tolist())), strength, momentum)
    assert (torch.tensor(now) + got).tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-2)
    assert kept.tolist() == pytest.approx(mean_square.tolist(), rel=1e-4, abs=1e-6)


@given(numbers, numbers, numbers)
def test_without_strength_or_without_delay_a_step_stays_what_it_is(step, now, sent):
    d, w, w_bak, zero = map(torch.tensor, (step, now, sent, [0.0] * 4))
    assert torch.equal(compensate(d, w, w_bak, zero, 0.0, 0.95)[0], d)
    assert torch.equal(compensate(d, w, w, zero, 2.0, 0.95)[0], d)


@given(st.floats(0.5, 10), st.floats(0.5, 5))
def test_the_unit_of_the_step_does_not_matter(unit, step):
    """A whole local training stands for one gradient: that it is c times as large changes nothing but the unit."""
    arguments = (torch.tensor(1.3), torch.tensor(1.0), torch.tensor(0.0), 2.0, 0.95)
    one, _ = compensate(torch.tensor(step), *arguments)
    other, _ = compensate(torch.tensor(step * unit), *arguments)
    assert float(other) == pytest.approx(unit * float(one), rel=1e-3)


def test_a_sub_model_learns_of_its_own_entries_and_leaves_the_others_mean_square_alone():
    state, layout, _ = small_model()
    spec = SubModelSpec.of({"hidden0": [0, 2], "hidden1": [1]})
    now = extract(state, layout, spec)
    report = Report(0, 0, {key: torch.full_like(t, 0.5) for key, t in now.items()}, 1, is_delta=True)
    sent = {key: t - 0.25 for key, t in now.items()}
    before = {key: torch.full_like(t, 0.04) for key, t in first_mean_square(state).items()}
    loop = LoopConfig(compensation=2.0, compensation_momentum=0.5, max_staleness=-1)
    got, mean_square = compensate_report(report, now, sent, before, (layout, spec), loop)
    expected_square = 0.5 * 0.04 + 0.5 * 0.25
    expected_step = 0.5 - 0.25 * 2 / math.sqrt(expected_square) * 0.25
    for tensor in got.state.values():
        assert torch.allclose(tensor, torch.full_like(tensor, expected_step), atol=1e-5)
    held = extract(mean_square, layout, spec)
    assert all(torch.allclose(t, torch.full_like(t, expected_square)) for t in held.values())
    num_changed = sum(int((mean_square[key] != before[key]).sum()) for key in before)
    assert num_changed == sum(t.numel() for t in held.values()) < sum(t.numel() for t in before.values())


def test_statistics_of_batch_norm_are_not_compensated():
    model, layout = get_model("cnn", 10, 1, 8, width=0.25)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    steps = {key: torch.full_like(t, 0.5) for key, t in state.items() if t.is_floating_point()}
    sent = {key: t - 1 if t.is_floating_point() else t for key, t in state.items()}
    loop = LoopConfig(compensation=2.0, max_staleness=-1)
    report = Report(0, 0, steps, 1, is_delta=True)
    got, mean_square = compensate_report(report, state, sent, first_mean_square(state), (layout, SubModelSpec()), loop)
    kept = {key for key in steps if torch.equal(got.state[key], steps[key])}
    assert kept == {key for key in steps if "running" in key} != set()
    assert mean_square.keys() == steps.keys() - kept
