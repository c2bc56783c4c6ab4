"""The event loop and the exchange: exact times, quorums, deadlines and staleness, and Flower's FedAvg as an oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from client_app.handler import handle
from fleet.clock import DurationModel
from fleet.fleet import Fleet, make_fleet
from pruning.cost import measure_costs
from pruning.spec import FULL
from strategies import FedAvg
from strategies.answers import combined_row
from strategies.base import RunStoppedError
from strategies.exchange import Arrival, Entry, Exchange
from strategies.fedavg import FedAvgConfig
from strategies.loop import LoopConfig, staleness_weight
from strategies.setting import Order, Setting
from tests.runs import final_state, select, tiny_run
from wire.flat import ConfigError, refuse
from wire.local import LocalTransport
from wire.message import DataConfig, Failure, Instruction, Job, ModelConfig, Report, TrainConfig
from zoo import get_model

JOB = Job(ModelConfig("mlp"), DataConfig(max_train=400, partition="iid"), TrainConfig(), 4, 9, 0)
NUM_MACS = 1e9


def echo(instruction: Instruction) -> Report:
    """Train nothing, report fixed work: update times become known numbers."""
    state = {k: t * 0 if instruction.wants_delta else t for k, t in instruction.state.items()}
    asked = instruction.wants_delta
    return Report(instruction.dispatch, instruction.partition_id, state, 10, (1,) * 10, NUM_MACS, is_delta=asked)


def simulate(
    loop: LoopConfig, num_rounds: int, handler: Callable = echo, num_clients: int = 4, strategy=FedAvg, **changes
) -> list[dict]:
    """Rows of a FedAvg run without data: ``num_clients`` devices whose update times are spaced evenly from 1 to 5."""
    return run_to_result(loop, num_rounds, handler, num_clients, strategy, **changes)[0]


def run_to_result(
    loop: LoopConfig,
    num_rounds: int,
    handler: Callable = echo,
    num_clients: int = 4,
    strategy=FedAvg,
    evaluate_fn: Callable | None = None,
    **changes,
) -> tuple[list[dict], Result]:
    """The same, with what Flower's caller gets."""
    torch.manual_seed(0)
    model, layout = get_model("mlp", 10, 1, 8, width=0.05)
    fleet = make_fleet("linear:5", num_clients, seed=0)
    setting = Setting(
        job=replace(JOB, num_clients=num_clients),
        layout=layout,
        cost=measure_costs(model, layout, torch.zeros(2, 1, 8, 8)),
        loop=loop,
        durations=DurationModel(fleet, seed=0, noise=0.0),
    )
    rows: list[dict] = []
    made = strategy(FedAvgConfig(), replace(setting, **changes), rows.append)
    transport, arrays = LocalTransport(handler, num_clients), ArrayRecord(model.state_dict())
    result = made.start(transport, arrays, num_rounds, evaluate_fn=evaluate_fn)
    return [{"event": row["event"], **row} for row in rows], result


def device_times(num_clients: int = 4) -> dict[int, float]:
    """Update time of each device, from one synchronous round."""
    rows = select(simulate(LoopConfig(), 1, num_clients=num_clients), "arrival")
    return {row["partition_id"]: row["update_time_s"] for row in rows}


def test_a_barrier_lasts_as_long_as_its_slowest_client():
    times = device_times()
    merges = select(simulate(LoopConfig(), 3), "merge")
    assert [m["time_s"] for m in merges] == pytest.approx([max(times.values()) * n for n in (1, 2, 3)])
    assert {m["num_merged"] for m in merges} == {4}


def shifted(instruction: Instruction) -> Report:
    """Move every weight by one."""
    report = echo(instruction)
    return replace(report, state={key: tensor + 1 for key, tensor in report.state.items()})


