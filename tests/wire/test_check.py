"""What a stranger may send: limits, types, and tensors without unpickling."""

from __future__ import annotations

import io
import json
import pickle
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from wire.check import Limits, WireError, check_head, to_tensor
from wire.flat import ConfigError
from wire.grid import record_to_report, report_to_record
from wire.message import Report
from wire.pack import TYPES, pack, unpack

REPORT = Report(3, 1, {"w": torch.arange(6.0).reshape(2, 3)}, 10, (4, 6), 1e9, 0.5, 77, {"loss": 0.3}, num_steps=2)


def saved(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3.0),
        np.arange(12, dtype=np.int64).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.zeros((0, 5), dtype=np.float16),
        np.array([True, False]),
        np.arange(3, dtype=">f4"),
    ],
)
def test_every_array_of_numbers_comes_back_as_it_went(array):
    tensor = to_tensor(saved(np.asarray(array)))
    assert tensor.shape == np.shape(array)
    assert np.array_equal(tensor.numpy(), array)


class Trap:
    """Says that it was unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a reply was unpickled",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Trap()),
        saved(np.array([Trap()], dtype=object), allow_pickle=True),
        b"",
        b"PK\x03\x04 a zip file",
        saved(np.zeros(4))[:-1],
        saved(np.zeros(4)) + b"more",
        saved(np.array(["text"])),
        saved(np.zeros(2, dtype="M8[s]")),
    ],
)
def test_nothing_is_unpickled_and_bytes_that_are_no_numbers_are_refused(data):
    with pytest.raises(WireError):
        to_tensor(data)


def test_a_header_that_promises_more_than_there_is_takes_no_memory():
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64
    with pytest.raises(WireError, match="has 64 bytes, expected 8000000000000"):
        to_tensor(data)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_an_error_and_nothing_else(data):
    with pytest.raises(WireError):
        to_tensor(data)


@given(st.binary(max_size=60), st.integers(0, 127))
def test_a_valid_array_with_a_spoiled_header_is_read_or_refused(noise, at):
    good = bytearray(saved(np.arange(8.0)))
    good[at : at + len(noise)] = noise
    with suppress(WireError):
        assert isinstance(to_tensor(bytes(good)), torch.Tensor)


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (Limits(max_reply_bytes=100), "bytes of tensors, at most 100 allowed"),
        (Limits(max_reply_tensors=1), "2 tensors, at most 1 allowed"),
        (Limits(max_reply_text=20), "characters of text, at most 20 allowed"),
    ],
)
def test_a_reply_over_a_limit_is_refused_before_it_is_decoded(limits, what):
    record = report_to_record(replace(REPORT, state={"w": torch.zeros(3, 3), "v": torch.zeros(5)}))
    with pytest.raises(WireError, match=what):
        record_to_report(record, limits)


@pytest.mark.parametrize(
    "index",
    [
        None,
        [],
        [["w", "float32", [2, 4]]],
        [["w", "float32", [2, 3]], ["w", "float32", [0]]],
        [["w", "object", [6]]],
        [["w", "float32", [-2, -3]]],
        [["w", "float32", 6]],
        [["w", "float32", [2**50, 0]]],
        [[3, "float32", [2, 3]]],
        ["w"],
        "w",
    ],
)
def test_an_index_that_is_not_of_the_bytes_that_came_is_refused(index):
    with pytest.raises(WireError):
        record_to_report(spoiled(index={"state": index}))


@pytest.mark.parametrize("array", [np.zeros(24), np.zeros((2, 12), dtype=np.uint8)])
def test_a_block_that_is_no_row_of_bytes_is_refused(array):
    record = report_to_record(REPORT)
    record["state"] = ArrayRecord({"block": Array(array)})
    with pytest.raises(WireError, match="row of bytes"):
        record_to_report(record)


@pytest.mark.parametrize("dtype", TYPES.values())
def test_tensors_of_every_type_come_back_in_order_and_with_memory_of_their_own(dtype):
    state = {"b": torch.ones(2, 3).to(dtype), "a": torch.zeros((), dtype=dtype), "0": torch.zeros(0, 4, dtype=dtype)}
    block, index = pack(state)
    found = unpack(torch.from_numpy(block), json.loads(json.dumps(index)))
    assert list(found) == list(state)
    for key, tensor in state.items():
        assert torch.equal(found[key], tensor)
        assert found[key].dtype == dtype
        assert found[key].untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_message_is_one_array_however_many_tensors_it_has():
    """Each array costs round trips of its own in deployment."""
    record = report_to_record(replace(REPORT, state={str(n): torch.zeros(2) for n in range(100)}))
    assert [len(record[name]) for name in record if name == "state"] == [1]
    assert "companions" not in record


@pytest.mark.parametrize("metrics", [{f"m{n}": 1.0 for n in range(1001)}, {"x" * 201: 1.0}])
def test_too_many_metrics_and_names_too_long_are_refused(metrics):
    record = report_to_record(REPORT)
    record["metrics"] = MetricRecord(metrics)
    with pytest.raises(WireError, match="metric"):
        record_to_report(record)


def spoiled(**changes) -> RecordDict:
    record = report_to_record(REPORT)
    head = json.loads(str(record["head"]["json"])) | changes
    record["head"] = ConfigRecord({"json": json.dumps({k: v for k, v in head.items() if v != "absent"})})
    return record


@pytest.mark.parametrize(
    "changes",
    [
        {"num_examples": "many"},
        {"num_examples": 1.5},
        {"num_examples": 10**400},
        {"dispatch": True},
        {"compute_s": None},
        {"train_macs": [1.0]},
        {"is_delta": 1},
        {"label_counts": {"0": 4}},
        {"label_counts": [-1]},
        {"narrowed": 7},
        {"busy_s": "absent"},
    ],
)
def test_a_field_of_another_type_is_refused_with_its_name(changes):
    with pytest.raises(WireError, match=next(iter(changes))):
        record_to_report(spoiled(**changes))


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="stowaway"):
        record_to_report(spoiled(stowaway=1))


def test_a_good_head_passes():
    assert check_head(json.loads(str(report_to_record(REPORT)["head"]["json"])))["label_counts"] == (4, 6)


def test_limits_must_let_something_through():
    with pytest.raises(ConfigError, match="max-reply-bytes"):
        Limits(max_reply_bytes=0)
