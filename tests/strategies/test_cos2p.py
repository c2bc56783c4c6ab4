"""Co-S2P: its merge by hand, its masks over rounds, its quorum, its coverage, and what it refuses."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from itertools import product

import pytest
import torch

from client_app.handler import handle
from pruning.cost import measure_costs
from pruning.extract import embed, extract
from pruning.spec import FULL, SubModelSpec
from strategies.base import RunStoppedError
from strategies.cos2p import CoS2PConfig
from strategies.cos2p_rule import l1_distance
from tests.marks import slow_but
from tests.runs import equal_states, final_state, select, tiny_run
from tests.strategies.small_cos2p import MLP, SEMI, VIT, Spy, states_of, strategy_of
from wire.flat import ConfigError
from wire.message import Instruction, Report
from zoo import get_model

# --- the merge -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "norm"),
    slow_but(
        [("co-s2p", "per-entry"), ("samples", "global")],
        product(["co-s2p", "published", "samples", "uniform", "polynomial"], ["per-entry", "global"]),
    ),
)
def test_a_merge_is_the_weighted_mean_of_steps_over_holders_or_over_everybody(norm, weight, tmp_path):
    """Entry by entry in float64: theta + sum c_i delta_i / (sum of c_i over holders, or over all)."""
    spy = Spy()
    settings = {**MLP, "cos2p.coverage-norm": norm, "cos2p.client-weight": weight, "data.partition": "quantity:0.7"}
    tiny_run(tmp_path / "run", spy, num_rounds=2, **settings)
    before, after = states_of(tmp_path / "run", 2)
    _, layout = get_model("mlp", 10, 1, 8)
    total = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in before.items()}
    coverage, everybody = {key: t.clone() for key, t in total.items()}, 0.0
    rates = {0: 1.0, 1: 0.75, 2: 0.5, 3: 0.25}
    for instruction, report in spy.seen[4:]:
        assert instruction.server_round == 2
        held = report.narrowed or instruction.spec
        sent = extract(before, layout, held)
        delta = {key: report.state[key].double() - sent[key].double() for key in sent}
        c = {
            "co-s2p": l1_distance(sent, report.state) / sum(tensor.numel() for tensor in sent.values()),
            "published": l1_distance(sent, report.state) / rates[instruction.partition_id],
            "samples": report.num_examples,
            "polynomial": report.num_examples,
            "uniform": 1.0,
        }[weight]
        dense, mask = embed(delta, layout, held, total)
        for key in total:
            total[key] += c * torch.where(mask[key], dense[key], torch.zeros(()).double())
            coverage[key] += c * mask[key]
        everybody += c
    for key, tensor in after.items():
        divisor = coverage[key] if norm == "per-entry" else torch.full_like(coverage[key], everybody)
        expected = before[key].double() + torch.where(coverage[key] > 0, total[key] / divisor.clamp(min=1e-300), 0.0)
        assert torch.allclose(tensor.double(), expected, atol=1e-6), key
        assert torch.equal(tensor[coverage[key] == 0], before[key][coverage[key] == 0])


def test_with_everybody_whole_uniform_weights_and_all_waited_for_it_is_fedavg(tmp_path):
    settings = {"num-rounds": 4, "data.partition": "iid", "train.local-epochs": 1}
    tiny_run(tmp_path / "a", strategy="fedavg", **settings)
    whole = {"cos2p.budgets": "1", "cos2p.quorum-ratio": 1.0}
    tiny_run(tmp_path / "b", strategy="cos2p", **{**settings, **whole, "cos2p.client-weight": "uniform"})
    fedavg, ours = final_state(tmp_path / "a"), final_state(tmp_path / "b")
    assert all(torch.allclose(fedavg[key], ours[key], atol=1e-6) for key in fedavg)


# --- masks over rounds -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_masks_are_learned_at_the_first_two_receptions_then_fixed_and_never_at_rate_1(tmp_path):
    spy = Spy()
    tiny_run(tmp_path / "run", spy, num_rounds=3, **{**VIT, "cos2p.masks": "learned"})
    learned: dict[int, list[SubModelSpec]] = defaultdict(list)
    for instruction, report in spy.seen:
        asks = instruction.objective.startswith("mask-learning")
        assert asks == (instruction.partition_id != 0 and instruction.server_round <= 2)
        if asks:
            learned[instruction.partition_id].append(report.narrowed)
            assert instruction.spec.kept == ()
        elif instruction.partition_id:
            assert instruction.spec == learned[instruction.partition_id][-1]
    assert {pid: spec.depth for pid, (_, spec) in learned.items()} == {1: 3, 2: 2, 3: 1}
    assert {pid: len(spec.units["block0.mlp"]) for pid, (_, spec) in learned.items()} == {1: 96, 2: 64, 3: 32}


def test_agreed_masks_are_those_that_most_clients_have_learned_each_a_part_of_the_larger_ones(tmp_path):
    spy = Spy()
    tiny_run(tmp_path / "run", spy, num_rounds=2, **{**VIT, "cos2p.masks": "agreed", "cos2p.mask-receptions": 1})
    learned = [report.narrowed for i, report in spy.seen if i.server_round == 1 and i.partition_id]
    specs = {i.partition_id: i.spec for i, _ in spy.seen if i.server_round == 2}
    for name in ("block0.mlp", "block0.heads"):
        kept = [set(specs[pid].units.get(name, range(4))) for pid in (3, 2, 1)]
        assert kept[0] <= kept[1] <= kept[2]
        votes = Counter(unit for mask in learned for unit in mask.units.get(name, ()))
        assert min(votes[unit] for unit in kept[0]) >= max(votes[unit] for unit in set(votes) - kept[0])
    assert len(specs[3].units["block0.mlp"]) == 32
    assert not any(i.objective.startswith("mask-learning") for i, _ in spy.seen if i.server_round == 2)


def test_a_client_whose_blocks_have_no_unit_to_choose_learns_no_mask(tmp_path):
    """An MLP's first block is as wide as the second one reads: alone, nothing in it can be left out."""
    spy = Spy()
    tiny_run(tmp_path / "run", spy, num_rounds=2, **{**MLP, "model.exits": True, "cos2p.budgets": "1,0.5"})
    shallow = [i for i, _ in spy.seen if i.spec.depth == 1]
    assert len(shallow) == 4
    assert {i.objective for i in shallow} == {"deepest-teaches+exit-choice"}


