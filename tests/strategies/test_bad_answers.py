"""Whatever an answer does wrong turns that answer away with its reason: the others' are merged, the log stays readable.

The worst ends of every field are tried out on the cheap methods here; ``tests/contract`` tries some on all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.spec import SubModelSpec
from reporting.log import read_events
from reporting.report import write_report
from reporting.summary import summarise
from server_app.event_log import as_json
from strategies import STRATEGIES
from strategies.answers import RESERVED, check_report
from strategies.setting import Setting
from tests import faulty
from tests.runs import select, tiny_run
from tests.strategies.scalar import PULL, GivenTimes, small_model
from wire.local import LocalTransport
from wire.message import CompressionConfig, DataConfig, Instruction, Job, ModelConfig, Report, TrainConfig
from wire.spec import spec_from_json

CULPRIT = 1
NUM_CLIENTS = 3
METHODS = ("fedavg", "fedprox", "heterofl", "fedrolex", "fjord", "adaptcl", "fednova", "fedmp", "fedbuff", "dc-asgd")
Spoil = Callable[[Report], Report]


def honest(instruction: Instruction) -> Report:
    """A tenth of the way to zero, as it was asked for."""
    steps = {key: -PULL * tensor for key, tensor in instruction.state.items()}
    state = steps if instruction.wants_delta else {key: t + steps[key] for key, t in instruction.state.items()}
    return Report(
        instruction.dispatch,
        instruction.partition_id,
        state,
        20,
        (2,) * 10,
        1e6,
        0.1,
        metrics={"loss": 1.0, "accuracy": 0.5},
        is_delta=instruction.wants_delta,
        num_steps=1,
    )


def run_with(spoil: Spoil, name: str = "fedavg", num_rounds: int = 2, **changes: Any) -> list[dict[str, Any]]:
    """Rows of a run in which every answer of one client is spoiled."""
    state, layout, cost = small_model()
    job = Job(ModelConfig("mlp"), DataConfig(), TrainConfig(), NUM_CLIENTS, num_rounds, 0, store_dir="unused")
    durations = GivenTimes(lambda pid, dispatch: 1.0 + pid, NUM_CLIENTS)
    setting = Setting(job=job, layout=layout, cost=cost, durations=durations)  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = []

    def handle(instruction: Instruction) -> Report:
        report = honest(instruction)
        return spoil(report) if instruction.partition_id == CULPRIT else report

    kind = STRATEGIES[name]
    config = kind.Config(**({"buffer": 2} if name == "fedbuff" else {}))
    method = kind(config, replace(setting, **changes), rows.append)
    method.start(LocalTransport(handle, NUM_CLIENTS), ArrayRecord(dict(state)), num_rounds)
    return rows


def summary(rows: list[dict[str, Any]], is_whole: bool = False) -> dict[str, Any]:
    """What reporting makes of these rows, as the server would write them; ``is_whole``: the pictures too."""
    with TemporaryDirectory() as folder:
        run = {"event": "run", "strategy": "x", "num_clients": NUM_CLIENTS}
        end = {"event": "end", "status": "completed", "num_rounds": 2}
        lines = [as_json({**row, "wall_s": 1.0}) for row in (run, *rows, end)]
        (Path(folder) / "events.jsonl").write_text("\n".join(lines) + "\n")
        if is_whole:
            write_report(Path(folder))
        found = summarise(read_events(folder))
    json.dumps(found, allow_nan=False)
    return found


def with_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Change the first matrix of an answer."""

    def spoil(report: Report) -> Report:
        key = next(key for key, tensor in report.state.items() if tensor.dim() > 1)
        return replace(report, state={**report.state, key: change(report.state[key].clone())})

    return spoil


def with_metric(name: str, value: float = 1.0) -> Spoil:
    """Add a metric."""
    return lambda report: replace(report, metrics={**report.metrics, name: value})


