"""Numbers for people."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reporting.units import (
    MISSING,
    format_bytes,
    format_count,
    format_factor,
    format_memory,
    format_percent,
    format_ratio,
    format_seconds,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_seconds(0.84), "840 ms"),
        (format_seconds(0.9996), "1.0 s"),
        (format_seconds(12.44), "12.4 s"),
        (format_seconds(99.96), "1 min 40 s"),
        (format_seconds(3599.7), "1 h 00 min"),
        (format_seconds(93600), "1 d 2 h"),
        (format_bytes(999), "999 B"),
        (format_bytes(999_600), "1.00 MB"),
        (format_bytes(3_210_000), "3.21 MB"),
        (format_count(11_172_170), "11.2 M"),
        (format_memory(4 * 2**30), "4.00 GiB"),
        (format_percent(0.9544), "95.4 %"),
        (format_factor(2.506), "2.51×"),
        (format_ratio(0.0625), "0.062"),
        (format_ratio(0.5), "0.50"),
        (format_ratio(1.0), "1.00"),
    ],
)
def test_amounts_read_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


@given(st.one_of(st.none(), st.just(math.nan), st.just(math.inf)))
def test_what_is_not_known_is_a_dash(value: float | None) -> None:
    for show in (
        format_seconds,
        format_bytes,
        format_count,
        format_memory,
        format_percent,
        format_factor,
        format_ratio,
    ):
        assert show(value) == MISSING


@given(st.floats(0, 1e15))
def test_three_digits_are_never_exceeded_before_a_prefix(value: float) -> None:
    assert len(format_bytes(value).split()[0].replace(".", "")) <= 3