def test_flowers_own_evaluate_fn_sees_the_model_before_training_and_whenever_evaluation_is_due():
    seen: dict[int, ArrayRecord] = {}

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        seen[server_round] = arrays
        return MetricRecord({"score": float(server_round)}) if server_round != 4 else None

    _, result = run_to_result(LoopConfig(), 5, shifted, evaluate_fn=evaluate, evaluate_every=2)
    assert list(seen) == [0, 2, 4, 5], "every second round, and the last"
    states = {n: arrays.to_torch_state_dict() for n, arrays in seen.items()}
    for n, state in states.items():
        assert all(torch.allclose(tensor, states[0][key] + n) for key, tensor in state.items())
    final = result.arrays.to_torch_state_dict()
    assert all(torch.equal(tensor, states[5][key]) for key, tensor in final.items())
    assert dict(result.evaluate_metrics_serverapp) == {n: MetricRecord({"score": float(n)}) for n in (0, 2, 5)}


@pytest.mark.parametrize("own", [None, MetricRecord({"accuracy": 0.75})])
def test_what_evaluate_fn_returns_replaces_the_runs_own_metrics_in_the_result_and_nothing_in_the_log(own):
    rows, result = run_to_result(
        LoopConfig(),
        1,
        evaluate_fn=lambda server_round, arrays: own,
        evaluate=lambda *state: {"accuracy": 0.5, "loss": 1.0},
    )
    assert {row["accuracy"] for row in select(rows, "evaluation")} == {0.5}
    ours = MetricRecord({"accuracy": 0.5, "loss": 1.0})
    assert dict(result.evaluate_metrics_serverapp) == dict.fromkeys((0, 1), own or ours)


@pytest.mark.parametrize("quorum", [1, 2, 3, 4, 5])
def test_a_quorum_closes_rounds_exactly_when_its_kth_answer_arrives(quorum):
    times, num_rounds = device_times(6), 12
    rows = simulate(LoopConfig(quorum=quorum, max_staleness=99), num_rounds, num_clients=6)
    under_way: dict[int, tuple[float, int]] = {}
    now_s = 0.0
    for version in range(num_rounds):
        for pid in times.keys() - under_way.keys():
            under_way[pid] = (now_s + times[pid], version)
        first = sorted(under_way, key=lambda pid: under_way[pid][0])[:quorum]
        got = select(rows, "arrival", server_round=version + 1)
        assert sorted(row["partition_id"] for row in got) == sorted(first)
        assert {row["partition_id"]: row["staleness"] for row in got} == {p: version - under_way[p][1] for p in first}
        now_s = max(under_way.pop(pid)[0] for pid in first)
        assert select(rows, "merge")[version]["time_s"] == pytest.approx(now_s)


def test_answers_older_than_allowed_are_dropped_and_do_not_count_for_the_quorum():
    rows = simulate(LoopConfig(quorum=2, max_staleness=1), 8)
    late = select(rows, "arrival", status="late")
    assert late
    assert all(row["staleness"] > 1 and "merge_weight" not in row for row in late)
    assert late[0]["reason"] == f"{late[0]['staleness']} versions old, 1 allowed"
    assert all(row["staleness"] <= 1 for row in select(rows, "arrival", status="merged"))
    assert {row["num_merged"] for row in select(rows, "merge")} == {2}


def test_a_deadline_closes_a_round_on_time_with_whoever_has_answered():
    times = sorted(device_times().values())
    deadline_s = (times[1] + times[2]) / 2
    rows = simulate(LoopConfig(deadline_s=deadline_s, max_staleness=9), 2)
    first, second = select(rows, "merge")
    assert first["time_s"] == pytest.approx(deadline_s)
    assert first["num_merged"] == 2
    arrived = select(rows, "arrival", server_round=2)
    until = 2 * deadline_s
    assert {round(row["finish_s"], 9) for row in arrived} == {
        round(t, 9) for t in [*(deadline_s + t for t in times[:2]), *times[2:]] if t <= until
    }
    assert second["time_s"] == pytest.approx(until)


