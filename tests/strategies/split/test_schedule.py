"""Phases and stretches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.split.schedule import Stretch, num_local_rounds, stretch_at


@pytest.mark.parametrize(
    ("kappa", "rounds", "expected"), [(0.6, 20, 12), (0.29, 100, 29), (0.3, 2, 0), (0.99, 20, 19), (0.7, 10, 7)]
)
def test_the_local_phase_has_floor_kappa_r_rounds(kappa, rounds, expected):
    assert num_local_rounds(kappa, rounds) == expected


@pytest.mark.parametrize("rounds", [1, 3, 100])
def test_a_kappa_below_1_leaves_the_server_a_round_however_close_it_is(rounds):
    assert num_local_rounds(1 - 1e-12, rounds) == rounds - 1


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 20))
def test_stretches_cover_every_step_once_and_no_upload_is_too_long(num_steps, num_segments, max_steps):
    start, decisions, found = 0, 0, []
    while (stretch := stretch_at(start, num_steps, num_segments, max_steps)) is not None:
        found.append(stretch)
        assert stretch.start == start
        assert 1 <= stretch.stop - stretch.start <= max_steps
        decisions += stretch.decides
        start = stretch.stop
    assert start == num_steps
    assert found[0].decides
    assert decisions == min(num_segments, num_steps)


def test_by_hand_ten_steps_in_four_segments_of_at_most_two_steps():
    found, start = [], 0
    while (stretch := stretch_at(start, 10, 4, 2)) is not None:
        found.append((stretch.start, stretch.stop, stretch.decides))
        start = stretch.stop
    assert found == [(0, 2, True), (2, 3, False), (3, 5, True), (5, 7, True), (7, 8, False), (8, 10, True)]


def test_while_nobody_knows_the_length_stretches_go_on_and_only_the_first_decides():
    assert stretch_at(0, None, 1, 7) == Stretch(0, 7, True)
    assert stretch_at(7, None, 1, 7) == Stretch(7, 14, False)
