"""Who may upload: worked out by hand, and against a simulation written another way."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.split.orchestrator import SELECTIONS, Arm, Orchestrator, choose, num_granted, score, update_arm


def test_two_decisions_by_hand():
    """Clients 0 and 1, one served each time, gamma 1/2, losses 2 and 4."""
    state, first = choose("ucb", Orchestrator(), {}, [0, 1], 1, gamma=0.5)
    other = 1 - first[0]
    state, second = choose("ucb", state, {first[0]: 2.0}, [0, 1], 1, gamma=0.5)
    assert second == (other,)  # never served: infinite
    assert state.arms[first[0]] == Arm(2.0, 1.0, 2.0, 100.0, False, 1)
    assert state.arms[other] == Arm(100.0, 0.0, 100.0, 100.0, True, 2)
    state, third = choose("ucb", state, {other: 4.0}, [0, 1], 1, gamma=0.5)
    served, late = state.arms[first[0]], state.arms[other]
    # imputed (2 + 100) / 2 = 51: l = 1 + 51, c = 1/2;  served: l = 50 + 4, c = 1
    assert (served.loss_sum, served.serve_count, served.last) == (52.0, 0.5, 51.0)
    assert (late.loss_sum, late.serve_count, late.last) == (54.0, 1.0, 4.0)
    assert score(served, 3) == pytest.approx(52 / 0.5 + math.sqrt(2 * math.log(3) / 0.5))
    assert third == first


@given(st.lists(st.lists(st.one_of(st.none(), st.floats(0, 50)), min_size=4, max_size=4), min_size=1, max_size=12))
def test_sums_are_those_of_the_definition(history):
    """l_t = sum gamma^(t - t') L_t', c_t = sum gamma^(t - t') S_t', losses imputed, from the whole past."""
    gamma = 0.87
    for client in range(4):
        arm, values, served = Arm(), [100.0, 100.0], []
        for row in history:
            arm = update_arm(arm, row[client], gamma)
            values.append((values[-1] + values[-2]) / 2 if row[client] is None else row[client])
            served.append(row[client] is not None)
        ages = range(len(served) - 1, -1, -1)
        assert arm.loss_sum == pytest.approx(sum(gamma**a * v for a, v in zip(ages, values[2:], strict=True)))
        assert arm.serve_count == pytest.approx(sum(gamma**a * s for a, s in zip(ages, served, strict=True)))
        assert arm.is_new == (not any(served))


@pytest.mark.parametrize("kind", SELECTIONS)
@given(clients=st.sets(st.integers(0, 30), min_size=1, max_size=12), num=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_rule_chooses_as_many_as_asked_among_those_offered_and_the_same_again(kind, clients, num, seed):
    offered = sorted(clients)
    state, chosen = choose(kind, Orchestrator(), {}, offered, num, seed=seed)
    assert set(chosen) <= clients
    assert len(chosen) == (len(clients) if kind == "all" else min(num, len(clients)))
    assert choose(kind, Orchestrator(), {}, offered, num, seed=seed) == (state, chosen)


def run(kind: str, num_decisions: int, losses: dict[int, float], k: int = 1) -> list[tuple[int, ...]]:
    state, seen, picks = Orchestrator(), {}, []
    for _ in range(num_decisions):
        state, chosen = choose(kind, state, seen, list(losses), k)
        seen = {pid: losses[pid] for pid in chosen}
        picks.append(chosen)
    return picks


def test_everybody_is_served_before_anybody_twice():
    for kind in ("ucb", "round-robin"):
        assert sorted(pid for pick in run(kind, 5, dict.fromkeys(range(5), 1.0)) for pid in pick) == list(range(5))


@pytest.mark.parametrize(("num_clients", "k"), [(5, 3), (4, 1), (10, 3)])
def test_everybody_is_served_before_anybody_twice_while_losses_are_a_decision_late(num_clients, k):
    clients = range(num_clients)
    for seed in range(10):
        state, waiting, chosen, seen = Orchestrator(), {}, (), set()
        while seen != set(clients):
            losses, waiting = waiting, dict.fromkeys(chosen, 1.0)
            state, chosen = choose("ucb", state, losses, clients, k, seed=seed)
            fresh = set(chosen) - seen
            assert len(fresh) == min(k, num_clients - len(seen)), "nobody twice while somebody waits"
            seen |= fresh


def test_a_grant_that_nothing_came_of_leaves_a_client_before_those_already_served():
    state, first = choose("ucb", Orchestrator(), {}, [0, 1], 1)
    state, second = choose("ucb", state, {}, [0, 1], 1)
    _, third = choose("ucb", state, {second[0]: 1.0}, [0, 1], 1)
    assert (second, third) == ((1 - first[0],), first)


def test_round_robin_goes_round_even_while_losses_are_late():
    state, picks = Orchestrator(), []
    for _ in range(6):
        state, chosen = choose("round-robin", state, {}, [0, 1, 2], 1)
        picks += chosen
    assert picks == [0, 1, 2, 0, 1, 2]


def test_a_client_with_a_larger_loss_is_served_more_often_and_nobody_is_forgotten():
    picks = [pid for pick in run("ucb", 400, {0: 1.0, 1: 1.0, 2: 8.0}) for pid in pick]
    counts = [picks.count(pid) for pid in range(3)]
    assert counts[2] > counts[0]
    assert min(counts) > 10


def test_ties_are_drawn_by_the_seed():
    firsts = {choose("ucb", Orchestrator(), {}, range(6), 1, seed=seed)[1] for seed in range(20)}
    assert len(firsts) > 2


def test_a_granted_client_that_never_uploaded_counts_as_not_served():
    state, chosen = choose("all", Orchestrator(), {}, [0, 1], 2)
    state, _ = choose("all", state, {0: 3.0}, [0, 1], 2)
    assert state.arms[1].is_new
    assert state.arms[1].last == 100.0
    assert not state.arms[0].is_new
    assert chosen == (0, 1)


def test_the_state_survives_a_checkpoint():
    state, _ = choose("ucb", Orchestrator(), {}, [3, 1], 1)
    state, _ = choose("ucb", state, {1: 2.5}, [3, 1], 1)
    assert Orchestrator.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize(
    ("eta", "num_clients", "expected"),
    [(0.6, 5, 3), (0.5, 5, 3), (0.01, 5, 1), (1, 5, 5), (0.3, 50, 15), (0.58, 25, 15)],
)
def test_as_many_are_granted_as_eta_says_and_at_least_one(eta, num_clients, expected):
    assert num_granted(eta, num_clients) == expected