def test_a_deadline_before_anybody_can_answer_waits_for_the_first():
    times = device_times()
    (merge,) = select(simulate(LoopConfig(deadline_s=min(times.values()) / 10, max_staleness=9), 1), "merge")
    assert merge["time_s"] == pytest.approx(min(times.values()))
    assert merge["num_merged"] == 1


def test_a_quorum_reached_before_the_deadline_closes_the_round():
    times = sorted(device_times().values())
    (merge,) = select(simulate(LoopConfig(quorum=2, deadline_s=1e6, max_staleness=9), 1), "merge")
    assert merge["time_s"] == pytest.approx(times[1])


def test_clients_per_round_are_drawn_by_the_seed_and_never_twice_at_once():
    rows = simulate(LoopConfig(clients_per_round=2), 10)
    drawn = [tuple(sorted(r["partition_id"] for r in select(rows, "arrival", server_round=n))) for n in range(1, 11)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    assert len(set(drawn)) > 1
    again = select(simulate(LoopConfig(clients_per_round=2), 10), "arrival")
    assert [r["partition_id"] for r in again] == [r["partition_id"] for r in select(rows, "arrival")]


def test_devices_that_drop_out_are_failures_and_the_round_goes_on():
    fleet = Fleet(make_fleet("linear:5", 4, seed=0).devices, drop_out_ratio=0.4)
    rows = simulate(LoopConfig(max_empty_rounds=9), 6, durations=DurationModel(fleet, seed=0, noise=0.0))
    lost = select(rows, "arrival", status="failed")
    assert {row["reason"] for row in lost} == {"the device dropped out"}
    assert 2 < len(lost) < 20
    assert len(select(rows, "arrival")) == 24


class Losing(DurationModel):
    """The devices of ``simulate``, of which some lose every answer."""

    def __init__(self, *partition_ids: int) -> None:
        super().__init__(make_fleet("linear:5", 4, seed=0), seed=0, noise=0.0)
        self.lost = partition_ids

    def drops_out(self, partition_id: int, dispatch_index: int) -> bool:
        return partition_id in self.lost


def test_a_round_with_a_drop_out_is_as_long_as_the_same_round_without():
    times = device_times()
    slowest = max(times, key=times.__getitem__)
    rows = simulate(LoopConfig(), 2, durations=Losing(slowest))
    assert [row["time_s"] for row in select(rows, "merge")] == pytest.approx([times[slowest], 2 * times[slowest]])
    (lost, _) = select(rows, "arrival", partition_id=slowest)
    assert (lost["status"], lost["upload_bytes"]) == ("failed", 0)
    assert lost["update_time_s"] == pytest.approx(times[slowest]), "nobody tells the server that nothing will come"


def test_with_a_deadline_the_server_waits_for_a_device_that_dropped_out_until_then_and_no_longer():
    times = device_times()
    fastest, slowest = (pick(times, key=times.__getitem__) for pick in (min, max))
    for deadline_s in (1.5 * times[slowest], 0.5 * times[slowest]):
        loop = LoopConfig(deadline_s=deadline_s, max_staleness=9)
        rows = simulate(loop, 1, durations=Losing(fastest, slowest))
        assert select(rows, "merge")[0]["time_s"] == pytest.approx(deadline_s)
        for row in select(rows, "arrival", status="failed"):
            assert row["finish_s"] == pytest.approx(deadline_s)
            assert row["update_time_s"] <= deadline_s


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_a_run_in_which_nothing_was_ever_merged_has_failed(num_rounds):
    def silent(instruction: Instruction) -> Report:
        raise RuntimeError("no")

    with pytest.raises(RunStoppedError, match=r"nothing was merged in the whole run.*the event log has the reason"):
        simulate(LoopConfig(), num_rounds, silent)


def test_a_run_of_which_some_rounds_were_empty_is_completed():
    def late_starter(instruction: Instruction) -> Report:
        if instruction.server_round != 2:
            raise RuntimeError("no")
        return echo(instruction)

    assert len(select(simulate(LoopConfig(), 3, late_starter), "merge")) == 1


def test_start_refuses_a_loop_that_closes_rounds_early_for_a_method_that_waits_for_everybody():
    class Waits(FedAvg):
        needs_barrier = True

    with pytest.raises(ConfigError, match=r"loop\.quorum, loop\.deadline-s: not with strategy 'fedavg'"):
        simulate(LoopConfig(quorum=2), 1, strategy=Waits)
    assert select(simulate(LoopConfig(), 1, strategy=Waits), "merge")


def test_nobody_answering_stops_the_run():
    def silent(instruction: Instruction) -> Report:
        raise RuntimeError("no")

    with pytest.raises(RunStoppedError, match="no usable answer in 3 rounds in a row"):
        simulate(LoopConfig(), 9, silent)


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        ("constant", [1, 1, 1, 1]),
        ("polynomial:0.5", [1, 2**-0.5, 3**-0.5, 0.5]),
        ("polynomial:0", [1, 1, 1, 1]),
        ("hinge:10:1", [1, 1, 1 / 11, 1 / 21]),
    ],
)
def test_staleness_weights_are_those_of_xie_et_al(rule, weights):
    assert [staleness_weight(rule, s) for s in range(4)] == pytest.approx(weights)


