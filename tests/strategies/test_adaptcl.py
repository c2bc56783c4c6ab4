"""AdaptCL: learned rates, nested sub-models, ablations."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client_app.handler import handle
from client_app.model import build_model
from client_app.objectives.base import Task
from client_app.objectives.sparsity import sparsity_penalty
from fleet.clock import Duration
from pruning.cost import measure_costs
from pruning.extract import embed
from pruning.rates import ClientRate, RateParams
from pruning.spec import FULL, SubModelSpec
from server_app.checkpoint import load_checkpoint
from strategies import AdaptCL
from strategies.adaptcl import AdaptCLConfig
from strategies.exchange import Arrival, Entry
from strategies.setting import Order, Progress, Setting
from tests.runs import equal_states, final_state, select, tiny_run
from wire.flat import ConfigError
from wire.message import DataConfig, Instruction, Job, ModelConfig, Report, TrainConfig
from wire.spec import spec_from_json
from zoo import get_model

ADAPTCL: dict[str, Any] = {"strategy": "adaptcl", "num-rounds": 8, "adaptcl.pruning-interval": 2, "adaptcl.round-to": 1}
BLANK = torch.zeros(2, 1, 8, 8)
"""A batch of digits, for what depends on shapes only."""


def run_with_specs(folder: Path, **settings: Any) -> tuple[list[dict[str, Any]], dict[int, dict[int, SubModelSpec]]]:
    """Rows, and what each client was sent in each round."""
    sent: dict[int, dict[int, SubModelSpec]] = {}

    def spy(instruction: Instruction) -> Report:
        sent.setdefault(instruction.server_round, {})[instruction.partition_id] = instruction.spec
        return handle(instruction)

    return tiny_run(folder, spy, **{**ADAPTCL, **settings}), sent


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One run of AdaptCL: its folder, rows and specs."""
    folder = tmp_path_factory.mktemp("adaptcl") / "run"
    return folder, *run_with_specs(folder)


def test_a_model_of_which_no_unit_can_be_left_out_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    def whole(*arguments: Any):
        model, layout = build_model(*arguments)
        return model, layout.without([group.name for group in layout.prunable])

    monkeypatch.setattr("server_app.run.build_model", whole)
    with pytest.raises(ConfigError, match=r"adaptcl with model\.name=mlp: no unit of the model .* strategy=fedavg"):
        tiny_run(tmp_path / "run", **ADAPTCL)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert select(tiny_run(tmp_path / "fedavg", strategy="fedavg", num_rounds=1), "merge")


def test_update_times_come_together_and_the_fastest_keeps_the_full_model(plain):
    _, rows, sent = plain
    first, last = (
        [row["update_time_s"] for row in select(rows, "arrival", server_round=server_round)] for server_round in (1, 8)
    )
    assert max(first) / min(first) > 4
    assert max(last) / min(last) < 0.5 * max(first) / min(first)
    fastest = min(select(rows, "arrival", server_round=1), key=lambda row: row["update_time_s"])["partition_id"]
    decisions = select(rows, "decision")
    assert [decision["server_round"] for decision in decisions] == [3, 5, 7]
    assert {decision["reference"] for decision in decisions} == {fastest}
    assert all(decision["rates"][str(fastest)] == 1.0 for decision in decisions)
    assert all(specs[fastest] == SubModelSpec() for specs in sent.values())


def test_who_misses_the_deadline_is_pruned_until_it_is_in_time(plain, tmp_path):
    first = {row["partition_id"]: row["update_time_s"] for row in select(plain[1], "arrival", server_round=1)}
    slowest = max(first, key=lambda pid: first[pid])
    deadline_s = 1.1 * sorted(first.values())[-2]
    assert deadline_s < first[slowest]
    rows = tiny_run(tmp_path / "run", **{**ADAPTCL, "loop.deadline-s": deadline_s})
    answers = select(rows, "arrival", partition_id=slowest)
    assert {row["status"] for row in answers if row["update_time_s"] > deadline_s} == {"late"}
    assert {row["status"] for row in answers if row["update_time_s"] < deadline_s} == {"merged"}
    assert answers[0]["retention_ratio"] == 1 > 0.6 > answers[-1]["retention_ratio"]


