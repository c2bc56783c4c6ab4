"""What every method promises, one table: methods x properties. A new method in the registry is tested by itself."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.handler import handle
from pruning.extract import embed, extract
from reporting.c3 import budgets_of, scores, spending_of
from reporting.log import read_events
from server_app.checkpoint import load_checkpoint
from strategies import LOOPS, STRATEGIES
from tests import faulty
from tests.marks import slow_but
from tests.runs import OWN, TINY, equal_states, final_state, read_rows, select, tiny_run, without_timings
from wire.flat import ConfigError
from wire.local import LocalTransport
from wire.message import Failure, Instruction, Report
from zoo import get_model

EVERY_RATE_1: dict[str, dict[str, Any]] = {
    "adp": {"model.gates": False, "adp.mode": "magnitude", "adp.threshold": 0.0},
    "fedavg": {},
    "heterofl": {"heterofl.rates": "1", "heterofl.mask-missing-labels": False},
    "adaptcl": {"adaptcl.rates.min-retention-ratio": 1.0},
    "only-capable": {},
    "smallest-everywhere": {"smallest-everywhere.retention-ratio": 1.0},
    "fedprox": {"fedprox.mu": 0.0},
    "fednova": {},  # equal data: equal steps
    "fedmp": {"fedmp.bandit.max-pruning-rate": 0.0},
    "fjord": {"fjord.rates": "1"},
    "cos2p": {"cos2p.budgets": "1", "cos2p.client-weight": "samples"},
    "fedrolex": {"fedrolex.rates": "1", "fedrolex.mask-missing-labels": False},
    "fiarse": {"fiarse.sizes": "1"},
}
"""Settings under which a method gives everybody the full model; absent for methods that cannot."""

NOBODY_WHOLE: dict[str, dict[str, Any]] = {
    "adp": {"model.gates": False, "adp.mode": "static"},
    "fedavg": {"fedavg.retention-ratio": 0.5},
    "heterofl": {"heterofl.rates": "0.5,0.25"},
    "adaptcl": {},
    "smallest-everywhere": {},
    "fedprox": {"fedprox.rates": "0.5,0.25"},
    "scaffold": {"scaffold.rates": "0.5,0.25"},
    "fednova": {"fednova.rates": "0.5,0.25"},
    "fedmp": {},
    "fjord": {"fjord.rates": "0.5,0.25"},
    "cos2p": {"cos2p.budgets": "0.5,0.25"},
    "fedrolex": {"fedrolex.rates": "0.5,0.25"},
    "fiarse": {"fiarse.sizes": "0.5,0.25"},
    "depthfl": {"depthfl.exits": "1"},
    "scalefl": {"scalefl.budgets": "0.5,0.25"},
}
"""Settings under which some entries are held by nobody once the fastest client is gone; absent for methods without."""

NO_COMPRESSION: dict[str, str] = {
    "scaffold": "the corrections of one round cancel over its clients",
    "fedasync": "its answers are steps",
    "adasplit": "not with strategy 'adasplit'",
    "sl-basic": "not with strategy 'sl-basic'",
    "splitfed": "not with strategy 'splitfed'",
}
"""Methods whose uploads cannot be compressed, and words of the reason that they give."""

SEMI_ASYNC: dict[str, Any] = {"num-clients": 6, "num-rounds": 6, "loop.quorum": 5, "loop.max-staleness": 5}

every_strategy = pytest.mark.parametrize("name", slow_but(("fedavg", "adaptcl"), STRATEGIES))
"""Promises that the loop keeps for all methods alike: the fast suite looks at two of them, the whole suite at all."""

every_strategy_in_every_mode = pytest.mark.parametrize(
    ("name", "mode"),
    slow_but([("fedavg", "sync"), ("adaptcl", "semi-async")], product(STRATEGIES, ["sync", "semi-async"])),
)

one_of_each_exchange = pytest.mark.parametrize(
    "name",
    slow_but(("fedavg",), ("fedavg", "scaffold", "fedbuff", "cos2p", "adp", "adasplit", "splitfed", "sl-basic")),
)
"""How an answer gets lost, or what is wrong with it, is not the method's matter; that one is missing is."""