@pytest.mark.parametrize("rule", ["", "linear", "polynomial", "polynomial:x", "polynomial:-1", "hinge:1", "hinge:0:1"])
def test_unknown_staleness_rules_are_refused(rule):
    with pytest.raises(ConfigError, match="expected 'constant', 'polynomial:A' or 'hinge:A:B'"):
        staleness_weight(rule, 1)


def test_a_quorum_nobody_can_reach_is_refused_before_anything_is_sent():
    with pytest.raises(ConfigError, match=r"loop\.quorum=5: only 4 clients take part"):
        simulate(LoopConfig(quorum=5), 1, handler=lambda instruction: pytest.fail("something was sent"))


def test_what_a_method_refuses_stops_the_run_before_anything_is_sent(monkeypatch):
    def check(strategy: FedAvg) -> None:
        refuse(strategy.loop.mixing_rate < 1, "loop.mixing-rate=0.5 with strategy=fedavg", "for a test; use 1")

    monkeypatch.setattr(FedAvg, "check", check)
    with pytest.raises(ConfigError, match=r"^config: loop\.mixing-rate=0\.5 with strategy=fedavg: for a test; use 1$"):
        simulate(LoopConfig(mixing_rate=0.5), 1, handler=lambda instruction: pytest.fail("something was sent"))
    assert select(simulate(LoopConfig(), 1), "merge")


def test_who_does_not_take_part_is_never_drawn_and_does_not_count_for_a_quorum(monkeypatch):
    monkeypatch.setattr(FedAvg, "takes_part", lambda strategy, pid: pid in (1, 3))
    rows = simulate(LoopConfig(clients_per_round=1), 8)
    assert [len(select(rows, "arrival", server_round=n)) for n in range(1, 9)] == [1] * 8
    assert {row["partition_id"] for row in select(rows, "arrival")} == {1, 3}
    with pytest.raises(ConfigError, match="only 2 clients take part"):
        simulate(LoopConfig(quorum=3), 1)
    monkeypatch.setattr(FedAvg, "takes_part", lambda strategy, pid: False)
    with pytest.raises(ConfigError, match="strategy=fedavg: no client may take part"):
        simulate(LoopConfig(), 1)


