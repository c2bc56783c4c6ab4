"""FedBuff: a server step whenever K answers are in, weighted by age and not made to add up to one again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.loop import LoopConfig
from tests.strategies.scalar import PULL, Under, World, small_model

seconds = st.floats(0.1, 10, allow_nan=False)


def test_three_clients_and_a_buffer_of_two_by_hand():
    """Times 1, 1.4 and 4 s. Client 0 answers at 1 s and is asked again at once, from version 0; client 1 fills the
    buffer at 1.4 s. Then client 0 at 2 s, one version old, and client 1 at 2.8 s, fresh."""
    world = World([0.0, 2.0, 5.0], lambda pid, dispatch: (1.0, 1.4, 4.0)[pid])
    values = world.values(2, "fedbuff", buffer=2)
    assert world.arrivals() == [(0, 1.0, 0), (1, 1.4, 0), (0, 2.0, 1), (1, 2.8, 0)]
    first = 1 + (-0.1 + 0.1) / 2
    assert values[0] == pytest.approx(first)
    assert values[1] == pytest.approx(first + (2**-0.5 * -0.1 + PULL * (2.0 - first)) / 2, abs=1e-6)


def reference(
    world: World, num_merges: int, buffer: int, rate: float, is_refilled: bool
) -> tuple[list[float], list[tuple[int, float, int]]]:
    """Algorithm 1 of the paper; without refill, clients wait for the merge that they took part in."""
    under, theta, values, arrivals = Under(world), 1.0, [], []
    for pid in range(len(world.targets)):
        under.ask(pid, 0.0, 0, theta)
    for version in range(num_merges):
        total, waiting = 0.0, []
        for count in range(1, buffer + 1):
            job = under.next()
            age = version - job.version
            total += (1 + age) ** -0.5 * (world.pull(job.pid, job.start) - job.start)
            arrivals.append((job.pid, job.finish_s, age))
            if is_refilled and count < buffer:
                under.ask(job.pid, job.finish_s, version, theta)
            else:
                waiting.append(job.pid)
        theta += rate * total / buffer
        values.append(theta)
        for pid in sorted(waiting):
            under.ask(pid, job.finish_s, version + 1, theta)
    return values, arrivals


@settings(max_examples=8)
@given(
    st.lists(st.floats(-5, 5, allow_nan=False), min_size=3, max_size=4),
    st.lists(seconds, min_size=5, max_size=5),
    st.integers(1, 5),
    st.floats(0.1, 2.0),
    st.booleans(),
)
def test_it_is_the_papers_algorithm_for_any_targets_times_and_buffers(where, times, buffer, rate, is_refilled):
    buffer = buffer if is_refilled else min(buffer, len(where))
    world = World(where, lambda pid, dispatch: times[pid] + times[dispatch % 5] / 7)
    values, arrivals = reference(world, 6, buffer, rate, is_refilled)
    ask = "on-arrival" if is_refilled else "at-merge"
    got = world.values(6, "fedbuff", buffer=buffer, server_learning_rate=rate, ask=ask)
    assert got == pytest.approx(values, abs=1e-4)
    assert sorted(world.arrivals()) == sorted(arrivals)


def test_a_buffer_of_everybody_without_staleness_is_fedavg_of_equal_weights():
    world = World([0.0, 2.0, 5.0], lambda pid, dispatch: 1.0 + pid, examples=(3, 7, 2))
    buffered = world.values(5, "fedbuff", buffer=3, ask="at-merge")
    assert {staleness for _, _, staleness in world.arrivals()} == {0}
    assert buffered == pytest.approx(world.values(5, loop=LoopConfig(client_weight="equal")), abs=1e-6)
    assert buffered != pytest.approx(world.values(5), abs=1e-3), "equal weights and weights by examples are the same"


def test_an_old_buffer_moves_the_model_less_where_weights_alone_would_move_it_in_full():
    """Both clients are two versions old and agree: a mean of weights is their whole step, FedBuff's is 1/sqrt(3)."""
    times = lambda pid, dispatch: (1.0, 1.25, 3.0, 3.5)[pid]  # noqa: E731
    world = World([1.0, 1.0, 2.0, 2.0], times)
    full = LoopConfig(quorum=2, max_staleness=-1, staleness="polynomial:0.5")
    assert world.values(3, loop=full)[-1] == pytest.approx(1.1)
    scaled = LoopConfig(quorum=2, max_staleness=-1, staleness="polynomial:0.5", staleness_scales="step")
    assert world.values(3, loop=scaled)[-1] == pytest.approx(1 + 0.1 * 3**-0.5)
    assert [staleness for _, _, staleness in world.arrivals()][-2:] == [2, 2]


def test_an_entrys_buffer_is_those_who_hold_it():
    """HeteroFL with two levels: entries of the half model are the mean of two steps, the others one client's step."""
    world = World([0.0, 2.0], lambda pid, dispatch: 1.0 + pid)
    loop = LoopConfig(quorum=2, max_staleness=-1, staleness_scales="step", client_weight="equal")
    (state,) = world.run(1, "heterofl", loop, rates="1,0.5", mask_missing_labels=False)
    key = next(key for key, tensor in small_model()[0].items() if tensor.dim() == 2)
    assert torch.allclose(state[key][0], torch.ones(())), "0.9 of the one and 1.1 of the other"
    assert torch.allclose(state[key][-1], torch.full((), 0.9)), "of the wide one alone"
