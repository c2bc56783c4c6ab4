"""What a stranger may send: limits, types, and tensors without unpickling."""

from __future__ import annotations

import io
import json
import pickle
from contextlib import suppress

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
    record = report_to_record(REPORT)
    record["state"] = ArrayRecord({"w": Array("float32", (2,), "numpy.ndarray", b"x" * 90), "v": Array(np.zeros(2))})
    with pytest.raises(WireError, match=what):
        record_to_report(record, limits)


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
