"""What is said of gates, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pruning.gates import ABSENT, OVERLAPS, SALIENCE, STATISTICS, STATISTICS_OF, Evidence, gates_of
from pruning.gates.evidence import EVERY
from tests.pruning.gates.conftest import images_for
from zoo import get_model


def one_gate(share: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """An MLP whose gate looks at nothing but its bias; [16] gates, largest first."""
    torch.manual_seed(0)
    model, _ = get_model("mlp", 3, 1, 4, gates=True, hidden=(16, 16))
    gate = model.gates["hidden1"]
    gate.weight.data.zero_()
    gate.bias.data = torch.arange(16, 0, -1).float()
    gate.num_winners.fill_(8)
    gates_of(model).configure(share, compact=True)
    return model, gate.bias.detach()


def test_salience_is_the_sum_of_all_gates_over_all_batches_losers_included():
    model, gates = one_gate("batch")
    evidence = Evidence(gates_of(model), 3)
    for _ in range(3):
        model(torch.rand(4, 1, 4, 4))
        evidence.note(torch.tensor([0, 1, 2, 0]))
    assert torch.equal(evidence.salience()["hidden1"], 12 * gates)
    assert evidence.num_samples == 12


def test_the_same_winners_for_everybody_overlap_wholly_and_half_of_the_units_are_never_used():
    model, _ = one_gate("sample")
    evidence = Evidence(gates_of(model), 3)
    model(torch.rand(6, 1, 4, 4))
    evidence.note(torch.tensor([0, 1, 0, 1, 0, 0]))
    found = evidence.statistics()["hidden1"]
    assert found["overlap"] == pytest.approx(1.0)
    assert found["never_used_ratio"] == pytest.approx(0.5)
    assert found["agreement"] == pytest.approx(1.0)
    assert found["entropy"] == pytest.approx(math.log(8) / math.log(16))
    overlaps = evidence.overlaps()
    assert overlaps[0, 1] == pytest.approx(1.0)
    assert (overlaps[2] == ABSENT).all(), "what a class that was not seen overlaps with is not known"


def test_a_unit_that_won_only_between_the_batches_looked_at_closely_was_used():
    model, _ = one_gate("sample")
    gate, evidence = model.gates["hidden1"], Evidence(gates_of(model), 3)
    for batch in range(EVERY):
        gate.bias.data = torch.arange(16, 0, -1).float().roll(8 if batch == 3 else 0)
        model(torch.rand(2, 1, 4, 4))
        evidence.note(torch.tensor([0, 1]))
    assert evidence.statistics()["hidden1"]["never_used_ratio"] == 0.0


def test_a_unit_that_a_shared_template_leaves_out_was_not_used_whatever_a_sample_would_have_chosen():
    model, _ = one_gate("batch")
    gate, evidence = model.gates["hidden1"], Evidence(gates_of(model), 2)
    gate.bias.data.zero_()
    gate.weight.data[:8, 0], gate.weight.data[8:, 1] = 2.0, 1.0
    salience = torch.eye(2, 16)
    gate.decide(salience, (2,))
    evidence.note(torch.tensor([0, 1]))
    assert evidence.statistics()["hidden1"]["never_used_ratio"] == 0.5


def test_classes_with_winners_of_their_own_do_not_overlap_and_share_a_template_badly():
    """Class 0 wants units 0 to 7, class 1 units 8 to 15; a template for both agrees with one class and no other."""
    model, _ = one_gate("batch")
    gate = model.gates["hidden1"]
    gate.bias.data.zero_()
    gate.weight.data[:8, 0], gate.weight.data[8:, 1] = 2.0, 1.0
    evidence = Evidence(gates_of(model), 2)
    salience = torch.zeros(4, 16)
    salience[:2, 0], salience[2:, 1] = 1.0, 1.0
    gate.decide(salience, (4,))
    evidence.note(torch.tensor([0, 0, 1, 1]))
    found = evidence.statistics()["hidden1"]
    assert found["overlap"] == pytest.approx(0.0)
    assert found["agreement"] == pytest.approx(0.5)
    assert found["entropy"] == pytest.approx(1.0)
    assert evidence.overlaps()[0, 1] == 0, "both classes were seen, and share no winner"


def test_while_every_unit_wins_there_is_salience_and_nothing_else(make_gated):
    model, _ = make_gated("cnn", 1.0, torch.float32)
    evidence = Evidence(gates_of(model), 10)
    model(images_for("cnn", dtype=torch.float32))
    evidence.note(torch.arange(6))
    assert evidence.salience()["stage2"].sum() > 0
    assert evidence.statistics() == evidence.as_tensors() == evidence.summary() == {}


def test_labels_follow_their_images_into_groups(make_gated):
    """Class 0's images are black: whatever the order of the groups, its counts are those of black images."""
    model, _ = make_gated("resnet8", 0.5, torch.float32)
    images = images_for("resnet8", 8, dtype=torch.float32)
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    images[labels == 0] = 0
    alone = {}
    for share in ("group", "sample"):
        gates_of(model.eval()).configure(share, compact=True, num_groups=2)
        evidence = Evidence(gates_of(model), 2)
        model(images)
        evidence.note(labels)
        alone[share] = evidence.overlaps()
    torch.testing.assert_close(alone["group"], alone["sample"], atol=0.05, rtol=0.05)


def test_what_a_client_sends_has_one_row_per_gate(make_gated):
    model, _ = make_gated("resnet8", 0.5, torch.float32)
    gates_of(model).configure("group", compact=True)
    evidence = Evidence(gates_of(model), 10)
    model(images_for("resnet8", dtype=torch.float32))
    evidence.note(torch.arange(6))
    tensors = evidence.as_tensors()
    assert tensors[STATISTICS_OF].shape == (3, len(STATISTICS))
    assert ((tensors[STATISTICS_OF] >= 0) & (tensors[STATISTICS_OF] <= 1)).all()
    assert tensors[OVERLAPS].shape == (10, 10)
    assert SALIENCE not in tensors
    assert evidence.summary().keys() == {f"gate_{name}" for name in STATISTICS}