WRONG: dict[str, tuple[Spoil, str]] = {
    "double": (with_first(lambda t: t.double() * 0 + 1e300), "should be torch.float32, got torch.float64"),
    "overflowing": (with_first(lambda t: t * 0 + 3e38), "numbers up to 3e+38, at most 1e+12"),
    "another kind": (
        lambda r: replace(r, is_delta=not r.is_delta),
        "should hold values, as it was asked for, got steps",
    ),
    "another form": (lambda r: replace(r, is_sparse=True), "got the largest entries of values"),
    "no examples": (lambda r: replace(r, num_examples=0), "num-examples: got 0, expected a finite number >= 1"),
    "all examples": (lambda r: replace(r, num_examples=2**62), "num-examples: got"),
    "endless steps": (lambda r: replace(r, num_steps=2**62), "num-steps: got"),
    "endless work": (lambda r: replace(r, train_macs=1e300), "train-macs: got"),
    "event": (with_metric("event"), "metric 'event' has the name of a field of the event log"),
    "row": (with_metric("server_round", 0.5), "'server_round' has the name of a field"),
    "examples": (with_metric("num_examples", 0.5), "'num_examples' has the name of a field"),
    "huge metric": (with_metric("loss", 1e308), "metric 'loss': got 1e+308"),
    "unknown group": (lambda r: replace(r, narrowed=SubModelSpec.of({"nobody": [0]})), "no group 'nobody'"),
    "unit outside": (
        lambda r: replace(r, narrowed=SubModelSpec.of({"hidden0": [10**6]})),
        "distinct, sorted and within",
    ),
    "no depth": (lambda r: replace(r, narrowed=SubModelSpec((), "a")), "TypeError"),  # type: ignore[arg-type]
    "one class too many": (lambda r: replace(r, label_counts=(1,) * 99), ""),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_answer_that_is_wrong_is_turned_away_with_its_reason_and_the_others_are_merged(kind):
    spoil, reason = WRONG[kind]
    rows = run_with(spoil, "heterofl" if "class" in kind else "fedavg")
    statuses = {(row["partition_id"], row["status"]) for row in select(rows, "arrival")}
    assert statuses == {(0, "merged"), (CULPRIT, "rejected"), (2, "merged")}
    assert all(reason in row["reason"] for row in select(rows, "arrival", partition_id=CULPRIT))
    assert [row["num_merged"] for row in select(rows, "merge")] == [2, 2]
    assert len(select(rows, "arrival", server_round=1)) == NUM_CLIENTS, "no row changed its name or its round"
    assert summary(rows, is_whole=kind in ("event", "huge metric"))["num_arrivals"]["rejected"] == 2


def test_fednova_believes_no_more_steps_than_the_examples_are_good_for():
    rows = run_with(lambda report: replace(report, num_steps=100), "fednova")
    assert {row["reason"] for row in select(rows, "arrival", partition_id=CULPRIT)} == {
        "report: num-steps: got 100, expected at most 2 with 20 examples"
    }
    assert {row["status"] for row in select(rows, "arrival", partition_id=0)} == {"merged"}


def test_fedmp_turns_away_an_answer_without_the_loss_that_it_is_rewarded_by():
    rows = run_with(lambda report: replace(report, metrics={}), "fedmp")
    assert {row["status"] for row in select(rows, "arrival", partition_id=CULPRIT)} == {"rejected"}
    assert "metric 'loss' is missing" in select(rows, "arrival", partition_id=CULPRIT)[0]["reason"]


def test_adaptcl_turns_away_an_update_that_took_no_time():
    durations = GivenTimes(lambda pid, dispatch: 0.0 if pid == CULPRIT else 1.0, NUM_CLIENTS)
    rows = run_with(lambda report: report, "adaptcl", durations=durations)
    assert "update time must be positive" in select(rows, "arrival", partition_id=CULPRIT)[0]["reason"]
    assert [row["num_merged"] for row in select(rows, "merge")] == [2, 2]


@pytest.mark.parametrize(
    "form",
    [
        lambda index, value: (index[None], value[None]),
        lambda index, value: (index.double(), value),
        lambda index, value: (index.long(), value),
        lambda index, value: (index, value.double()),
        lambda index, value: (index, value[:-1]),
        lambda index, value: (index + 10**6, value),
    ],
)
def test_a_compressed_update_of_another_form_is_turned_away(form):
    def sparse(report: Report, form: Callable = lambda index, value: (index, value)) -> Report:
        state = {}
        for key, tensor in report.state.items():
            if tensor.dim() < 2:
                state[key] = tensor
            else:
                index, value = torch.arange(3, dtype=torch.int32), tensor.flatten()[:3]
                state[key + "#index"], state[key + "#value"] = form(index, value)
        return replace(report, state=state, is_sparse=True)

    state, _, _ = small_model()
    job = Job(ModelConfig(), DataConfig(), TrainConfig(), 1, 1, 0, compression=CompressionConfig("dgc"))
    report = honest(Instruction("train", 0, 0, 1, 0, job, state, wants_delta=True))
    check_report(sparse(report), state, state, wants_delta=True, wants_sparse=True)
    with pytest.raises(ValueError, match="compressed update"):
        check_report(sparse(report, form), state, state, wants_delta=True, wants_sparse=True)


@pytest.mark.parametrize("depth", ["a", [1], {}, True, 1.5])
def test_a_depth_that_is_no_whole_number_is_no_spec(depth):
    with pytest.raises(ValueError, match="spec: depth: got"):
        spec_from_json(json.dumps({"kept": {}, "depth": depth}))


@pytest.mark.parametrize("text", ["[]", "1", '{"kept": []}', '{"kept": {"a": 1}, "depth": null}', '{"kept": {}}', "{"])
def test_text_that_is_no_spec_says_so(text):
    with pytest.raises(ValueError, match="spec: "):
        spec_from_json(text)


def test_every_field_that_the_server_writes_is_reserved():
    rows = run_with(lambda report: replace(report, metrics={}))
    assert set(select(rows, "arrival", partition_id=CULPRIT)[0]) <= RESERVED


# --- whatever it is -------------------------------------------------------------------------------------------------

WHOLE = st.sampled_from([-(2**62), -1, 0, 1, 7, 2**31, 2**62])
REAL = st.sampled_from([-1.0, 0.0, 5e-324, 1.0, 1e30, 1.7e308, math.inf, -math.inf, math.nan])
TENSOR = st.builds(
    lambda shape, dtype, value: torch.full(shape, value, dtype=torch.float64).to(dtype),
    st.sampled_from([(), (0,), (3,), (2, 3), (2, 3, 1, 1)]),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.complex64]),
    st.sampled_from([0.0, 1.0, 3e38, 1e300, math.nan, math.inf]),
)
NAME = st.sampled_from(
    [*sorted(RESERVED), "loss", "accuracy", "counted_bytes", "dense_bytes", "steps_left", "", "x" * 200]
)
SPEC = st.one_of(
    st.builds(
        SubModelSpec.of, st.dictionaries(st.sampled_from(["hidden0", "classes", "?"]), st.lists(WHOLE, max_size=3))
    ),
    st.builds(lambda depth: SubModelSpec((), depth), st.sampled_from([-1, 0, 1, 9, "a", 1.5])),
)
FIELDS = {
    "num_examples": WHOLE,
    "num_steps": WHOLE,
    "peak_memory_bytes": WHOLE,
    "train_macs": REAL,
    "compute_s": REAL,
    "busy_s": REAL,
    "label_counts": st.lists(st.sampled_from([0, 1, 2**62]), max_size=12).map(tuple),
    "metrics": st.dictionaries(NAME, REAL, max_size=4),
    "is_delta": st.booleans(),
    "is_sparse": st.booleans(),
    "narrowed": SPEC,
    "companions": st.dictionaries(st.sampled_from(["values", "variate:x"]), TENSOR),
}
CHANGES = st.fixed_dictionaries({}, optional=FIELDS)
ENTRIES = st.dictionaries(
    st.sampled_from(["first", "second", "stowaway", "first#index"]), st.none() | TENSOR, max_size=2
)