def settings_of(name: str, mode: str) -> dict[str, Any]:
    """Settings of a run in a mode; a method that is a loop of its own has no other mode."""
    if mode == "semi-async" and STRATEGIES[name].needs_barrier:
        pytest.skip(f"the rounds of {name} wait for everybody")
    settings = {"num-rounds": 6} if mode == "sync" else SEMI_ASYNC
    settings = {**settings, "evaluation.family-every": 3}
    return {key: value for key, value in settings.items() if name not in LOOPS or not key.startswith("loop.")}


def merges_of(name: str, num_rounds: int) -> int:
    """Merges that make up for ``num_rounds`` rounds of all clients; a loop of its own may merge one by one."""
    return num_rounds * (TINY["num-clients"] if name in LOOPS else 1)


class PlainRuns(dict[tuple[str, str], tuple[Path, list[dict[str, Any]]]]):
    """(method, mode) -> folder and rows of an undisturbed run, carried out when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, key: tuple[str, str]) -> tuple[Path, list[dict[str, Any]]]:
        home = self.folder / "-".join(key)
        self[key] = home, tiny_run(home, strategy=key[0], **settings_of(*key))
        return self[key]


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory: pytest.TempPathFactory) -> PlainRuns:
    """Undisturbed runs of every method in this process, synchronous and semi-asynchronous: what others are held to."""
    return PlainRuns(tmp_path_factory.mktemp("plain"))


@every_strategy
def test_it_runs_and_learns(name, tmp_path):
    num_rounds = merges_of(name, 10)
    rows = tiny_run(
        tmp_path / "run", strategy=name, num_rounds=num_rounds, train__learning_rate=0.1, adaptcl__pruning_interval=4
    )
    where = "central" if STRATEGIES[name].has_global_model else "federated"
    accuracies = [row["accuracy"] for row in select(rows, "evaluation", where=where)]
    assert accuracies[0] < 0.3
    assert max(accuracies) > 0.75
    assert select(rows, "end")[0]["status"] == "completed"
    assert len(select(rows, "merge")) == num_rounds
    spent = spending_of(read_events(tmp_path / "run"))
    assert spent is not None
    assert min(spent.total_bytes, spent.train_macs) > 0
    assert scores(spent, budgets_of([spent]))["c3_t8"] == pytest.approx(spent.accuracy * math.exp(-2 / 8))


@every_strategy
def test_the_full_model_for_everybody_makes_it_fedavg(name, plain_runs, tmp_path):
    if name not in EVERY_RATE_1:
        reason = "is another loop than FedAvg's" if name in LOOPS else "never gives everybody the full model"
        pytest.skip(f"{name} {reason}")
    tiny_run(tmp_path / "run", strategy=name, num_rounds=6, **EVERY_RATE_1[name])
    assert equal_states(final_state(tmp_path / "run"), final_state(plain_runs["fedavg", "sync"][0]))


class KeptTransport(LocalTransport):
    """Workers that outlive a run: they stay warm from test to test."""

    def close(self) -> None:
        """Keep the workers."""
        self._waiting.clear()


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalTransport]:
    """Two warm worker processes."""
    kept = KeptTransport(faulty.works, 6, num_workers=2)
    yield kept
    LocalTransport.close(kept)


@every_strategy_in_every_mode
def test_worker_processes_do_not_change_the_event_log(name, mode, plain_runs, pool, tmp_path):
    pool.num_clients = 4 if mode == "sync" else 6
    rows = tiny_run(tmp_path / "run", transport=pool, strategy=name, **settings_of(name, mode))
    assert without_timings(rows) == without_timings(plain_runs[name, mode][1])


@every_strategy
def test_compressed_uploads_are_a_fraction_of_the_bytes_and_merged_or_refused_before_anything_is_sent(
    name, plain_runs, tmp_path
):
    settings = {**settings_of(name, "sync"), "num-rounds": merges_of(name, 2)}
    compressed = {**settings, "strategy": name, "compression.kind": "dgc", "compression.density": 0.02}
    if name in NO_COMPRESSION:
        with pytest.raises(ConfigError, match=NO_COMPRESSION[name]):
            tiny_run(tmp_path / "run", **compressed)
        assert not list(tmp_path.glob("run/checkpoints/*"))
        return
    rows = tiny_run(tmp_path / "run", **compressed)

    def first_upload(log: list[dict[str, Any]]) -> int:
        """Bytes of the clients' first answers, to the same requests with compression and without."""
        first = {row["partition_id"]: row["upload_bytes"] for row in reversed(select(log, "arrival"))}
        return sum(first.values())

    assert {row["status"] for row in select(rows, "arrival")} == {"merged"}
    assert first_upload(rows) < 0.15 * first_upload(plain_runs[name, "sync"][1])
    before, after = (
        load_checkpoint(path)[0].state for path in sorted((tmp_path / "run" / "checkpoints").glob("round-*.pt"))[-2:]
    )
    assert not equal_states(before, after), "the last merge changed nothing"