@pytest.mark.slow
def test_distillation_begins_at_its_round(tmp_path):
    spy = Spy()
    tiny_run(tmp_path / "run", spy, num_rounds=3, **VIT, cos2p__kd_start=3)
    weights = {i.server_round: i.settings["distillation-weight"] for i, _ in spy.seen}
    assert weights == {1: 0.0, 2: 0.0, 3: 0.5}


@pytest.mark.parametrize(("transfer", "base"), slow_but([("none", "exits")], [("mutual", "mutual"), ("none", "exits")]))
def test_other_transfers_and_the_deepest_exit_can_be_chosen(transfer, base, tmp_path):
    spy = Spy()
    settings = {"cos2p.transfer": transfer, "cos2p.exit-choice": "deepest", "cos2p.masks": "first"}
    tiny_run(tmp_path / "run", spy, num_rounds=1, **VIT, **settings)
    assert {instruction.objective for instruction, _ in spy.seen} == {base}


def test_random_masks_are_the_clients_own_of_the_right_size_and_stay(tmp_path):
    spy = Spy()
    tiny_run(tmp_path / "run", spy, num_rounds=2, **{**VIT, "cos2p.masks": "random", "cos2p.budgets": "1,0.5,0.5,0.5"})
    specs = {(i.partition_id, i.server_round): i.spec for i, _ in spy.seen}
    assert all(specs[pid, 1] == specs[pid, 2] for pid in range(4))
    assert len({specs[pid, 1] for pid in range(1, 4)}) == 3
    assert all(len(specs[pid, 1].units["block1.mlp"]) == 64 for pid in range(1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "semi-async"])
def test_a_run_resumed_in_the_middle_of_the_mask_phase_goes_on_as_if_nothing_had_happened(mode, tmp_path):
    settings = {**VIT, **(SEMI if mode == "semi-async" else {}), "evaluation.where": "both"}
    whole = tiny_run(tmp_path / "whole", num_rounds=3, **settings)
    tiny_run(tmp_path / "first", num_rounds=1, **settings)
    tiny_run(tmp_path / "second", num_rounds=3, resume=str(tmp_path / "first"), **settings)
    assert equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "second"))
    assert any("mask_loss" in row for row in select(whole, "arrival", server_round=2))


