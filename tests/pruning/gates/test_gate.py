"""Winners, templates, and samples put side by side."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.gates import FLOOR, Gate, group_samples, template, top


def test_ties_go_to_the_lower_unit():
    assert top(torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0]), 3).tolist() == [1, 2, 0]
    assert top(torch.zeros(2, 6), 2).tolist() == [[0, 1], [0, 1]]


@given(seed=st.integers(0, 1000), k=st.integers(1, 12))
def test_winners_are_the_k_largest(seed, k):
    gates = torch.rand(12, generator=torch.Generator().manual_seed(seed))
    assert set(top(gates, k).tolist()) == set(sorted(range(12), key=lambda u: -float(gates[u]))[:k])


def test_a_parts_template_has_the_units_with_the_largest_mean_gate():
    gates = torch.tensor([[5.0, 0.0, 1.0, 2.0], [0.0, 4.0, 1.0, 3.0], [0.0, 0.0, 9.0, 8.0]])
    assert [sorted(part.tolist()) for part in template(gates, (2, 1), 2)] == [[0, 3], [2, 3]]
    assert [sorted(part.tolist()) for part in template(gates, (3,), 2)] == [[2, 3]]


def test_weights_a_third_as_wide_as_he_normal_and_a_bias_of_one():
    torch.manual_seed(0)
    gate = Gate(50, 4000)
    assert float(gate.weight.detach().std()) == pytest.approx(0.3 * (2 / 50) ** 0.5, rel=0.02)
    assert torch.equal(gate.bias, torch.ones(4000))


def test_how_loud_a_sample_is_does_not_change_its_gates_and_silence_gives_the_bias():
    gate, salience = Gate(5, 16), torch.rand(3, 5)
    scales = torch.tensor([[1e-3], [1.0], [1e4]])
    assert torch.allclose(gate(scales * salience), gate(salience), rtol=1e-5)
    assert torch.equal(gate(torch.zeros(2, 5)), torch.ones(2, 16))


def test_values_are_each_samples_own_even_where_winners_are_shared():
    gate = Gate(2, 16)
    gate.num_winners.fill_(8)
    winners = gate.decide(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), (2,))
    assert winners.is_shared
    gates = gate(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(winners.values, gates[:, winners.parts[0]].clamp(min=FLOOR))
    assert not torch.equal(winners.values[0], winners.values[1])


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
def test_a_copy_is_one_of_its_own_without_the_last_passs_winners_which_the_original_keeps(twin_of):
    gate = Gate(4, 16)
    gate.num_winners.fill_(8)
    found = gate.decide(torch.rand(3, 4), None)  # on a graph: cannot be copied
    twin = twin_of(gate)
    assert twin.winners is None
    assert gate.winners is found
    assert type(twin) is Gate
    assert all(torch.equal(twin.state_dict()[key], tensor) for key, tensor in gate.state_dict().items())
    twin.weight.data.zero_()
    assert gate.weight.any()


def test_masks_and_dense_values_say_who_won_for_whom():
    gate = Gate(3, 16)
    gate.num_winners.fill_(8)
    winners = gate.decide(torch.rand(5, 3), (2, 3))
    mask = winners.mask(16)
    assert mask.sum(1).tolist() == [8] * 5
    assert torch.equal(mask[0], mask[1])
    assert torch.equal(winners.union(16), mask[0] | mask[2])
    assert torch.equal(winners.dense_values(16) > 0, mask)


@given(num=st.integers(1, 40), num_groups=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 100))
def test_groups_are_a_permutation_in_parts_of_nearly_equal_size(num, num_groups, seed):
    gates = torch.rand(num, 16, generator=torch.Generator().manual_seed(seed))
    order, sizes = group_samples(gates, num_groups)
    assert sorted(order.tolist()) == list(range(num))
    assert sum(sizes) == num
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) <= num_groups


def test_samples_with_like_gates_come_into_one_group():
    """Two kinds, each of two sorts: two groups find the kinds, four the sorts."""
    generator = torch.Generator().manual_seed(0)
    sorts = torch.arange(32) % 4
    centres = torch.tensor([[5.0, 5, 0, 0, 2, 0], [5, 5, 0, 0, 0, 2], [0, 0, 5, 5, 2, 0], [0, 0, 5, 5, 0, 2]])
    gates = centres[sorts] + 0.1 * torch.rand(32, 6, generator=generator)
    order, sizes = group_samples(gates, 2)
    assert sorted(sorted(set(sorts[part].tolist())) for part in order.split(list(sizes))) == [[0, 1], [2, 3]]
    order, sizes = group_samples(gates, 4)
    assert sorted(sorted(set(sorts[part].tolist())) for part in order.split(list(sizes))) == [[0], [1], [2], [3]]


def test_alike_samples_are_grouped_without_harm():
    order, sizes = group_samples(torch.ones(6, 8), 4)
    assert sorted(order.tolist()) == list(range(6))
    assert sum(sizes) == 6