def spoiled(report: Report, changes: dict[str, Any], entries: dict[str, torch.Tensor | None]) -> Report:
    """An answer with some fields and some entries (None: left out) replaced."""
    keys = list(report.state)
    names = {"first": keys[0], "second": keys[1], "stowaway": "stowaway", "first#index": keys[0] + "#index"}
    state = {**report.state, **{names[name]: tensor for name, tensor in entries.items()}}
    return replace(report, **changes, state={key: tensor for key, tensor in state.items() if tensor is not None})


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(METHODS), changes=CHANGES, entries=ENTRIES, is_wall=st.booleans())
def test_whatever_one_client_says_the_others_are_merged_and_the_report_is_written(name, changes, entries, is_wall):
    rows = run_with(lambda report: spoiled(report, changes, entries), name, **({"durations": None} if is_wall else {}))
    merged = select(rows, "merge")
    assert len(merged) == 2, "no round was lost"
    others = [row for row in select(rows, "arrival") if row["partition_id"] != CULPRIT]
    assert {row["status"] for row in others} <= {"merged", "late"}
    assert {row["status"] for row in select(rows, "arrival", partition_id=CULPRIT)} <= {"merged", "rejected", "late"}
    assert summary(rows)["num_arrivals"]


# --- tests of clients -----------------------------------------------------------------------------------------------


def test_a_run_whose_clients_all_fail_their_tests_says_so_every_time(tmp_path):
    rows = tiny_run(tmp_path / "run", faulty.cannot_test, num_rounds=2, evaluation__where="federated")
    assert not select(rows, "evaluation")
    warnings = select(rows, "warning")
    assert [row["server_round"] for row in warnings] == [0, 1, 2]
    assert warnings[0]["message"].startswith(
        "no client's test came back: client 0: RuntimeError: no test part (faulty.py:"
    )


def test_who_fails_a_test_is_named_with_the_reason_and_the_others_count(tmp_path):
    def handle(instruction: Instruction) -> Report:
        is_culprit = instruction.partition_id == faulty.CULPRIT
        return faulty.cannot_test(instruction) if is_culprit else faulty.works(instruction)

    rows = tiny_run(tmp_path / "run", handle, num_rounds=1, evaluation__where="federated")
    (row,) = select(rows, "evaluation", server_round=1)
    assert set(row["clients"]) == {"0", "2", "3"}
    assert list(row["failed"]) == [str(faulty.CULPRIT)]
    assert "no test part" in row["failed"]["1"]
    (warning,) = select(rows, "warning", server_round=1)
    assert warning["message"].startswith("1 of 4 tests are missing: client 1: RuntimeError: no test part")