# --- depth, exits, evaluation ----------------------------------------------------------------------------------------


def test_exits_are_evaluated_at_every_depth_and_clients_by_the_exit_they_prefer(tmp_path):
    rows = tiny_run(tmp_path / "run", num_rounds=2, **VIT, evaluation__where="both")
    last = select(rows, "evaluation", where="central")[-1]
    assert [member["name"] for member in last["family"]] == ["exit 1", "exit 2", "exit 3", "base"]
    assert select(rows, "evaluation", where="federated")[-1]["clients"].keys() == {"0", "1", "2", "3"}
    merged = select(rows, "arrival")[-4:]
    assert {sum(key.startswith("exit_") for key in row) for row in merged} == {1, 2, 3, 4}


def test_exits_that_nobody_has_trained_are_reported_and_not_evaluated_as_if_they_were(tmp_path):
    def leaves(instruction: Instruction) -> None:
        if instruction.partition_id == 0:
            raise RuntimeError("the only device that holds all of the model is away")

    settings = {**VIT, "evaluation.every": 1, "cos2p.kd-start": 1}
    rows = tiny_run(tmp_path / "run", Spy(leaves), num_rounds=2, **settings)
    first, second, third = select(rows, "evaluation")
    assert "depth" not in first
    assert (second["depth"], third["depth"]) == (3, 3)
    assert [member["name"] for member in third["family"]] == ["exit 1", "exit 2", "base"]
    warnings = [row["message"] for row in select(rows, "warning")]
    assert len(warnings) == 1
    assert "N* is 0: nobody in this merge held all of" in warnings[0]
    assert "blocks.3" in warnings[0]
    assert {row["n_star"] for row in select(rows, "merge")} == {0}


def test_nor_do_clients_test_an_exit_that_nobody_has_trained(tmp_path):
    """Client 0, who alone holds the end of the model, never answers; asked to test, it tests what others trained."""
    tested: list[Instruction] = []

    def leaves(instruction: Instruction) -> None:
        if instruction.partition_id == 0:
            raise RuntimeError("the only device that holds all of the model is away")

    class Tester(Spy):
        def __call__(self, instruction: Instruction) -> Report:
            if instruction.action != "train":
                tested.append(instruction)
                return handle(instruction)
            return super().__call__(instruction)

    tiny_run(
        tmp_path / "run", Tester(leaves), num_rounds=2, **{**VIT, "evaluation.every": 1, "evaluation.where": "both"}
    )
    depths = {i.spec.depth for i in tested if i.partition_id == 0 and i.server_round == 2}
    assert depths == {3}


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        ({}, (2, 0.0, 10)),
        ({"loop.deadline-s": 30.0}, (2, 30.0, 10)),
        ({"loop.quorum": 3}, (3, 0.0, 10)),
        ({"loop.quorum": 3, "loop.max-staleness": 4}, (3, 0.0, 4)),
        ({"cos2p.quorum-ratio": 0.0}, (0, 0.0, 0)),
        ({"cos2p.quorum-ratio": 0.0, "loop.deadline-s": 30.0}, (0, 30.0, 10)),
    ],
)
def test_quorum_deadline_and_staleness_each_stand_unless_they_are_given(loop, expected):
    found = strategy_of(loop).loop
    assert (found.quorum, found.deadline_s, found.max_staleness) == expected


