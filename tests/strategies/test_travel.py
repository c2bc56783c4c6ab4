"""Link speed and engine overhead from round trips alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.clock import Duration
from pruning.spec import FULL
from strategies.exchange import Entry, Exchange
from strategies.travel import TravelModel, line_below
from wire.message import Failure, Instruction, Report

points = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, 2.0, 5.0, 9.0]), st.floats(0, 100, allow_subnormal=False)),
    min_size=1,
    max_size=12,
)


def test_the_line_by_hand():
    assert line_below([(0, 3), (0, 1), (10, 6), (10, 9)]) == (1, 0.5)


def test_one_size_tells_nothing_about_the_link():
    assert line_below([(7, 3), (7, 2)]) == (2, 0)


def test_nothing_seen_is_nothing_known():
    assert TravelModel().transfer_s(3, 1e9) == 0


@given(points)
def test_the_line_lies_below_all_points_and_no_pair_of_points_makes_a_higher_one(points):
    intercept, slope = line_below(points)
    assert slope >= 0
    assert all(intercept + slope * x <= y + 1e-6 for x, y in points)
    mean_x = sum(x for x, _ in points) / len(points)
    for x0, y0 in points:
        for x1, y1 in points:
            if x1 > x0 and y1 >= y0:
                steep = (y1 - y0) / (x1 - x0)
                if all(y0 + steep * (x - x0) <= y for x, y in points):
                    assert y0 + steep * (mean_x - x0) <= intercept + slope * mean_x + 1e-6


def test_polling_and_process_starts_do_not_count_as_the_link():
    """A link of 1 MB/s behind an engine that takes 2 s and polls every half a second: learned to 10 %."""
    rng = np.random.default_rng(0)
    model = TravelModel()
    for num_bytes in [0] * 4 + [400_000] * 8 + [900_000] * 8:
        model.observe(1, num_bytes, 2 + num_bytes / 1e6 + rng.uniform(0, 0.5))
    assert model.transfer_s(1, 800_000) == pytest.approx(0.8, rel=0.1)


def test_one_unlucky_round_trip_does_not_pass_for_a_slow_link_but_a_slow_link_is_known_at_once():
    unlucky, slow = TravelModel(), TravelModel()
    for model, loaded_s in ((unlucky, 9.0), (slow, 40.0)):
        for travel_s in (4.0, 10.0):
            model.observe(0, 0, travel_s)
        model.observe(0, 1e6, loaded_s)
    assert unlucky.transfer_s(0, 1e6) == 0
    assert slow.transfer_s(0, 1e6) == pytest.approx(30)


def test_a_link_that_becomes_slower_is_believed_after_a_window():
    model = TravelModel(window=4)
    for speed in (1e6, 1e5):
        for num_bytes in (0, 1_000_000, 500_000, 1_000_000, 500_000):
            model.observe(0, num_bytes, 1 + num_bytes / speed)
    assert model.transfer_s(0, 1e6) == pytest.approx(10)


def learned_s(model: TravelModel, num_bytes: float, num_messages: int, speed: float, rng) -> list[float]:
    """What the model says after each of some equal messages, over a link behind an engine that takes 2 s and polls."""
    found = []
    for _ in range(num_messages):
        model.observe(0, num_bytes, 2 + num_bytes / speed + rng.uniform(0, 0.5))
        found.append(model.transfer_s(0, num_bytes))
    return found


def test_messages_of_one_size_however_many_never_make_the_link_forgotten():
    """1 MB over 4 s: only the three probes of the beginning tell the link from the engine."""
    rng, model = np.random.default_rng(0), TravelModel()
    for _ in range(3):
        model.observe(0, 0, 2 + rng.uniform(0, 0.5))
    found = learned_s(model, 1e6, 100, 0.25e6, rng)
    assert found[-1] == pytest.approx(4, rel=0.1)
    assert all(transfer_s > 3 for transfer_s in found)


def test_a_link_that_changes_is_followed_through_messages_of_one_size():
    rng, model = np.random.default_rng(0), TravelModel()
    for _ in range(3):
        model.observe(0, 0, 2 + rng.uniform(0, 0.5))
    learned_s(model, 1e6, 50, 1e6, rng)
    assert learned_s(model, 1e6, 32, 0.1e6, rng)[-1] == pytest.approx(10, rel=0.1)  # slower: after a window
    assert learned_s(model, 1e6, 1, 1e6, rng)[-1] == pytest.approx(1, rel=0.5)  # faster: no trip can take too little


def test_probes_of_a_client_that_joins_again_count_as_well():
    """Its engine has become faster: what takes longer than an empty trip of now is the link."""
    model = TravelModel()
    for empty_s in (5.0, 5.0, 1.0):
        model.observe(0, 0, empty_s)
    for _ in range(40):
        model.observe(0, 1e6, 3.0)
    assert model.transfer_s(0, 1e6) == pytest.approx(2)


class Wall:
    """A transport on a clock that the test moves: answers are handed over when it says."""

    window = 4

    def __init__(self, trips: list[tuple[int, float]]) -> None:
        self.trips, self.sent, self.ready = trips, [], []

    def clients(self) -> list[int]:
        return [0, 1]

    def send(self, instruction: Instruction) -> None:
        self.sent.append(instruction)

    def receive(self, timeout_s: float) -> list[Report | Failure]:
        ready, self.ready = self.ready, []
        return ready

    def empty_trips(self) -> list[tuple[int, float]]:
        trips, self.trips = self.trips, []
        return trips

    def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch):
    """A wall clock that stands still until told."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def settled(transport: Wall, clock: list[float], elapsed_s: float, make_report) -> tuple[Duration, float]:
    exchange = Exchange(transport, None)
    entry = Entry(-1, 0, 1, 0, FULL, exchange.now_s, 0)
    number = exchange.dispatch(
        lambda n: Instruction("train", n, 0, 1, 0, None, {}),  # type: ignore[arg-type]
        lambda n: Entry(n, *[getattr(entry, f) for f in list(entry.__dataclass_fields__)[1:]]),
    )
    clock[0] += elapsed_s
    transport.ready = [make_report(number)]
    arrival = exchange.next_arrival()
    assert arrival is not None
    return arrival.duration, arrival.overhead_s


def test_overhead_of_the_engine_is_no_part_of_the_update_time(clock):
    """9 s away, 5 s at work of which 3 s training: 4 s of travel, none of it explained by bytes."""
    duration, overhead_s = settled(
        Wall([(0, 4.0)]), clock, 9.0, lambda n: Report(n, 0, {}, 5, compute_s=3.0, busy_s=5.0)
    )
    assert duration == Duration(0, 3, 0)
    assert overhead_s == pytest.approx(6)


@pytest.mark.parametrize(("compute_s", "busy_s"), [(50.0, 1.0), (1.0, 50.0), (float("nan"), 1.0), (-4.0, 2.0)])
def test_a_client_cannot_have_worked_longer_than_it_was_away(clock, compute_s, busy_s):
    duration, overhead_s = settled(
        Wall([]), clock, 2.0, lambda n: Report(n, 0, {}, 5, compute_s=compute_s, busy_s=busy_s)
    )
    assert 0 <= duration.update_time_s <= 2
    assert duration.update_time_s + overhead_s == pytest.approx(2)


def test_a_failure_says_nothing_about_the_device(clock):
    duration, overhead_s = settled(Wall([]), clock, 7.0, lambda n: Failure(n, 0, "gone"))
    assert (duration.update_time_s, overhead_s) == (0, pytest.approx(7))