def test_stale_answers_count_as_steps_from_where_they_started():
    """Everybody adds one, whatever it received: a merge of stale and fresh answers adds one to the present model."""

    def adds_one(instruction: Instruction) -> Report:
        return replace(
            echo(instruction), state={k: torch.ones_like(t) for k, t in instruction.state.items()}, is_delta=True
        )

    kept: list[dict] = []
    torch.manual_seed(0)
    model, layout = get_model("mlp", 10, 1, 8, width=0.05)
    setting = Setting(
        job=JOB,
        layout=layout,
        cost=measure_costs(model, layout, torch.zeros(2, 1, 8, 8)),
        loop=LoopConfig(quorum=2, max_staleness=9),
        durations=DurationModel(make_fleet("linear:5", 4, seed=0), seed=0, noise=0.0),
    )
    keep = lambda progress, own: kept.append({k: t.clone() for k, t in progress.state.items()})  # noqa: E731
    rows: list[dict] = []
    strategy = FedAvg(FedAvgConfig(), setting, rows.append, keep)
    strategy.start(LocalTransport(adds_one, 4), ArrayRecord(model.state_dict()), 5)
    assert any(row["staleness"] for row in select(rows, "arrival"))
    for before, after in itertools.pairwise([model.state_dict(), *kept]):
        for key in before:
            assert torch.allclose(after[key], before[key] + 1, atol=1e-5)


def test_the_merge_of_full_models_equals_flowers_own_fedavg(tmp_path):
    replies: list[RecordDict] = []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        metrics = MetricRecord({"num-examples": report.num_examples})
        replies.append(RecordDict({"arrays": ArrayRecord(dict(report.state)), "metrics": metrics}))
        return report

    tiny_run(tmp_path / "run", spy, strategy="fedavg", num_rounds=1, model__name="cnn", data__partition="quantity:1")
    expected = aggregate_arrayrecords(replies, "num-examples").to_torch_state_dict()
    for key, tensor in final_state(tmp_path / "run").items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, expected[key], rtol=1e-5, atol=1e-6), key


def test_deployment_takes_its_times_from_the_wall():
    rows = simulate(LoopConfig(), 2, durations=None)
    assert {row["status"] for row in select(rows, "arrival")} == {"merged"}
    assert all(0 <= row["start_s"] <= row["finish_s"] < 60 for row in select(rows, "arrival"))


def test_flowers_own_steps_are_refused():
    strategy = FedAvg.__new__(FedAvg)
    with pytest.raises(RuntimeError, match="runs its own event loop"):
        strategy.configure_train(1, None, None, None)


# --- the exchange ---------------------------------------------------------------------------------------------------


class Scripted:
    """A transport that answers when told to."""

    window = 4

    def __init__(self) -> None:
        self.sent: list[Instruction] = []
        self.ready: list[Report | Failure] = []

    def clients(self) -> list[int]:
        return [0, 1, 2, 3]

    def send(self, instruction: Instruction) -> None:
        self.sent.append(instruction)

    def empty_trips(self) -> list[tuple[int, float]]:
        return []

    def receive(self, timeout_s: float) -> list[Report | Failure]:
        ready, self.ready = self.ready, []
        return ready

    def close(self) -> None:
        pass


def dispatch(exchange: Exchange, partition_id: int) -> int:
    instruction = Instruction("train", -1, partition_id, 1, 0, JOB, {})
    entry = Entry(-1, partition_id, 1, 0, FULL, exchange.now_s, 0)
    return exchange.dispatch(
        lambda number: replace(instruction, dispatch=number), lambda number: replace(entry, dispatch=number)
    )


def test_answers_to_other_requests_and_repeated_ones_are_left_out_and_named(caplog):
    transport = Scripted()
    exchange = Exchange(transport, DurationModel(make_fleet("uniform", 4), seed=0, noise=0.0))
    number = dispatch(exchange, 2)
    good = Report(number, 2, {}, 5)
    transport.ready = [Failure(99, 2, "unknown"), good, replace(good, num_examples=7), Failure(number, 2, "again")]
    arrival = exchange.next_arrival()
    assert isinstance(arrival, Arrival)
    assert arrival.answer is good
    assert exchange.next_arrival() is None
    assert len(caplog.messages) == 3
    assert caplog.messages[0] == (
        "an answer of client 2 to request 99 is left out: nobody waits for it (unknown, repeated or late)"
    )


