"""Top-k compression: nothing is lost, only late."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.compress import INDEX, VALUE, CompressionError, densify, sparsify


def update(seed, shape=(8, 5)):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(shape, generator=generator),
        "b": torch.randn(8, generator=generator),
        "n": torch.tensor(3),
    }


@settings(deadline=None)
@given(seed=st.integers(0, 1000), density=st.floats(0.01, 1.0))
def test_what_is_sent_and_what_is_kept_add_up_to_the_update(seed, density):
    whole = update(seed)
    sparse, _, residual = sparsify(whole, {}, {}, density, 0.0)
    dense = densify(sparse, whole)
    torch.testing.assert_close(dense["w"] + residual["w"], whole["w"], rtol=0, atol=0)
    assert torch.equal(dense["b"], whole["b"])
    assert torch.equal(dense["n"], whole["n"])


@given(seed=st.integers(0, 1000), density=st.floats(0.01, 1.0))
def test_the_largest_entries_are_sent_and_as_many_as_the_density_says(seed, density):
    whole = update(seed)
    sparse, _, residual = sparsify(whole, {}, {}, density, 0.0)
    assert len(sparse["w" + INDEX]) == len(sparse["w" + VALUE]) == max(1, round(density * 40))
    assert sparse["w" + VALUE].abs().min() >= residual["w"].abs().max()
    assert sparse["w" + INDEX].dtype == torch.int32


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), density=st.floats(0.05, 0.5))
def test_over_many_rounds_without_momentum_all_updates_arrive(seed, density):
    velocity, residual = {}, {}
    arrived, produced = torch.zeros(8, 5), torch.zeros(8, 5)
    for i in range(6):
        whole = update(seed + i)
        produced += whole["w"]
        sparse, velocity, residual = sparsify(whole, velocity, residual, density, 0.0)
        arrived += densify(sparse, whole)["w"]
    torch.testing.assert_close(arrived + residual["w"], produced, rtol=1e-5, atol=1e-5)


def test_momentum_is_corrected_as_in_the_paper():
    one, two = {"w": torch.tensor([[1.0, 0.1]])}, {"w": torch.tensor([[0.0, 0.1]])}
    sparse, velocity, residual = sparsify(one, {}, {}, 0.5, 0.9)
    assert densify(sparse, one)["w"].tolist() == [[1.0, 0.0]]
    assert velocity["w"].tolist() == [[0.0, pytest.approx(0.1)]]  # sent entries start anew
    _, velocity, residual = sparsify(two, velocity, residual, 0.5, 0.9)
    # u = .9 * .1 + .1 = .19, v = .1 + .19 = .29: the largest, and sent
    assert residual["w"].tolist() == [[0.0, 0.0]]
    assert velocity["w"].tolist() == [[0.0, 0.0]]


def test_the_inputs_are_left_as_they_are():
    whole = update(0)
    before = {key: tensor.clone() for key, tensor in whole.items()}
    _, velocity, residual = sparsify(whole, {}, {}, 0.2, 0.9)
    kept = [{key: tensor.clone() for key, tensor in memory.items()} for memory in (velocity, residual)]
    sparsify(update(1), velocity, residual, 0.2, 0.9)
    assert all(torch.equal(tensor, before[key]) for key, tensor in whole.items())
    assert torch.equal(velocity["w"], kept[0]["w"])
    assert torch.equal(residual["w"], kept[1]["w"])


@pytest.mark.parametrize("index", [[-1, 0], [0, 40], [0]])
def test_an_index_outside_its_entry_or_too_few_are_refused(index):
    whole = update(0)
    sparse = {"w" + INDEX: torch.tensor(index, dtype=torch.int32), "w" + VALUE: torch.ones(2), "b": whole["b"]}
    with pytest.raises(CompressionError, match="'w'"):
        densify(sparse, whole)


def test_a_missing_entry_is_refused_but_integers_may_be_left_out():
    whole = update(0)
    sparse, _, _ = sparsify(whole, {}, {}, 0.5, 0.0)
    assert "n" not in densify({k: t for k, t in sparse.items() if k != "n"}, whole)
    with pytest.raises(CompressionError, match="'b' is missing"):
        densify({k: t for k, t in sparse.items() if k != "b"}, whole)
