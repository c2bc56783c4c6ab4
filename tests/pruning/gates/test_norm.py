"""Re-estimated statistics of gated units, by hand: means over the batches that a unit won in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from client_app.data import Examples
from client_app.evaluation import reestimate_batch_norm
from pruning.gates import Winners, gates_of
from pruning.gates.norm import compact_norm, masked_norm
from zoo import get_model

BATCHES = [([2.0, 4.0], [0]), ([10.0, 30.0], [0, 1]), ([1.0, 5.0], [1])]
"""Two samples of one position each, alike in all units, and who wins among units 0, 1 and 2."""


def normalise(norm: nn.BatchNorm2d, values: list[float], winners: list[int], compact: bool) -> None:
    found = Winners((2,), (torch.tensor(winners),), torch.ones(2, len(winners)), torch.ones(2, 3))
    num_held = len(winners) if compact else 3
    y = torch.tensor(values).view(2, 1, 1, 1).expand(2, num_held, 1, 1).contiguous()
    (compact_norm if compact else masked_norm)(norm, y, found, None)


@pytest.mark.parametrize("compact", [True, False])
def test_a_mean_over_batches_is_over_those_that_a_unit_won_in(compact):
    """Unit 0: batches 1 and 2; unit 1: 2 and 3; unit 2: none. Their unbiased variances are 2, 200 and 8."""
    norm = nn.BatchNorm2d(3, momentum=None)
    for _ in range(2):  # a second estimate has forgotten the first
        norm.reset_running_stats()
        for values, winners in BATCHES:
            normalise(norm, values, winners, compact)
        assert norm.running_mean.tolist() == [(3 + 20) / 2, (20 + 3) / 2, 0]
        torch.testing.assert_close(norm.running_var, torch.tensor([(2 + 200) / 2, (200 + 8) / 2, 1]))
        assert int(norm.num_batches_tracked) == 3


@pytest.mark.parametrize("compact", [True, False])
def test_a_unit_is_not_held_absent_from_batches_in_which_all_units_won(compact):
    """There the layer is an ordinary one: batch 1 (mean 3) is whole; unit 0 is in batch 2 (20) as well, unit 1 not."""
    norm = nn.BatchNorm2d(3, momentum=None).train()
    norm(torch.tensor([2.0, 4.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    normalise(norm, [10.0, 30.0], [0], compact)
    normalise(norm, [1.0, 7.0], [1], compact)
    torch.testing.assert_close(norm.running_mean, torch.tensor([(3 + 20) / 2, (3 + 4) / 2, 3.0]))


def test_with_a_momentum_it_is_the_momentum_for_every_unit_that_won():
    norm = nn.BatchNorm2d(3, momentum=0.5)
    for values, winners in BATCHES:
        normalise(norm, values, winners, compact=True)
    assert norm.running_mean.tolist() == [0.5 * (0.5 * 3) + 0.5 * 20, 0.5 * (0.5 * 20) + 0.5 * 3, 0]


def test_units_that_no_calibration_image_chose_keep_the_statistics_that_were_merged():
    torch.manual_seed(0)
    model, _ = get_model("cnn", 10, 1, 8, gates=True)
    gates_of(model).set_density(0.25).configure("batch")
    norm = model.blocks[2].norm
    norm.running_mean.fill_(7.0)
    norm.running_var.fill_(9.0)
    x = torch.randn(40, 1, 8, 8)
    examples = Examples(x, torch.zeros(40, dtype=torch.long), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    chosen = torch.zeros(128, dtype=torch.bool)

    def note(module: nn.Module, inputs: object, output: object) -> None:
        chosen.logical_or_(model.gates["stage3"].winners.union(128))

    handle = norm.register_forward_hook(note)
    whole = copy.deepcopy(model)
    reestimate_batch_norm(model, examples, batch_size=10)
    handle.remove()
    assert 0 < int(chosen.sum()) < 128
    assert (norm.running_mean[~chosen] == 7.0).all()
    assert (norm.running_var[~chosen] == 9.0).all()
    assert (norm.running_mean[chosen] != 7.0).all()
    gates_of(whole).set_density(1.0)
    reestimate_batch_norm(whole, examples, batch_size=10)
    assert (whole.blocks[2].norm.running_mean.abs() < 5).all(), "of what was there, nothing is left"