def test_bytes_work_and_memory_fall_with_the_retention_ratio(plain):
    rows = sorted(select(plain[1], "arrival", server_round=8), key=lambda row: row["retention_ratio"])
    assert rows[0]["retention_ratio"] < 0.6 < rows[-1]["retention_ratio"] == 1
    for small, large in itertools.pairwise(rows):
        if small["retention_ratio"] < large["retention_ratio"]:
            for name in ("download_bytes", "upload_bytes", "train_macs", "peak_memory_bytes"):
                assert small[name] < large[name], name


def test_the_slower_a_device_the_less_it_keeps(plain):
    _, rows, _ = plain
    times = {row["partition_id"]: row["update_time_s"] for row in select(rows, "arrival", server_round=1)}
    rates = select(rows, "decision")[-1]["rates"]
    ordered = [rates[str(pid)] for pid in sorted(times, key=lambda pid: times[pid])]
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[-1] < 0.6


def test_sub_models_are_nested_between_clients_and_from_round_to_round(plain):
    _, _, sent = plain
    _, layout = get_model("mlp", 10, 1, 8)
    for specs in sent.values():
        by_size = sorted(specs.values(), key=lambda spec: sum(spec.widths(layout).values()))
        assert all(small.is_subset_of(large, layout) for small, large in itertools.pairwise(by_size))
    for before, after in itertools.pairwise(sent[server_round] for server_round in sorted(sent)):
        assert all(after[pid].is_subset_of(before[pid], layout) for pid in after)
    assert len(set(sent[8].values())) > 2


def test_the_order_is_frozen_at_the_first_decision(plain, tmp_path):
    _, rows, _ = plain
    assert len({decision["order_hash"] for decision in select(rows, "decision")}) == 1
    refreshed = tiny_run(tmp_path / "run", **ADAPTCL, adaptcl__order="refreshed")
    assert len({decision["order_hash"] for decision in select(refreshed, "decision")}) == 3


@pytest.mark.slow
def test_nobody_is_pruned_among_equals(tmp_path):
    rows = tiny_run(tmp_path / "run", **ADAPTCL, fleet__name="uniform")
    assert all(set(decision["rates"].values()) == {1.0} for decision in select(rows, "decision"))
    tiny_run(tmp_path / "fedavg", strategy="fedavg", num_rounds=8, fleet__name="uniform")
    assert equal_states(final_state(tmp_path / "run"), final_state(tmp_path / "fedavg"))


@pytest.mark.slow
def test_growing_starts_everybody_at_the_floor_and_never_takes_longer_than_the_slowest(tmp_path):
    settings = {"adaptcl.rates.direction": "grow", "num-rounds": 12, "fleet.noise": 0.0}
    rows, sent = run_with_specs(tmp_path / "run", **settings)
    assert len(set(sent[1].values())) == 1
    times = {pid: [r["update_time_s"] for r in select(rows, "arrival", partition_id=pid)] for pid in sent[1]}
    slowest = max(times, key=lambda pid: times[pid][0])
    assert {decision["reference"] for decision in select(rows, "decision")} == {slowest}
    assert {specs[slowest] for specs in sent.values()} == {sent[1][slowest]}
    assert all(times[pid][-1] <= 1.06 * times[slowest][-1] for pid in times)
    ratios = select(rows, "decision")[-1]["rates"]
    assert max(ratios.values()) > 2 * ratios[str(slowest)]


def test_the_nested_objective_trains_the_smallest_sub_model_in_use_inside_every_other(tmp_path):
    asked = []

    def spy(instruction: Instruction) -> Report:
        asked.append(instruction)
        return handle(instruction)

    tiny_run(tmp_path / "run", spy, **ADAPTCL, **{"adaptcl.local-objective": "nested"})
    assert {i.objective for i in asked if i.server_round <= 2} == {"cross-entropy"}
    late = [i for i in asked if i.server_round == 8]
    cores = {i.settings["core"] for i in late}
    assert len(cores) == 1
    core = spec_from_json(cores.pop())
    assert core in {i.spec for i in late}
    _, layout = get_model("mlp", 10, 1, 8)
    assert all(core.is_subset_of(i.spec, layout) for i in late)