@every_strategy
def test_another_seed_gives_another_run(name, plain_runs, tmp_path):
    tiny_run(tmp_path / "run", strategy=name, num_rounds=1, seed=1)
    first = torch.load(plain_runs[name, "sync"][0] / "checkpoints" / "round-000001.pt", weights_only=True)["state"]
    assert not equal_states(final_state(tmp_path / "run"), first)


@every_strategy_in_every_mode
def test_three_rounds_and_three_more_equal_six(name, mode, plain_runs, tmp_path):
    """Bit for bit, rows and model; the family is shown in rounds 3 and 6 by both, for a last round always shows it."""
    home, whole = plain_runs[name, mode]
    settings = settings_of(name, mode)
    tiny_run(tmp_path / "first", strategy=name, **{**settings, "num-rounds": 3})
    resumed = tiny_run(tmp_path / "second", strategy=name, resume=str(tmp_path / "first"), **settings)
    assert equal_states(final_state(tmp_path / "second"), final_state(home))
    assert without_timings(resumed) == without_timings(whole)


@every_strategy
def test_entries_that_nobody_held_keep_their_value_bit_for_bit(name, tmp_path):
    if name in LOOPS:
        pytest.skip(f"{name} merges answers of earlier rounds, all of the full model")
    sent: dict[int, list] = defaultdict(list)

    def spy(instruction: Instruction) -> Report:
        if instruction.server_round > 3 and instruction.partition_id == 0:
            raise RuntimeError("the fastest device has left")
        sent[instruction.server_round].append(instruction.spec)
        return handle(instruction)

    tiny_run(tmp_path / "run", spy, strategy=name, num_rounds=6, **NOBODY_WHOLE.get(name, {}))
    _, layout = get_model("mlp", 10, 1, 8, exits=bool(OWN.get(name, {}).get("model.exits", False)))
    states = {
        number: load_checkpoint(tmp_path / "run" / "checkpoints" / f"round-{number:06d}.pt")[0].state
        for number in range(1, 7)
    }
    num_uncovered = 0
    for number in range(2, 7):
        before, after = states[number - 1], states[number]
        held = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in before.items()}
        for spec in sent[number]:
            coverage = embed(extract(before, layout, spec), layout, spec, before)[1]
            held = {key: held[key] | coverage[key] for key in held}
        for key, mask in held.items():
            assert torch.equal(before[key][~mask], after[key][~mask])
            num_uncovered += int((~mask).sum())
    assert num_uncovered or name not in NOBODY_WHOLE


@pytest.mark.parametrize("kind", faulty.SPOILED)
@one_of_each_exchange
def test_a_spoiled_answer_is_turned_away_with_its_reason_and_the_run_goes_on(name, kind, tmp_path):
    rows = tiny_run(tmp_path / "run", faulty.Spoiler(kind), strategy=name, num_rounds=merges_of(name, 2))
    status, reason = faulty.SPOILED[kind]
    _assert_only_the_culprit_failed(rows, name, status, reason)


@every_strategy
def test_a_client_that_raises_is_reported_with_what_it_raised_and_where(name, tmp_path):
    rows = tiny_run(tmp_path / "run", faulty.raises, strategy=name, num_rounds=merges_of(name, 2))
    _assert_only_the_culprit_failed(rows, name, "failed", "RuntimeError: the battery is empty (faulty.py:")