def test_an_answer_signed_by_another_client_is_a_failure_of_the_one_that_was_asked():
    transport = Scripted()
    exchange = Exchange(transport, DurationModel(make_fleet("uniform", 4), seed=0, noise=0.0))
    transport.ready = [Report(dispatch(exchange, 2), 3, {}, 5)]
    arrival = exchange.next_in_dispatch_order()
    assert arrival is not None
    assert arrival.answer == Failure(0, 2, "answer signed by client 3")


def test_a_transport_that_stays_silent_is_given_up_after_the_reply_timeout():
    exchange = Exchange(Scripted(), None, reply_timeout_s=0.01)
    dispatch(exchange, 1)
    arrival = exchange.next_arrival()
    assert arrival is not None
    assert arrival.answer == Failure(0, 1, "no answer in 0.01 s")


def test_what_is_asked_aside_takes_no_time_and_mixes_with_nothing():
    transport = Scripted()
    exchange = Exchange(transport, DurationModel(make_fleet("uniform", 4), seed=0, noise=0.0))
    number = dispatch(exchange, 2)
    exchange._fill()
    aside = [Instruction("evaluate", 1000 + pid, pid, 1, 0, JOB, {}) for pid in (0, 1)]
    transport.ready = [Report(1001, 1, {}, 3), Report(number, 2, {}, 5), Report(1000, 0, {}, 4)]
    assert [answer.dispatch for answer in exchange.ask_aside(aside, lambda answer: answer)] == [1000, 1001]
    assert exchange.now_s == 0
    arrival = exchange.next_arrival()
    assert arrival is not None
    assert arrival.entry.partition_id == 2


def test_a_round_may_have_several_requests_and_is_one_row_a_client():
    class Twice(FedAvg):
        name = "twice"

        def plan(self, server_round, clients):
            self.left = 2
            return super().plan(server_round, clients)

        def follow_up(self, server_round):
            self.left -= 1
            return {pid: Order() for pid in (0, 1)} if self.left else {}

    rows = simulate(LoopConfig(), 1, strategy=Twice)
    times = device_times()
    arrivals = {row["partition_id"]: row for row in select(rows, "arrival")}
    assert [row.get("num_requests", 1) for _, row in sorted(arrivals.items())] == [2, 2, 1, 1]
    barrier = max(times.values())
    for pid, row in arrivals.items():
        assert row["update_time_s"] == pytest.approx(times[pid] * (2 if pid < 2 else 1))
        assert row["train_macs"] == NUM_MACS * (2 if pid < 2 else 1)
        assert row["finish_s"] == pytest.approx(times[pid] + (barrier if pid < 2 else 0))
    assert select(rows, "merge")[0]["time_s"] == pytest.approx(barrier + max(times[0], times[1]))


def test_one_row_of_several_requests_adds_their_overheads_and_keeps_the_largest_peak():
    merged = {"status": "merged", "start_s": 1.0, "update_time_s": 2.0}
    rows = [
        {**merged, "overhead_s": 3.0, "peak_memory_bytes": 900, "accuracy": 0.5},
        {**merged, "start_s": 6.0, "overhead_s": 4.0, "peak_memory_bytes": 100, "accuracy": 0.7},
        {**merged, "start_s": 12.0},  # no overhead, and no report that says a peak
    ]
    row = combined_row(rows)
    assert (row["overhead_s"], row["peak_memory_bytes"], row["update_time_s"]) == (7.0, 900, 6.0)
    assert (row["start_s"], row["accuracy"], row["num_requests"]) == (1.0, 0.7, 3)


def test_a_round_in_which_the_method_asks_nobody_is_not_an_empty_one():
    class Idle(FedAvg):
        name = "idle"

        def plan(self, server_round, clients):
            return super().plan(server_round, clients) if server_round == 5 else {}

    rows = simulate(LoopConfig(max_empty_rounds=1), 6, strategy=Idle)
    assert [row["server_round"] for row in select(rows, "merge")] == [5]