@pytest.mark.parametrize("aggregation", ["by-worker", "by-unit", "by-worker-residual", "by-coverage"])
def test_every_aggregation_is_the_rule_it_names(aggregation, tmp_path):
    """Against the formulas, entry by entry in float64, for the first round in which clients hold different parts."""
    replies: list[tuple[Instruction, Report]] = []

    def spy(instruction: Instruction) -> Report:
        report = handle(instruction)
        if instruction.server_round == 3:
            replies.append((instruction, report))
        return report

    settings = {**ADAPTCL, "num-rounds": 3, "adaptcl.aggregation": aggregation, "adaptcl.coverage-threshold": 0.6}
    tiny_run(tmp_path / "run", spy, **settings)
    _, layout = get_model("mlp", 10, 1, 8)
    path = tmp_path / "run" / "checkpoints" / "round-000002.pt"
    before = {k: t.double() for k, t in torch.load(path, weights_only=True)["state"].items()}
    weighted = {key: torch.zeros_like(tensor) for key, tensor in before.items()}
    coverage = {key: torch.zeros_like(tensor) for key, tensor in before.items()}
    total = float(sum(report.num_examples for _, report in replies))
    for instruction, report in replies:
        state, held = embed({k: t.double() for k, t in report.state.items()}, layout, instruction.spec, before)
        for key in before:
            weighted[key] += report.num_examples * held[key] * state[key]
            coverage[key] += report.num_examples * held[key]
    for key, tensor in final_state(tmp_path / "run").items():
        s, c = weighted[key], coverage[key]
        holders = s / c.clamp(min=1e-9)
        expected = {
            "by-unit": holders,
            "by-worker": s / total,
            "by-worker-residual": (s + (total - c) * before[key]) / total,
            "by-coverage": torch.where(c >= 0.6 * total, holders, s / total),
        }[aggregation]
        assert torch.allclose(tensor.double(), torch.where(c > 0, expected, before[key]), atol=1e-6), key
    assert len({instruction.spec for instruction, _ in replies}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "importance"), [("bounded", "bn-scale"), ("global", "l1"), ("per-layer", "l2"), ("global", "bn-scale")]
)
def test_every_scope_and_importance_can_be_chosen(scope, importance, tmp_path):
    rows, sent = run_with_specs(
        tmp_path / "run", num_rounds=3, model__name="cnn", adaptcl__scope=scope, adaptcl__importance=importance
    )
    assert select(rows, "end")[0]["status"] == "completed"
    _, layout = get_model("cnn", 10, 1, 8)
    smallest = min(sent[3].values(), key=lambda spec: sum(spec.widths(layout).values()))
    shares = [smallest.width(layout, group.name) / group.size for group in layout.prunable]
    assert min(shares) < 1
    if scope == "per-layer":
        assert max(shares) - min(shares) < 0.05


def test_orders_of_their_own_are_not_nested(tmp_path):
    _, sent = run_with_specs(tmp_path / "run", num_rounds=3, adaptcl__identical=False)
    _, layout = get_model("mlp", 10, 1, 8)
    pruned = sorted((s for s in sent[3].values() if s.kept), key=lambda spec: sum(spec.widths(layout).values()))
    assert len(pruned) == 3
    assert not any(a.is_subset_of(b, layout) for a, b in itertools.combinations(pruned, 2))


def test_round_to_keeps_widths_that_kernels_like(tmp_path):
    _, sent = run_with_specs(tmp_path / "run", num_rounds=5, adaptcl__round_to=8)
    _, layout = get_model("mlp", 10, 1, 8)
    assert {s.width(layout, "hidden0") % 8 for specs in sent.values() for s in specs.values()} == {0}