@one_of_each_exchange
def test_a_worker_that_dies_costs_one_answer(name, tmp_path):
    rows = tiny_run(tmp_path / "run", faulty.dies, num_workers=2, strategy=name, num_rounds=merges_of(name, 2))
    _assert_only_the_culprit_failed(rows, name, "failed", "worker process died with exit code -9")


@one_of_each_exchange
def test_a_client_that_never_answers_is_bounded_by_the_reply_timeout(name, tmp_path):
    settings = {"num-rounds": merges_of(name, 2), "reply-timeout-s": 4.0}
    rows = tiny_run(tmp_path / "run", faulty.hangs, num_workers=1, strategy=name, **settings)
    _assert_only_the_culprit_failed(rows, name, "failed", "no answer in 4 s")


def _assert_only_the_culprit_failed(rows: list[dict[str, Any]], name: str, status: str, reason: str) -> None:
    (row,) = [row for row in select(rows, "arrival") if row["status"] != "merged"]
    assert (row["global_version_sent"], row["partition_id"], row["status"]) == (0, faulty.CULPRIT, status)
    assert reason in row["reason"]
    if name in LOOPS:
        assert len(select(rows, "merge")) == merges_of(name, 2)
        assert select(rows, "arrival", partition_id=faulty.CULPRIT, status="merged"), "it was not asked again"
    else:
        assert row["server_round"] == 1
        assert [row["num_merged"] for row in select(rows, "merge")] == [3, 4]
    assert select(rows, "end")[0]["status"] == "completed"


class EchoingTransport(LocalTransport):
    """Says everything twice, and adds answers to questions that nobody asked."""

    def receive(self, timeout_s: float) -> list[Report | Failure]:
        answers = super().receive(timeout_s)
        strangers = [Failure(987_654, 0, "nobody asked"), Failure(-1, 77, "nobody asked")]
        return [item for answer in answers for item in (*strangers, answer, answer)]


@every_strategy_in_every_mode
def test_the_same_seed_gives_the_same_event_log_and_repeated_and_unknown_answers_change_nothing(
    name, mode, plain_runs, tmp_path
):
    transport = EchoingTransport(handle, 6 if mode == "semi-async" else 4)
    rows = tiny_run(tmp_path / "run", transport=transport, strategy=name, **settings_of(name, mode))
    assert without_timings(rows) == without_timings(plain_runs[name, mode][1])


@every_strategy
def test_a_quorum_closes_every_round_at_its_kth_answer_in_virtual_time(name, plain_runs):
    """The event log against a simulation of its own: free clients start together, the k earliest answers are merged."""
    if name in LOOPS:
        pytest.skip(f"{name} closes its rounds by a rule of its own; see tests/strategies/test_loop.py")
    rows = plain_runs[name, "semi-async"][1]
    arrivals = select(rows, "arrival")
    times = {(row["partition_id"], row["global_version_sent"]): row["update_time_s"] for row in arrivals}
    under_way: dict[int, tuple[float, int]] = {}
    now_s = 0.0
    for merge in select(rows, "merge"):
        version = merge["global_version"] - 1
        for pid in set(range(6)) - under_way.keys():
            under_way[pid] = (now_s + times.get((pid, version), float("inf")), version)
        first = sorted(under_way, key=lambda pid: under_way[pid])[:5]
        expected = [(pid, under_way[pid][0], version - under_way[pid][1]) for pid in first]
        got = [r for r in arrivals if r["server_round"] == merge["server_round"]]
        assert [(r["partition_id"], pytest.approx(r["finish_s"], rel=1e-12), r["staleness"]) for r in got] == expected
        now_s = max(under_way.pop(pid)[0] for pid in first)
        assert merge["time_s"] == pytest.approx(now_s, rel=1e-12)
    assert any(row["staleness"] > 0 for row in arrivals), "nobody was late: the test shows nothing"


@every_strategy
def test_every_row_names_its_event_and_every_checkpoint_its_round(name, plain_runs):
    home, rows = plain_runs[name, "sync"]
    assert [row["event"] for row in rows[:2]] == ["run", "clients"]
    assert rows[-1]["event"] == "end"
    assert read_rows(home) == rows
    assert sorted(path.stem for path in (home / "checkpoints").iterdir()) == [f"round-{n:06d}" for n in range(1, 7)]