def test_a_share_whose_product_is_not_exact_asks_for_nobody_more():
    assert strategy_of({"num-clients": 100, "cos2p.quorum-ratio": 0.55}).loop.quorum == 55


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cos2p.transfer": "mutual"}, r"cos2p\.transfer=mutual with model\.exits=false: .*set model\.exits=true"),
        ({"cos2p.kd-weight": 0.9}, r"cos2p\.kd-weight=0\.9 with model\.exits=false"),
        ({"loop.client-weight": "equal"}, r"loop\.client-weight=equal with cos2p\.client-weight=co-s2p: .*=samples"),
        (
            {
                "loop.quorum": 2,
                "loop.max-staleness": 9,
                "loop.staleness": "hinge:1:2",
                "cos2p.client-weight": "uniform",
            },
            r"loop\.staleness=hinge:1:2 with cos2p\.client-weight=uniform: .*=samples",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path / "run", **{**MLP, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cos2p.masks": "first", "cos2p.mask-epochs": 9}, "cos2p.mask-epochs=9 with cos2p.masks=first: has no effect"),
        (
            {"model.exits": True, "cos2p.transfer": "none", "cos2p.kd-weight": 0.9, "cos2p.temperature": 1.0},
            "cos2p.temperature=1.0, cos2p.kd-weight=0.9 with cos2p.transfer=none: has no effect",
        ),
        ({"cos2p.budgets": "0.5"}, "cos2p.masks=agreed: .* no client keeps more than 0.5 of a layer's units"),
        ({"robust.clip-factor": 2.0}, r"client-weight=co-s2p with robust\.clip-\*: .*set robust\.centre=median, or"),
        ({"model.exits": True, "cos2p.kd-start": 2}, "no exit ever teaches another: cos2p.kd-start=2 is behind"),
    ],
)
def test_an_ablation_that_leaves_a_setting_idle_and_teaching_that_never_begins_are_said(settings, message, tmp_path):
    rows = tiny_run(tmp_path / "run", **{**MLP, "cos2p.mask-epochs": 20, "num-rounds": 1, **settings})
    said = [row["message"] for row in select(rows, "warning", server_round=0)]
    assert len(said) == 1
    assert re.search(message, said[0])


def test_nobody_able_to_hold_the_full_depth_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"nobody can hold the full depth.*holds 2; give one client more, or"):
        tiny_run(tmp_path / "run", **VIT, cos2p__budgets="0.5,0.25")


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_budgets_give_each_device_what_fits(tmp_path):
    model, layout = get_model("tests.vits:small", 10, 1, 8, exits=True)
    cost = measure_costs(model, layout, torch.zeros(2, 1, 8, 8))
    full = cost.of(FULL).peak_memory_bytes(16, 2)
    budgets = f"{full / 1000:.3f}KB,{0.6 * full / 1000:.3f}KB"
    spy = Spy()
    tiny_run(tmp_path / "run", spy, num_rounds=1, **VIT, cos2p__budgets=budgets, cos2p__solver="fit")
    assert spy.seen
    for instruction, report in spy.seen:
        if instruction.partition_id >= 2:
            held = report.narrowed or instruction.spec
            assert cost.of(held).peak_memory_bytes(16, 2) <= 0.6 * full
            assert report.peak_memory_bytes <= 0.75 * full, "mask phase included"
            assert held != FULL


@pytest.mark.slow
def test_a_budget_too_small_for_one_block_names_the_client_and_what_it_takes(tmp_path):
    with pytest.raises(ConfigError, match=r"client 2: capability: 0\.0 MiB are too small for the first 1 of 4 blocks"):
        tiny_run(tmp_path / "run", **VIT, cos2p__budgets="1GB,1KB", cos2p__solver="fit")


def test_shares_of_devices_need_devices(tmp_path):
    with pytest.raises(ConfigError, match="device:SHARE needs a simulated fleet"):
        tiny_run(tmp_path / "run", **MLP, cos2p__budgets="device:0.5", fleet__name="none")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("budgets", "2"),
        ("masks", "learnt"),
        ("mask_receptions", 0),
        ("mask_learning_rate", 0.0),
        ("kd_weight", -1.0),
        ("quorum_ratio", 1.5),
        ("client_weight", "co-s2"),
        ("coverage_norm", "entry"),
        ("solver", "best"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key.replace("_", "-")):
        CoS2PConfig(**{key: value})


# --- the quorum ------------------------------------------------------------------------------------------------------


def test_half_of_the_clients_close_a_round_and_stragglers_are_merged_later_with_their_staleness(tmp_path):
    rows = tiny_run(tmp_path / "run", num_rounds=8, num_clients=6, **{**MLP, **SEMI, "fleet.name": "linear:4"})
    assert {row["num_merged"] for row in select(rows, "merge")} == {3}
    stale = [row for row in select(rows, "arrival") if row["staleness"]]
    assert {row["status"] for row in stale} == {"merged"}
    assert max(row["staleness"] for row in stale) >= 2