@pytest.mark.slow
def test_a_client_that_pruning_cannot_help_is_named_in_one_warning(tmp_path):
    """Links so slow that the floor does not make up for them."""
    rows = tiny_run(
        tmp_path / "run", **{**ADAPTCL, "num-rounds": 12}, adaptcl__rates__min_retention_ratio=0.6, fleet__noise=0.0
    )
    warnings = [row["message"] for row in select(rows, "warning")]
    floors = select(rows, "decision")[-1]["floors"]
    assert floors
    assert len(warnings) == len(floors)
    for pid in floors:
        assert any(message.startswith(f"client {pid} stays slower than the target") for message in warnings)
        assert select(rows, "decision")[-1]["rates"][str(pid)] == pytest.approx(0.6, abs=0.03)


def test_the_family_has_a_member_for_every_rate_in_use(plain):
    _, rows, _ = plain
    rates = sorted({round(rate, 2) for rate in select(rows, "decision")[-1]["rates"].values() if rate < 1})
    family = select(rows, "evaluation")[-1]["family"]
    assert [member["name"] for member in family] == [*(f"{rate:.2f}" for rate in rates), "base"]
    for member in family[:-1]:
        assert member["retention_ratio"] == pytest.approx(float(member["name"]), abs=0.005)


def test_a_net_without_batch_norm_is_pruned_by_the_scales_it_learned(tmp_path):
    rows = tiny_run(tmp_path / "run", **{**ADAPTCL, "num-rounds": 3}, model__scales=True, train__sparsity=0.01)
    ratio = min(row["retention_ratio"] for row in select(rows, "arrival", server_round=3))
    assert ratio < 1
    ranked_in = load_checkpoint(tmp_path / "run" / "checkpoints" / "round-000002.pt")
    own = load_checkpoint(tmp_path / "run" / "checkpoints" / "round-000003.pt")[1]
    for name, scores in own["scores"].items():
        scales = ranked_in[0].state[f"blocks.{name.removeprefix('hidden')}.scale.weight"].abs().double()
        assert float(scales.std()) > 0
        np.testing.assert_allclose(scores, (scales / scales.mean()).numpy())


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "sparsity"), [("l1", 0.05), ("group-lasso", 0.03)])
def test_what_a_regulariser_punishes_ends_smaller_than_without_it(norm, sparsity, tmp_path):
    settings = {**ADAPTCL, "num-rounds": 4, "model.name": "cnn", "train.sparsity-norm": norm}

    def punished(factor: float) -> float:
        rows = tiny_run(tmp_path / str(factor), **settings, train__sparsity=factor)
        losses = [row["loss"] for row in select(rows, "evaluation")]
        assert losses[-1] < losses[0]
        model, layout = get_model("cnn", 10, 1, 8)
        model.load_state_dict(final_state(tmp_path / str(factor)))
        task = Task(model, layout, TrainConfig(sparsity_norm=norm), {}, torch.ones(10), FULL, model)
        return float(sparsity_penalty(task)().detach())

    assert punished(sparsity) < 0.8 * punished(0.0)


@pytest.mark.slow
def test_dgc_cuts_the_bytes_sent_and_still_learns(plain, tmp_path):
    _, whole, _ = plain
    rows = tiny_run(
        tmp_path / "run", **ADAPTCL, compression__kind="dgc", compression__density=0.05, train__learning_rate=0.02
    )

    def upload(log: list[dict[str, Any]]) -> int:
        return sum(row["upload_bytes"] for row in select(log, "arrival", server_round=1))

    assert {row["status"] for row in select(rows, "arrival")} == {"merged"}
    assert upload(rows) < 0.15 * upload(whole)
    assert max(row["accuracy"] for row in select(rows, "evaluation")) > 0.5
    assert any(row["retention_ratio"] < 1 for row in select(rows, "arrival"))


