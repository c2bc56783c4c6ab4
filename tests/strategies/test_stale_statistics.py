"""BatchNorm's running statistics under stale steps: what is merged is never less than a variance can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server_app.checkpoint import find_checkpoint, load_checkpoint
from strategies.answers import ReportError, check_report, rebase
from tests.runs import select, tiny_run
from wire.message import Report

VARIANCE, MEAN = "norm.running_var", "norm.running_mean"
NUM_ROUNDS = 10
variances = st.floats(2**-20, 2**20, width=32)


@settings(max_examples=200)
@given(variances, variances, variances, st.integers(1, 9), st.floats(0, 1))
def test_a_stale_step_at_most_halves_a_variance_and_adds_up_otherwise(now, sent, found, age, scale):
    before = {VARIANCE: torch.tensor([now]), MEAN: torch.tensor([now])}
    step = torch.tensor([found]) - torch.tensor([sent])
    report = Report(0, 0, {VARIANCE: step, MEAN: step}, 1, is_delta=True)
    state = rebase(report, before, scale, age).state
    exact = before[MEAN] + (step if scale == 1 else scale * step)
    assert torch.equal(state[MEAN], exact)
    assert torch.equal(state[VARIANCE], torch.maximum(exact, before[VARIANCE] / 2))
    assert float(state[VARIANCE]) > 0


@given(variances, variances)
def test_a_fresh_step_takes_a_variance_to_where_the_client_found_it(sent, found):
    before = {VARIANCE: torch.tensor([sent])}
    step = torch.tensor([found]) - before[VARIANCE]
    state = rebase(Report(0, 0, {VARIANCE: step}, 1, is_delta=True), before).state
    assert torch.equal(state[VARIANCE], (before[VARIANCE] + step).clamp(min=0))


def test_a_variance_below_zero_is_turned_away():
    state = {VARIANCE: torch.tensor([1.0, -0.5])}
    with pytest.raises(ReportError, match=r"'norm\.running_var' holds a variance of -0\.5, expected none below 0"):
        check_report(Report(0, 0, state, 5, (5,)), state, {})


def test_where_sub_models_are_merged_late_variances_stay_positive_and_every_test_has_a_loss(tmp_path: Path):
    rows = tiny_run(
        tmp_path / "run",
        strategy="heterofl",
        loop__preset="semi-async",
        model__name="cnn",
        num_clients=8,
        num_rounds=NUM_ROUNDS,
        fleet__name="linear:4",
        data__partition="dirichlet:0.5",
    )
    assert any(row["staleness"] for row in select(rows, "arrival"))
    losses = [row["loss"] for row in select(rows, "evaluation", where="central")]
    assert len(losses) == NUM_ROUNDS + 1
    assert None not in losses
    state = load_checkpoint(find_checkpoint(tmp_path / "run"))[0].state
    smallest = [float(tensor.min()) for key, tensor in state.items() if key.endswith(".running_var")]
    assert smallest
    assert min(smallest) > 0
