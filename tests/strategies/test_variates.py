"""The server's half of control variates: means over holders, by hand and on random sub-models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.extract import embed, extract
from pruning.groups import Axis, Group, Layout
from pruning.spec import FULL, SubModelSpec
from strategies.variates import VariateError, Variates
from wire.training import VARIATE

LAYOUT = Layout((Group("inner", 4, (Axis("a", 0), Axis("b", 1), Axis("mean", 0))),))
STATE = {"a": torch.ones(4), "b": torch.ones(2, 4), "mean": torch.ones(4), "n": torch.tensor(3)}
HALF = SubModelSpec.of({"inner": [0, 2]})


def sent(spec: SubModelSpec, **values: float) -> dict[str, torch.Tensor]:
    """A change with one value in every entry of each parameter."""
    part = extract(STATE, LAYOUT, spec)
    return {VARIATE + key: torch.full(part[key].shape, value) for key, value in values.items()}


def make(specs: dict[int, SubModelSpec]) -> Variates:
    return Variates(STATE, LAYOUT, {"a", "b"}, specs)


def arrive(variates: Variates, pid: int, companions: dict[str, torch.Tensor], weight: float = 1.0, narrowed=None):
    variates.add(variates.change(pid, companions, narrowed), weight)


def test_the_papers_mean_over_all_clients_by_hand():
    """Four equal clients, two of which answer: c = (2 + 6) / 4, then client 0 moves by -4: c = (2 + 6 - 4) / 4."""
    variates = make(dict.fromkeys(range(4), FULL))
    arrive(variates, 0, sent(FULL, a=2.0, b=2.0))
    arrive(variates, 1, sent(FULL, a=6.0, b=6.0))
    assert variates.value["a"].tolist() == [0.0] * 4, "c holds for the whole round"
    variates.close()
    assert variates.value["a"].tolist() == [2.0] * 4
    arrive(variates, 0, sent(FULL, a=-4.0, b=-4.0))
    variates.close()
    assert variates.value["b"].flatten().tolist() == [1.0] * 8


def test_an_entry_is_averaged_over_those_who_hold_it_with_their_weights():
    """Client 0 (weight 3) holds everything, client 1 (weight 1) units 0 and 2."""
    variates = make({0: FULL, 1: HALF})
    arrive(variates, 0, sent(FULL, a=1.0, b=1.0), 3.0)
    arrive(variates, 1, sent(HALF, a=5.0, b=9.0), 1.0)
    variates.close()
    assert variates.value["a"].tolist() == [2.0, 1.0, 2.0, 1.0]
    assert variates.value["b"].tolist() == [[3.0, 1.0, 3.0, 1.0]] * 2


def test_a_client_not_heard_of_yet_counts_with_the_others_mean_weight():
    variates = make(dict.fromkeys(range(3), FULL))
    arrive(variates, 0, sent(FULL, a=3.0, b=3.0), 10.0)
    arrive(variates, 1, sent(FULL, a=3.0, b=3.0), 20.0)
    variates.close()
    torch.testing.assert_close(variates.value["a"], torch.full((4,), 2.0))
    arrive(variates, 2, sent(FULL, a=0.0, b=0.0), 60.0)
    variates.close()
    torch.testing.assert_close(variates.value["a"], torch.full((4,), 1.0))


def test_requests_carry_the_part_of_c_that_their_sub_model_holds_and_no_buffers():
    variates = make({0: FULL})
    old = variates.companions(HALF)
    change = {VARIATE + "a": torch.arange(4.0), VARIATE + "b": torch.arange(8.0).view(2, 4)}
    arrive(variates, 0, change)
    variates.close()
    new = variates.companions(HALF)()
    assert new.keys() == {VARIATE + "a", VARIATE + "b"}
    assert new[VARIATE + "a"].tolist() == [0.0, 2.0]
    assert new[VARIATE + "b"].tolist() == [[0.0, 2.0], [4.0, 6.0]]
    assert old()[VARIATE + "a"].tolist() == [0.0, 0.0], "a request planned before carries the c of its time"


def test_a_part_that_a_client_chose_itself_leaves_the_rest_of_its_variate_alone():
    variates = make({0: FULL, 1: FULL})
    for pid in (0, 1):
        arrive(variates, pid, sent(FULL, a=2.0, b=2.0))
    arrive(variates, 0, sent(HALF, a=2.0, b=2.0), narrowed=HALF)
    variates.close()
    assert variates.value["a"].tolist() == [3.0, 2.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"missing entries \['a', 'b'\]"),
        ({"a": torch.ones(4)}, r"missing entries \['b'\]"),
        ({"a": torch.ones(4), "b": torch.ones(2, 4), "mean": torch.ones(4)}, r"unexpected entries \['mean'\]"),
        ({"a": torch.ones(4), "b": torch.ones(2, 3)}, r"'b' should be real with shape \(2, 4\)"),
        ({"a": torch.ones(4, dtype=torch.complex64), "b": torch.ones(2, 4)}, "'a' should be real.*complex64"),
    ],
)
def test_a_change_that_does_not_fit_is_turned_away_and_changes_nothing(change, message):
    variates = make({0: FULL})
    with pytest.raises(VariateError, match=message):
        variates.change(0, {VARIATE + key: tensor for key, tensor in change.items()})
    variates.close()
    assert all(not tensor.any() for tensor in variates.value.values())


units = st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)


@given(st.lists(st.tuples(units, st.floats(0.1, 100)), min_size=1, max_size=5), st.integers(0, 10**6))
def test_the_weighted_corrections_of_those_who_hold_an_entry_cancel(clients, seed):
    """Over several rounds with whoever comes: sum_i w_i m_ik (c_k - c_ik) = 0, and c is the mean of the c_i."""
    generator = torch.Generator().manual_seed(seed)
    specs = {pid: SubModelSpec.of({"inner": kept}) for pid, (kept, _) in enumerate(clients)}
    weights = {pid: weight for pid, (_, weight) in enumerate(clients)}
    variates = make(specs)
    own = {pid: {key: torch.zeros(STATE[key].shape) for key in ("a", "b")} for pid in specs}
    for server_round in range(3):
        for pid, spec in specs.items():
            if server_round and torch.rand((), generator=generator) < 0.5:
                continue
            part = {k: torch.randn(t.shape, generator=generator) for k, t in extract(own[pid], LAYOUT, spec).items()}
            arrive(variates, pid, {VARIATE + k: t for k, t in part.items()}, weights[pid])
            moved = {k: t + part[k] for k, t in extract(own[pid], LAYOUT, spec).items()}
            own[pid] = embed(moved, LAYOUT, spec, own[pid])[0]
        variates.close()
    for key in ("a", "b"):
        rest, total, held = (torch.zeros(STATE[key].shape) for _ in range(3))
        for pid, spec in specs.items():
            mask = embed(extract(own[pid], LAYOUT, spec), LAYOUT, spec, own[pid])[1][key]
            rest += weights[pid] * mask * (variates.value[key] - own[pid][key])
            total += weights[pid] * mask * own[pid][key]
            held += weights[pid] * mask
        torch.testing.assert_close(rest / held.clamp(min=1), torch.zeros_like(rest), atol=1e-4, rtol=0)
        torch.testing.assert_close(variates.value[key], total / held.clamp(min=1e-9), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_brings_back_c_and_what_it_is_the_mean_of():
    variates = make({0: FULL, 1: HALF})
    arrive(variates, 0, sent(FULL, a=1.0, b=1.0), 3.0)
    variates.close()
    again = make({0: FULL, 1: HALF})
    again.import_state(variates.export_state())
    for one in (variates, again):
        arrive(one, 1, sent(HALF, a=5.0, b=9.0), 7.0)
        one.close()
    assert all(torch.equal(variates.value[key], again.value[key]) for key in ("a", "b"))