def test_a_decision_costs_less_than_a_hundredth_of_a_round_of_the_default_model():
    model, layout = get_model("cnn", 10, 1, 8)
    job = Job(ModelConfig(), DataConfig(), TrainConfig(), 10, 9, 0)
    strategy = AdaptCL(AdaptCLConfig(), Setting(job, layout, measure_costs(model, layout, torch.zeros(2, 1, 8, 8))))
    strategy.progress = Progress(dict(model.state_dict()))
    strategy._rates = {pid: ClientRate(1.0, (1.0 + pid,) * 4) for pid in range(10)}
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    instruction = Instruction("train", 0, 0, 1, 0, job, state)
    handle(instruction)
    strategy._decide(6)  # the first ranks all units, once
    began = time.process_time()
    handle(instruction)
    round_s = 10 * (time.process_time() - began)
    began = time.process_time()
    for _ in range(5):
        strategy._decide(11)
    assert (time.process_time() - began) / 5 < 0.01 * round_s


def with_an_order(config: AdaptCLConfig | None = None) -> AdaptCL:
    """AdaptCL on the multilayer perceptron, with units already ranked."""
    model, layout = get_model("mlp", 10, 1, 8)
    job = Job(ModelConfig("mlp"), DataConfig(), TrainConfig(), 4, 9, 0)
    strategy = AdaptCL(config or AdaptCLConfig(), Setting(job, layout, measure_costs(model, layout, BLANK)))
    strategy._scores = {g.name: np.random.default_rng(0).random(g.size) for g in layout.prunable}
    return strategy


def test_a_time_of_a_sub_model_that_a_client_had_before_a_decision_is_left_out():
    """Rounds that do not wait for everybody: what was asked before the cut arrives after it."""
    strategy = with_an_order()
    strategy._rates = {3: ClientRate(0.5, (), ((8.0, 1.0),))}
    report = Report(0, 3, {}, 10, (10,))

    def answer(spec: SubModelSpec, update_time_s: float) -> None:
        arrival = Arrival(Entry(0, 3, 1, 0, spec, 0.0, 0), report, Duration(0.0, update_time_s, 0.0), 9.0)
        strategy.vet(arrival, report)
        strategy.observe(arrival, report)

    answer(FULL, 8.0)
    assert strategy._rates[3].times_s == ()
    answer(strategy.evaluation_order(3).spec, 4.0)
    assert strategy._rates[3].times_s == (4.0,)


def test_the_core_lies_inside_the_sub_model_of_who_joins_after_all_others_have_grown():
    strategy = with_an_order(AdaptCLConfig(rates=RateParams(direction="grow"), order="refreshed"))
    strategy._rates = {0: ClientRate(0.6, (1.0,)), 1: ClientRate(0.8, (1.0,))}
    orders = strategy.plan(2, [0, 1, 2])
    core = spec_from_json(str(orders[2].settings["core"]))
    assert all(core.is_subset_of(order.spec, strategy.layout) for order in orders.values())


def test_the_warning_names_the_floor_that_rounding_leaves():
    """Widths in multiples of more than there are units: nothing can be left out."""
    strategy = with_an_order(AdaptCLConfig(round_to=1000))
    warned: list[str] = []
    strategy.listen = lambda row: warned.append(row.get("message", ""))
    strategy._rates = {0: ClientRate(1.0, (1.0,) * 3), 1: ClientRate(1.0, (4.0,) * 3)}
    strategy._decide(3)
    assert strategy._rates[1].retention_ratio == 1
    assert any("client 1 stays slower" in line and "at the floor of 1, " in line for line in warned)


def test_its_state_survives_a_checkpoint():
    first, second = with_an_order(), with_an_order()
    first._rates = {2: ClientRate(0.3, (1.0, 2.5), ((4.0, 1.0), (3.0, 0.5)), True), 0: ClientRate()}
    second._scores = None
    second.import_state(first.export_state())
    assert second._rates == first._rates
    assert second.evaluation_order(2) == first.evaluation_order(2) != Order()
    assert second.export_state() == first.export_state()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("aggregation", "by-luck"),
        ("scope", "galactic"),
        ("order", "random"),
        ("importance", "taylor"),
        ("layer_bound", 0),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ConfigError, match=setting.replace("_", "-")):
        AdaptCLConfig(**{setting: value})