def test_a_late_answer_counts_less_the_further_the_model_has_moved(tmp_path):
    """The weight of every answer, from the versions it was sent and merged into; read back from the coverage."""
    spy = Spy()
    settings = {**MLP, **SEMI, "cos2p.budgets": "1", "num-clients": 4, "fleet.name": "linear:4"}
    rows = tiny_run(tmp_path / "run", spy, num_rounds=6, **settings)
    torch.manual_seed(0)
    states = [dict(get_model("mlp", 10, 1, 8)[0].state_dict()), *states_of(tmp_path / "run", 6)]
    answers = {(i.partition_id, i.global_version): r for i, r in spy.seen}
    num_stale = 0
    for server_round in range(1, 7):
        before, after = states[server_round - 1], states[server_round]
        weighed = []
        for row in select(rows, "arrival", server_round=server_round):
            report = answers[row["partition_id"], row["global_version_sent"]]
            drift = l1_distance(before, states[row["global_version_sent"]])
            step = sum(float(d.abs().sum()) for d in report.state.values())
            weighed.append((step / (drift / step + 1), report.state))
            num_stale += row["staleness"] > 0
        total = sum(c for c, _ in weighed)
        for key, tensor in after.items():
            expected = before[key] + sum(c * delta[key] for c, delta in weighed) / total
            assert torch.allclose(tensor, expected, atol=1e-5), (server_round, key)
    assert num_stale


@pytest.mark.slow
def test_with_a_straggler_the_quorum_keeps_clients_busier_than_waiting_for_all(tmp_path):
    from reporting.log import read_events
    from reporting.summary import summarise

    used = {}
    for name, ratio in (("half", 0.5), ("all", 1.0)):
        settings = {**MLP, "cos2p.quorum-ratio": ratio, "cos2p.budgets": "1", "num-clients": 6}
        fleet = tmp_path / "fleet.toml"
        fleet.write_text(STRAGGLER)
        tiny_run(tmp_path / name, num_rounds=10, **settings, fleet__name=str(fleet))
        used[name] = summarise(read_events(tmp_path / name))["utilisation_ratio"]
    assert used["half"] >= 1.2 * used["all"]


STRAGGLER = """
[[devices]]
profile = "raspberry-pi-4"
count = 5
[[devices]]
profile = "raspberry-pi-4"
count = 1
slowdown = 4.0
"""


def test_clients_that_die_below_the_quorum_end_the_run_clearly_and_the_checkpoint_stays(tmp_path):
    def dies(instruction: Instruction) -> None:
        if instruction.server_round > 2:
            raise RuntimeError("no power")

    with pytest.raises(RunStoppedError, match=r"no usable answer in 3 rounds in a row.*the last checkpoint is kept"):
        tiny_run(tmp_path / "run", Spy(dies), num_rounds=20, **{**MLP, **SEMI, "loop.deadline-s": 5.0})
    assert (tmp_path / "run" / "checkpoints" / "round-000002.pt").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert select(rows, "end")[0]["status"] == "failed"


def test_a_quorum_that_silent_devices_never_fill_gives_way_to_the_deadline(tmp_path):
    silent = {"cos2p.quorum-ratio": 1.0, "fleet.drop-out-ratio": 0.5, "loop.deadline-s": 2.0}
    rows = tiny_run(tmp_path / "run", num_rounds=4, num_clients=4, **{**MLP, **SEMI, **silent})
    merges = select(rows, "merge")
    assert len(merges) == 4
    assert min(row["num_merged"] for row in merges) < 4
    began = [0.0, *(row["time_s"] for row in merges)]
    took = [later - earlier for earlier, later in itertools.pairwise(began)]
    assert all(time_s == pytest.approx(2.0) for time_s, row in zip(took, merges, strict=True) if row["num_merged"] < 4)
    assert max(took) <= 2.0 + 1e-9


def test_whoever_comes_back_after_max_staleness_is_turned_away_and_gets_the_new_model(tmp_path):
    settings = {**MLP, **SEMI, "cos2p.max-staleness": 1, "cos2p.budgets": "1", "fleet.name": "linear:9"}
    rows = tiny_run(tmp_path / "run", num_rounds=12, num_clients=4, **settings)
    late = select(rows, "arrival", status="late")
    assert late
    assert all(row["staleness"] > 1 for row in late)
    again = [row for row in select(rows, "arrival") if row["partition_id"] == late[0]["partition_id"]]
    assert any(row["start_s"] >= late[0]["finish_s"] for row in again)
