"""SCAFFOLD: the server against what clients remember, the optimum that FedAvg misses, and what is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client_app.handler import handle
from client_app.store import ClientStore
from pruning.extract import embed, extract
from server_app.checkpoint import load_checkpoint
from tests.marks import slow_but
from tests.runs import equal_states, final_state, select, tiny_run
from tests.strategies.quadratic import Parabola, bottom_of_the_mean, converged
from wire.flat import ConfigError
from wire.message import Instruction, Report
from wire.training import VARIATE
from zoo import get_model

UNEQUAL = {"data.partition": "dirichlet:0.5", "data.min-size": 20}


class Watched:
    """Handles requests and notes them; ``spoil`` may change an answer or raise."""

    def __init__(self, spoil: Callable[[Instruction, Report], Report] = lambda instruction, report: report) -> None:
        self.spoil = spoil
        self.asked: dict[int, dict[int, Instruction]] = defaultdict(dict)
        self.reports: dict[int, dict[int, Report]] = defaultdict(dict)

    def __call__(self, instruction: Instruction) -> Report:
        self.asked[instruction.server_round][instruction.partition_id] = instruction
        report = self.spoil(instruction, handle(instruction))
        self.reports[instruction.server_round][instruction.partition_id] = report
        return report


def remembered(folder: Path, asked: dict[int, Instruction], pid: int) -> dict[str, Tensor]:
    """c_i as the client that is asked will find it; full coordinates."""
    memory = ClientStore(str(folder / "clients"), pid).load(asked[pid].last_dispatch)
    return memory["objective"]["variates"] if memory else {}


def whole(key: str) -> Tensor:
    return torch.zeros(dict(get_model("mlp", 10, 1, 8)[0].named_parameters())[key].shape)


KEYS = [name for name, _ in get_model("mlp", 10, 1, 8)[0].named_parameters()]


@pytest.mark.parametrize("model", slow_but(("mlp",), ("mlp", "cnn")))
def test_the_first_round_is_fedavgs_to_the_bit(model, tmp_path):
    settings = {**UNEQUAL, "model.name": model, "num-rounds": 1}
    tiny_run(tmp_path / "a", strategy="scaffold", **settings)
    tiny_run(tmp_path / "b", strategy="fedavg", **settings)
    assert equal_states(final_state(tmp_path / "a"), final_state(tmp_path / "b"))
    tiny_run(tmp_path / "c", strategy="scaffold", **{**settings, "num-rounds": 2})
    tiny_run(tmp_path / "d", strategy="fedavg", **{**settings, "num-rounds": 2})
    assert not equal_states(final_state(tmp_path / "c"), final_state(tmp_path / "d"))


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_c_is_the_mean_of_what_all_clients_remember(weights, tmp_path):
    watched = Watched()
    tiny_run(tmp_path, watched, strategy="scaffold", loop__client_weight=weights, num_rounds=4, **UNEQUAL)
    asked = watched.asked[4]
    counts = {pid: report.num_examples if weights == "examples" else 1 for pid, report in watched.reports[1].items()}
    assert weights == "equal" or len(set(counts.values())) > 1
    own = {pid: remembered(tmp_path, asked, pid) for pid in asked}
    for key in KEYS:
        mean = sum(counts[pid] * own[pid][key].double() for pid in own) / sum(counts.values())
        assert mean.abs().max() > 1e-3
        for pid in asked:
            torch.testing.assert_close(asked[pid].companions[VARIATE + key].double(), mean, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_a_merge_is_the_papers_step_with_the_same_weights(weights, tmp_path):
    watched = Watched()
    tiny_run(tmp_path, watched, strategy="scaffold", loop__client_weight=weights, num_rounds=3, **UNEQUAL)
    reports, asked = watched.reports[3], watched.asked[3]
    counts = {pid: report.num_examples if weights == "examples" else 1 for pid, report in reports.items()}
    for key, tensor in final_state(tmp_path).items():
        x = asked[0].state[key].double()
        step = sum(counts[pid] * (reports[pid].state[key].double() - x) for pid in reports) / sum(counts.values())
        torch.testing.assert_close(tensor.double(), x + step, atol=1e-6, rtol=1e-5)


def test_clients_that_are_not_asked_keep_their_share_of_c(tmp_path):
    """c = sum over all clients of w_i c_i / sum w_i; one never heard of is zero, and weighs what the others do."""
    watched = Watched()
    tiny_run(tmp_path, watched, strategy="scaffold", loop__clients_per_round=2, num_clients=5, num_rounds=6, **UNEQUAL)
    counts: dict[int, int] = {}
    for server_round in range(1, 7):
        asked = watched.asked[server_round]
        typical = sum(counts.values()) / len(counts) if counts else 1.0
        total = sum(counts.values()) + (5 - len(counts)) * typical
        known = {pid: dispatched(watched, pid, server_round) for pid in counts}
        for key in KEYS:
            mean = (
                sum((counts[pid] * c[key].double() for pid, c in known.items()), torch.zeros((), dtype=torch.float64))
                / total
            )
            for instruction in asked.values():
                sent = instruction.companions[VARIATE + key].double()
                torch.testing.assert_close(sent, mean.expand_as(sent), atol=1e-6, rtol=1e-4)
        counts |= {pid: report.num_examples for pid, report in watched.reports[server_round].items()}
    assert 2 < len(counts) <= 5


def dispatched(watched: Watched, pid: int, before: int) -> dict[str, Tensor]:
    """c_i as the sum of all changes that a client reported before a round."""
    changes = [r[pid].companions for n, r in sorted(watched.reports.items()) if n < before and pid in r]
    return {key: sum(change[VARIATE + key] for change in changes) for key in KEYS}


def test_on_levels_c_is_the_mean_over_those_who_hold_an_entry(tmp_path):
    watched = Watched()
    tiny_run(
        tmp_path, watched, strategy="scaffold", scaffold__rates="1,0.5,0.25", num_clients=6, num_rounds=3, **UNEQUAL
    )
    _, layout = get_model("mlp", 10, 1, 8)
    asked, counts = watched.asked[3], {pid: r.num_examples for pid, r in watched.reports[1].items()}
    state = {key: whole(key) for key in KEYS}
    total, held = ({key: torch.zeros(t.shape, dtype=torch.float64) for key, t in state.items()} for _ in range(2))
    for pid, instruction in asked.items():
        mask = embed(extract(state, layout, instruction.spec), layout, instruction.spec, state)[1]
        own = remembered(tmp_path, asked, pid)
        for key in KEYS:
            assert not own[key][~mask[key]].any()
            total[key] += counts[pid] * own[key].double()
            held[key] += counts[pid] * mask[key]
    mean = {key: (total[key] / held[key]).float() for key in KEYS}
    assert len({instruction.spec for instruction in asked.values()}) == 3
    for instruction in asked.values():
        for key, tensor in extract(mean, layout, instruction.spec).items():
            torch.testing.assert_close(instruction.companions[VARIATE + key], tensor, atol=1e-6, rtol=1e-4)


def test_in_a_buffered_loop_c_is_still_the_mean_of_what_clients_remember(tmp_path):
    """Some answers are stale, some clients answer twice before a merge; none of it matters to the sums."""
    watched = Watched()
    loop: dict[str, Any] = {"loop.ask": "on-arrival", "loop.quorum": 3, "loop.max-staleness": -1}
    rows = tiny_run(tmp_path, watched, strategy="scaffold", num_rounds=6, num_clients=5, **loop, **UNEQUAL)
    assert any(row["staleness"] for row in select(rows, "arrival"))
    own_state, progress = (load_checkpoint(tmp_path)[i] for i in (1, 0))
    counts = {row["partition_id"]: row["num_examples"] for row in select(rows, "arrival")}
    merged = {pid: ClientStore(str(tmp_path / "clients"), pid).load(d) for pid, d in progress.last_dispatch.items()}
    for key in KEYS:
        total = sum(counts[pid] * memory["objective"]["variates"][key].double() for pid, memory in merged.items())
        torch.testing.assert_close(own_state["totals"][key].double(), total, atol=1e-3, rtol=1e-4)


def poisoned(instruction: Instruction, report: Report) -> Report:
    if (instruction.server_round, instruction.partition_id) != (2, 1):
        return report
    key = VARIATE + KEYS[0]
    return replace(report, companions={**report.companions, key: report.companions[key] * float("nan")})


def truncated(instruction: Instruction, report: Report) -> Report:
    if (instruction.server_round, instruction.partition_id) != (2, 1):
        return report
    return replace(report, companions={k: t for k, t in report.companions.items() if k != VARIATE + KEYS[0]})


def silent(instruction: Instruction, report: Report) -> Report:
    if (instruction.server_round, instruction.partition_id) == (2, 1):
        raise RuntimeError("gone")
    return report


@pytest.mark.parametrize(
    ("spoil", "status", "reason"),
    [(poisoned, "rejected", "holds NaN"), (truncated, "rejected", "missing entries"), (silent, "failed", "gone")],
)
def test_an_answer_that_is_turned_away_or_lost_is_forgotten_on_both_sides(spoil, status, reason, tmp_path):
    watched = Watched(spoil)
    rows = tiny_run(tmp_path, watched, strategy="scaffold", num_rounds=4, **UNEQUAL)
    (row,) = [row for row in select(rows, "arrival") if row["status"] != "merged"]
    assert (row["status"], row["server_round"], row["partition_id"]) == (status, 2, 1)
    assert reason in row["reason"]
    asked = watched.asked[4]
    counts = {pid: report.num_examples for pid, report in watched.reports[1].items()}
    own = {pid: remembered(tmp_path, asked, pid) for pid in asked}
    for key in KEYS:
        mean = sum(counts[pid] * own[pid][key].double() for pid in own) / sum(counts.values())
        torch.testing.assert_close(asked[0].companions[VARIATE + key].double(), mean, atol=1e-6, rtol=1e-4)


def test_both_ways_carry_a_variate_beside_the_model(tmp_path):
    plain = select(tiny_run(tmp_path / "a", strategy="fedavg", num_rounds=1), "arrival")
    rows = select(tiny_run(tmp_path / "b", strategy="scaffold", num_rounds=1), "arrival")
    for before, after in zip(plain, rows, strict=True):
        assert (after["download_bytes"], after["upload_bytes"]) == (
            2 * before["download_bytes"],
            2 * before["upload_bytes"],
        )


DRIFTING = [Parabola(1.0, 0.0, 5), Parabola(4.0, 1.0, 5, 30)]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_it_ends_at_the_optimum_that_fedavg_misses(momentum):
    optimum = bottom_of_the_mean(DRIFTING)
    assert abs(converged("fedavg", DRIFTING, momentum=momentum) - optimum) > 0.03
    assert converged("scaffold", DRIFTING, momentum=momentum) == pytest.approx(optimum, abs=1e-4)


def test_equal_weights_end_at_the_optimum_of_the_plain_mean():
    optimum = bottom_of_the_mean([replace(p, num_examples=1) for p in DRIFTING])
    assert converged("scaffold", DRIFTING, client_weight="equal") == pytest.approx(optimum, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compression.kind": "dgc"}, r"strategy=scaffold with compression\.kind=dgc: .*use compression\.kind=none"),
        ({"train.optimizer": "adam"}, r"strategy=scaffold with train\.optimizer=adam: .*use train\.optimizer=sgd"),
        (
            {"scaffold.rates": "1,0.5", "scaffold.assignment": "dynamic"},
            r"scaffold\.assignment=dynamic: the holders of an entry would change every round",
        ),
        ({"robust.centre": "median"}, r"strategy=scaffold with robust\.centre=median: .*one client that lies"),
        ({"robust.clip-norm": 1.0}, r"strategy=scaffold with robust\.centre=mean: .*without clipping"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_sent(settings: dict[str, Any], message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, lambda instruction: pytest.fail("something was sent"), strategy="scaffold", **settings)
    assert not (tmp_path / "checkpoints").exists()


def test_drawing_one_level_anew_is_no_contradiction(tmp_path):
    rows = tiny_run(tmp_path, strategy="scaffold", num_rounds=1, scaffold__assignment="dynamic", scaffold__rates="0.5")
    assert select(rows, "merge")
