"""Activations and uploads on the wire."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wire.activations import ActivationError, counted_bytes, decode, encode
from wire.message import state_bytes
from wire.smashed import label_type, pack_upload, unpack_upload

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(shapes, st.floats(0, 1), st.sampled_from(["fp32", "fp16"]), st.integers(0, 1000))
def test_what_is_decoded_is_what_was_encoded_and_the_smaller_form_travels(shape, density, precision, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    packed = encode(x, precision)
    expected = x if precision == "fp32" else x.half().float()
    assert torch.equal(decode(packed, shape), expected)
    size = 4 if precision == "fp32" else 2
    num_held = int((expected != 0).sum())
    assert state_bytes(packed) == min(x.numel() * size, num_held * size + (x.numel() + 7) // 8)


def test_a_sparse_batch_by_hand():
    packed = encode(torch.tensor([[0.0, 0.5, 0.0, 0.0], [0.0] * 4, [0.0] * 3 + [2.0]]))
    assert packed["values"].tolist() == [0.5, 2.0]
    assert packed["bitmap"].tolist() == [0b01000000, 0b00010000]
    assert counted_bytes(decode(packed, (3, 4))) == 8


def test_values_beyond_half_precision_are_cut_to_its_range_not_to_infinity():
    assert decode(encode(torch.tensor([1e9, -1e9]), "fp16"), (2,)).tolist() == [65504, -65504]


def upload(num: int = 5, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    x = torch.arange(1, num * 4 + 1.0).reshape(num, 2, 2)
    steps = torch.tensor([[3, 2], [4, num - 2]], dtype=torch.int32)
    packed = pack_upload(encode(x), torch.arange(num).to(torch.uint8), steps) | changes
    return {key: tensor for key, tensor in packed.items() if tensor is not None}


def test_an_upload_is_split_into_its_steps():
    first, second = unpack_upload(upload(), (2, 2), 10, 2, 3)
    assert (first.step, second.step) == (3, 4)
    assert (first.labels.tolist(), second.labels.tolist()) == ([0, 1], [2, 3, 4])
    assert torch.equal(torch.cat([first.activations, second.activations]), torch.arange(1, 21.0).reshape(5, 2, 2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"values": torch.ones(19)}, r"values should have shape \(20,\), got \(19,\)"),
        ({"values": torch.ones(5, 4)}, r"should have shape \(n,\)"),
        ({"values": torch.ones(20, dtype=torch.float64)}, "fp32 or fp16, got torch.float64"),
        ({"values": torch.full((20,), torch.nan)}, "NaN or infinity"),
        ({"bitmap": torch.zeros(2, dtype=torch.uint8)}, r"bitmap should be uint8 of shape \(3,\)"),
        ({"bitmap": torch.zeros(3, dtype=torch.uint8)}, "as many as bits are set"),
        ({"labels": None}, r"missing entries \['labels'\]"),
        ({"stowaway": torch.ones(1)}, r"unexpected entries \['stowaway'\]"),
        ({"labels": torch.zeros(4, dtype=torch.uint8)}, r"labels should have shape \(5,\)"),
        ({"labels": torch.zeros(5)}, "labels should be torch.uint8"),
        ({"labels": torch.full((5,), 10, dtype=torch.uint8)}, "0 to 9, the output layer, got 10 to 10"),
        ({"steps": torch.tensor([[0, 5]])}, "steps should be int32"),
        ({"steps": torch.tensor([[0, -5]], dtype=torch.int32)}, "steps should be int32"),
        ({"steps": torch.tensor([[0, 5], [7, 0]], dtype=torch.int32)}, "step 7 has no samples"),
        (
            {"steps": torch.tensor([[0, 5]], dtype=torch.int32)},
            "at most 2 steps of at most 3 samples, got 1 of up to 5",
        ),
        ({"steps": torch.tensor([[0, 2], [1, 2], [2, 1]], dtype=torch.int32)}, "got 3 of up to 2"),
    ],
)
def test_a_truncated_or_misshapen_upload_is_refused_with_the_reason(changes, reason):
    with pytest.raises(ActivationError, match=reason):
        unpack_upload(upload(**changes), (2, 2), 10, 2, 3)


def test_a_bitmap_of_nothing_that_would_unfold_beyond_what_was_asked_for_is_not_unfolded(monkeypatch):
    monkeypatch.setattr("wire.smashed.decode", lambda *arguments: pytest.fail("unfolded"))
    packed = {"values": torch.zeros(0), "bitmap": torch.zeros(5000, dtype=torch.uint8)}
    steps = torch.tensor([[0, 10000]], dtype=torch.int32)
    with pytest.raises(ActivationError, match="at most 1 steps of at most 33 samples, got 1 of up to 10000"):
        unpack_upload(pack_upload(packed, torch.zeros(10000, dtype=torch.uint8), steps), (2, 2), 10, 1, 33)


def test_labels_are_as_narrow_as_the_output_layer_allows():
    assert label_type(256) == torch.uint8
    assert label_type(257) == torch.int32
