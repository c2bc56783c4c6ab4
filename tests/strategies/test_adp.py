"""ADP: its schedule, its merges entry by entry, its bases, modes and refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from client_app.handler import handle
from client_app.store import ClientStore
from pruning.extract import embed, extract
from pruning.gates import BITMAP, PREFIX, SALIENCE
from pruning.groups import Layout
from strategies.adp import ADPConfig
from tests.marks import slow_but
from tests.runs import equal_states, final_state, select, tiny_run, without_timings
from wire.flat import ConfigError
from wire.message import Instruction, Report
from zoo import get_model

ADP: dict[str, Any] = {"strategy": "adp", "adp.warmup-rounds": 1, "adp.ramp-rounds": 1, "num-rounds": 3}
K = 104  # of 200 hidden neurons at density .5: a multiple of 8


class Spy:
    """Trains as clients do and keeps requests and answers of training."""

    def __init__(self, change: Any = lambda instruction, report: report) -> None:
        self.seen: list[tuple[Instruction, Report]] = []
        self.change = change

    def __call__(self, instruction: Instruction) -> Report:
        report = self.change(instruction, handle(instruction))
        if instruction.action == "train":
            self.seen.append((instruction, report))
        return report

    def of(self, server_round: int) -> list[tuple[Instruction, Report]]:
        return [(i, r) for i, r in self.seen if i.server_round == server_round]


def test_dense_at_first_then_linearly_down():
    config = ADPConfig(density=0.4, warmup_rounds=2, ramp_rounds=3)
    found = [config.density_at(server_round) for server_round in range(1, 8)]
    assert found == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.4, 0.4])
    assert ADPConfig(density=0.3, warmup_rounds=0, ramp_rounds=0).density_at(1) == 0.3


def test_the_model_itself_says_how_many_units_win_and_dense_rounds_send_everything(tmp_path):
    spy = Spy()
    tiny_run(tmp_path / "run", spy, **ADP)
    key = PREFIX + "hidden1.num_winners"
    assert [int(spy.of(n)[0][0].state[key]) for n in (1, 2, 3)] == [200, K, K]
    assert all(report.narrowed is None for _, report in spy.of(1))
    assert all(len(report.narrowed.units["hidden1"]) == K for _, report in spy.of(2))


@pytest.mark.parametrize("lost", slow_but((None,), (None, 1)))
@pytest.mark.parametrize("upload", ["salient", "changed"])
def test_a_merge_is_the_mean_over_those_who_sent_a_unit_and_others_keep_its_value(upload, lost, tmp_path):
    """Per channel, weight n_i, entry by entry in float64; a client whose upload is lost counts for nothing.

    Where what is not sent waits, who did not send a unit counts as the server's value: its change comes later.
    """

    def change(instruction: Instruction, report: Report) -> Report:
        if (instruction.server_round, instruction.partition_id) == (2, lost):
            raise RuntimeError("the upload was lost")
        return report

    spy = Spy(change)
    tiny_run(tmp_path / "run", spy, **{**ADP, "num-rounds": 2, "adp.upload-density": 0.2, "adp.upload": upload})
    _, layout = get_model("mlp", 10, 1, 8, gates=True)
    before = dict(spy.of(2)[0][0].state)
    after = final_state(tmp_path / "run")
    total = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in before.items()}
    weight = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in before.items()}
    for _, report in spy.of(2):
        state, held = embed(report.state, layout, report.narrowed, before)
        for key in total:
            total[key] += report.num_examples * held[key] * state[key].double()
            weight[key] += report.num_examples * held[key]
    assert len(spy.of(2)) == (4 if lost is None else 3)
    everybody = sum(report.num_examples for _, report in spy.of(2))
    num_kept = 0
    for key, tensor in before.items():
        if not tensor.is_floating_point():
            assert torch.equal(after[key], tensor)
            continue
        expected = torch.where(weight[key] > 0, total[key] / weight[key].clamp(min=1e-9), tensor.double())
        if upload == "changed":
            expected = (total[key] + (everybody - weight[key]) * tensor.double()) / everybody
        assert torch.allclose(after[key].double(), expected, atol=1e-6), key
        assert torch.equal(after[key][weight[key] == 0], tensor[weight[key] == 0])
        num_kept += int((weight[key] == 0).sum())
    assert num_kept, "every unit was sent by somebody: the test shows nothing"


def test_what_waits_goes_with_the_next_answer_and_after_a_lost_one_with_the_one_after_it(tmp_path):
    """Client 1's answer of round 3 is lost: in round 4 it goes on from what waited after round 2."""
    waiting: dict[int, dict[str, torch.Tensor]] = {}
    folder = tmp_path / "run"

    def change(instruction: Instruction, report: Report) -> Report:
        if instruction.action == "train" and instruction.partition_id == 1:
            store = ClientStore(instruction.job.store_dir, 1)
            waiting[instruction.server_round] = store.load(instruction.dispatch).get("objective", {}).get("unsent", {})
            if instruction.server_round == 3:
                raise RuntimeError("the answer was lost")
        return report

    spy = Spy(change)
    tiny_run(folder, spy, **{**ADP, "num-rounds": 4, "adp.upload": "changed", "adp.upload-density": 0.2})
    ((instruction, report),) = [(i, r) for i, r in spy.of(4) if i.partition_id == 1]
    blank = replace(instruction, settings={**instruction.settings, "upload": "all", "upload-density": 1.0})
    trained = handle(replace(blank, last_dispatch=-1, job=replace(instruction.job, store_dir=""))).state
    _, layout = get_model("mlp", 10, 1, 8, gates=True)
    due = {key: trained[key] + tensor for key, tensor in waiting[2].items()}
    expected = extract({**trained, **due}, layout, report.narrowed)
    assert waiting[2].keys() == {"blocks.1.linear.weight", "blocks.1.linear.bias", "heads.0.weight"}
    assert all(torch.allclose(report.state[key], tensor, atol=1e-6) for key, tensor in expected.items())
    sent = any(bool(extract({**trained, key: t}, layout, report.narrowed)[key].any()) for key, t in waiting[2].items())
    assert sent, "nothing that waited went: the test shows nothing"


@pytest.mark.slow
def test_salient_uploads_are_smaller_and_the_bitmap_and_salience_are_counted(tmp_path):
    rows = tiny_run(tmp_path / "salient", **ADP)
    everything = tiny_run(tmp_path / "all", **{**ADP, "adp.upload": "all"})
    bytes_of = [select(found, "arrival", server_round=3)[0]["upload_bytes"] for found in (rows, everything)]
    removed = 4 * (200 - K) * (200 + 1 + 10) + 8 * (200 - K)  # rows, biases and columns, and which units these are
    assert bytes_of[1] - bytes_of[0] == removed - 25  # the bitmap


@pytest.mark.parametrize("spoil", slow_but(("bitmap",), ("bitmap", "narrowed", "no bitmap", "salience")))
def test_an_upload_whose_bitmap_and_tensors_disagree_is_turned_away_with_the_reason(spoil, tmp_path):
    def change(instruction: Instruction, report: Report) -> Report:
        if instruction.action != "train" or (instruction.server_round, instruction.partition_id) != (2, 1):
            return report
        companions = dict(report.companions)
        if spoil == "bitmap":
            companions[BITMAP] = companions[BITMAP] ^ torch.tensor([3] + [0] * 24, dtype=torch.uint8)
        elif spoil == "no bitmap":
            del companions[BITMAP]
        elif spoil == "salience":
            companions[SALIENCE] = companions[SALIENCE][:-1]
        else:
            return replace(report, narrowed=None)
        return replace(report, companions=companions)

    rows = tiny_run(tmp_path / "run", Spy(change), **ADP)
    (lost,) = [row for row in select(rows, "arrival") if row["status"] != "merged"]
    assert (lost["server_round"], lost["partition_id"], lost["status"]) == (2, 1, "rejected")
    expected = {
        "bitmap": "disagree about 2 units",
        "no bitmap": "got none",
        "salience": "salience",
        "narrowed": "shape",
    }
    assert expected[spoil] in lost["reason"]
    assert select(rows, "merge")[1]["num_merged"] == 3


def test_a_clients_sub_model_is_what_was_most_salient_to_it_and_travels_both_ways(tmp_path):
    spy = Spy()
    rows = tiny_run(tmp_path / "run", spy, **{**ADP, "adp.share": "client"})
    salience = {i.partition_id: r.companions[SALIENCE] for i, r in spy.of(1)}
    for instruction, report in spy.of(2):
        best = salience[instruction.partition_id].argsort(descending=True, stable=True)[:K]
        assert instruction.spec.units["hidden1"] == tuple(sorted(best.tolist()))
        assert report.narrowed is None
        assert report.companions[SALIENCE].shape == (200,), "units that it does not hold are judged too"
    first, last = (select(rows, "arrival", server_round=n)[0] for n in (1, 3))
    assert last["download_bytes"] < first["download_bytes"]
    assert last["upload_bytes"] < first["upload_bytes"]
    assert len({instruction.spec for instruction, _ in spy.of(2)}) > 1


@pytest.mark.parametrize("base", slow_but(("fedavg",), ("fedavg", "fedprox", "scaffold", "fednova")))
def test_every_base_learns_and_sends_what_it_needs(base, tmp_path):
    spy = Spy()
    rows = tiny_run(tmp_path / "run", spy, **{**ADP, "adp.base": base, "num-rounds": 6})
    objectives = {instruction.objective for instruction, _ in spy.seen}
    corrections = {"fedprox": {"gated+proximal"}, "scaffold": {"gated+variates"}}
    assert objectives == corrections.get(base, {"gated"})
    has_variates = {any(k.startswith("variate:") for k in report.companions) for _, report in spy.seen}
    assert has_variates == {base == "scaffold"}
    assert max(row["accuracy"] for row in select(rows, "evaluation")) > 0.7


@pytest.mark.slow
def test_with_mu_0_fedprox_is_fedavg_and_with_equal_steps_fednova_is(tmp_path):
    states = []
    for name, keys in (("a", {}), ("b", {"adp.base": "fedprox", "adp.mu": 0.0}), ("c", {"adp.base": "fednova"})):
        tiny_run(tmp_path / name, **{**ADP, **keys})
        states.append(final_state(tmp_path / name))
    assert equal_states(states[0], states[1])
    assert equal_states(states[0], states[2])


def test_compact_and_masked_training_are_the_same_run(tmp_path):
    states = []
    for compact in (True, False):
        tiny_run(tmp_path / str(compact), **{**ADP, "adp.compact": compact, "adp.upload": "all"})
        states.append(final_state(tmp_path / str(compact)))
    for key, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.slow
def test_personal_gates_are_never_sent_and_go_on_after_a_resume(tmp_path):
    spy = Spy()
    keys = {**ADP, "adp.gates": "personal", "evaluation.where": "federated", "num-rounds": 4}
    whole = tiny_run(tmp_path / "whole", spy, **keys)
    learned = {"gates.hidden1.weight", "gates.hidden1.bias"}
    assert all(learned <= i.state.keys() for i, _ in spy.of(1)), "the first time, everybody starts alike"
    assert not any(learned & i.state.keys() for i, _ in spy.of(2))
    assert not any(learned & r.state.keys() for _, r in spy.seen)
    start = {key: spy.of(1)[0][0].state[key] for key in learned}
    assert all(torch.equal(final_state(tmp_path / "whole")[key], tensor) for key, tensor in start.items())
    tiny_run(tmp_path / "first", **{**keys, "num-rounds": 2})
    resumed = tiny_run(tmp_path / "second", resume=str(tmp_path / "first"), **keys)
    assert equal_states(final_state(tmp_path / "second"), final_state(tmp_path / "whole"))
    assert select(resumed, "evaluation")[-1]["accuracy"] == select(whole, "evaluation")[-1]["accuracy"]


def test_static_keeps_one_set_of_units_for_everybody_and_evaluates_it(tmp_path):
    spy = Spy()
    keys = {**ADP, "model.gates": False, "adp.mode": "static", "adp.ramp-rounds": 2, "num-rounds": 5}
    rows = tiny_run(tmp_path / "run", spy, **keys)
    widths = [{len(i.spec.units.get("hidden1", range(200))) for i, _ in spy.of(n)} for n in range(1, 6)]
    assert widths == [{200}, {152}, {K}, {K}, {K}]
    specs = [spy.of(n)[0][0].spec for n in (2, 3, 4)]
    assert set(specs[1].units["hidden1"]) < set(specs[0].units["hidden1"]), "a later choice is part of an earlier one"
    assert specs[2] == specs[1]
    assert len({i.spec for i, _ in spy.of(5)}) == 1
    assert select(rows, "evaluation")[-1]["accuracy"] > 0.5


def test_magnitude_zeroes_small_weights_and_saves_no_byte(tmp_path):
    keys = {**ADP, "model.gates": False, "adp.mode": "magnitude", "adp.threshold": 0.02}
    rows = tiny_run(tmp_path / "run", **keys)
    found = select(rows, "arrival")
    assert all(row["zero_ratio"] > 0 for row in found)
    assert {row["upload_bytes"] for row in found} == {row["download_bytes"] for row in found}


def test_measured_plans_are_logged_once_per_client_and_layers_that_do_not_pay_are_dense_for_everybody(tmp_path):
    spy = Spy()
    rows = tiny_run(tmp_path / "run", spy, **{**ADP, "adp.plan": "measured"})
    plans = select(rows, "plan")
    assert sorted(row["partition_id"] for row in plans) == [0, 1, 2, 3]
    assert all(times["dense_s"] > 0 for row in plans for times in row["layers"].values())
    assert int(spy.of(2)[0][0].state[PREFIX + "hidden1.num_winners"]) == 0, "its predictor is as large as the layer"
    assert all("hidden1" not in (report.narrowed or instruction.spec).units for instruction, report in spy.of(2))
    assert [row["dense"] for row in select(rows, "gates")] == [[], ["hidden1"], ["hidden1"]], "the plan in force"
    (warning,) = select(rows, "warning")
    assert warning["server_round"] == 2
    assert "leaves every layer dense" in warning["message"]


def test_a_gate_that_leaves_nobody_out_is_measured_once_and_does_not_pay(tmp_path):
    rows = tiny_run(tmp_path / "run", **{**ADP, "adp.plan": "measured", "adp.density": 1.0})
    assert [row["partition_id"] for row in select(rows, "plan", server_round=1)] == [0, 1, 2, 3]
    assert not select(rows, "plan", server_round=2)
    assert [row["dense"] for row in select(rows, "gates")] == [[], ["hidden1"], ["hidden1"]]


def test_the_plan_is_settled_when_pruning_begins_whoever_is_asked_later(tmp_path):
    drawn = {"loop.clients-per-round": 1, "num-rounds": 6}
    rows = tiny_run(tmp_path / "run", **{**ADP, **drawn, "adp.plan": "measured", "adp.warmup-rounds": 2})
    asked = {row["partition_id"]: row["server_round"] for row in reversed(select(rows, "arrival"))}  # first time
    assert max(asked.values()) > 2, "somebody comes after the warm-up"
    measured = {row["partition_id"] for row in select(rows, "plan")}
    assert measured == {pid for pid, server_round in asked.items() if server_round <= 2}


RESUMED: dict[str, dict[str, Any]] = {
    "salience": {"adp.share": "client"},
    "variates": {"adp.base": "scaffold"},
    "static units": {"model.gates": False, "adp.mode": "static"},
    "what waits to be sent": {"adp.upload": "changed", "adp.upload-density": 0.2},
    "nothing but the schedule": {},
}
"""What a run has to remember -> settings under which it does."""


@pytest.mark.parametrize("number", slow_but((3,), (1, 3)))
@pytest.mark.parametrize("what", slow_but(("static units", "what waits to be sent"), RESUMED))
def test_a_run_that_is_resumed_in_its_warm_up_or_on_its_way_down_is_the_same_run(what, number, tmp_path):
    """Dense in rounds 1 and 2, at density .75 in round 3, at .5 from round 4 on."""
    keys = {**ADP, **RESUMED[what], "adp.warmup-rounds": 2, "adp.ramp-rounds": 2, "num-rounds": 5}
    whole = tiny_run(tmp_path / "whole", **keys)
    tiny_run(tmp_path / "first", **{**keys, "num-rounds": number})
    resumed = tiny_run(tmp_path / "second", resume=str(tmp_path / "first"), **keys)
    assert equal_states(final_state(tmp_path / "second"), final_state(tmp_path / "whole"))
    kept = [[row for row in without_timings(rows) if row["event"] != "warning"] for rows in (resumed, whole)]
    assert kept[0] == kept[1]


def test_clients_that_were_measured_are_not_measured_again_after_a_resume(tmp_path):
    keys = {**ADP, "adp.plan": "measured"}
    tiny_run(tmp_path / "first", **{**keys, "num-rounds": 1})
    rows = tiny_run(tmp_path / "second", resume=str(tmp_path / "first"), **keys)
    assert [row["server_round"] for row in select(rows, "plan")] == [1, 1, 1, 1]
    assert select(rows, "gates")[-1]["dense"] == ["hidden1"]


def test_a_row_of_every_round_says_what_the_gates_did(tmp_path):
    rows = select(tiny_run(tmp_path / "run", **ADP), "gates")
    assert [(row["server_round"], row["density"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.5)]
    assert rows[0]["layers"] == {}, "nobody loses in a dense round"
    assert set(rows[2]["layers"]["hidden1"]) == {"entropy", "overlap", "never_used_ratio", "agreement"}
    assert all(0 <= value <= 1 for value in rows[2]["layers"]["hidden1"].values())
    assert len(rows[2]["overlaps"]) == 10


def without_blocks(num_classes: int, in_channels: int, image_size: int) -> tuple[nn.Module, Layout]:
    """A model whose layout says nothing of blocks, as that of a traced one."""
    model, layout = get_model("cnn", num_classes, in_channels, image_size)
    return model, Layout(layout.groups)


def test_a_model_that_is_no_chain_of_blocks_shares_winners_by_batch(tmp_path):
    keys = {"model.name": "tests.strategies.test_adp:without_blocks", "adp.share": "batch"}
    rows = tiny_run(tmp_path / "run", **{**ADP, **keys, "data.max-train": 100, "train.local-epochs": 1})
    assert set(select(rows, "gates")[-1]["layers"]) == {"stage2", "stage3"}


REFUSED: dict[str, dict[str, Any]] = {
    "adp.upload=changed with compression.kind=dgc": {"adp.upload": "changed", "compression.kind": "dgc"},
    "adp.upload=changed with .*robust.centre=median": {"adp.upload": "changed", "robust.centre": "median"},
    "use model.gates=true": {"model.gates": False},
    "control variates are means": {"adp.base": "scaffold", "adp.share": "client"},
    "use another base|or another base": {
        "adp.base": "scaffold",
        "adp.gates": "personal",
        "evaluation.where": "federated",
    },
    "evaluation.where=federated": {"adp.gates": "personal"},
    "use train.optimizer=sgd": {"adp.base": "fednova", "train.optimizer": "adam"},
    "robust.centre=mean without clipping": {"adp.base": "scaffold", "robust.centre": "median"},
    "nothing to measure; use adp.plan=all": {"adp.share": "client", "adp.plan": "measured"},
    r"no chain of blocks .* use adp.share=batch or sample": {"model.name": "tests.strategies.test_adp:without_blocks"},
    "with model.name=vit_micro": {
        "adp.mode": "static",
        "model.gates": False,
        "model.name": "vit_micro",
    },
}


IDLE: dict[str, dict[str, Any]] = {
    r"adp.share=sample with adp.mode=static: has no effect; leave it out, or use adp.mode=gate": {
        "model.gates": False,
        "adp.mode": "static",
        "adp.share": "sample",
    },
    r"adp.optimizer-mask=false, adp.plan=measured with adp.mode=magnitude": {
        "model.gates": False,
        "adp.mode": "magnitude",
        "adp.plan": "measured",
        "adp.optimizer-mask": False,
    },
    r"adp.density=0.3 with adp.mode=magnitude": {"model.gates": False, "adp.mode": "magnitude", "adp.density": 0.3},
    r"adp.threshold=0.1 with adp.mode=gate.*use adp.mode=magnitude": {"adp.threshold": 0.1},
    r"adp.num-groups=2 with adp.share=batch.*use adp.share=group": {"adp.num-groups": 2, "adp.share": "batch"},
    r"adp.upload-density=0.25 with adp.share=client": {"adp.upload-density": 0.25, "adp.share": "client"},
    r"adp.upload-density=0.25 with adp.upload=all": {"adp.upload-density": 0.25, "adp.upload": "all"},
    r"adp.upload-density=0.25 with adp.density=1.*use adp.density below 1": {
        "adp.upload-density": 0.25,
        "adp.density": 1.0,
    },
    r"adp.upload=changed with adp.density=1.*use adp.density below 1": {"adp.upload": "changed", "adp.density": 1.0},
    r"adp.upload=changed with adp.upload-density=1": {"adp.upload": "changed", "adp.upload-density": 1.0},
    r"adp.upload=changed with adp.share=client": {"adp.upload": "changed", "adp.share": "client"},
    r"adp.mu=0.1 with adp.base=fednova.*use adp.base=fedprox": {"adp.mu": 0.1, "adp.base": "fednova"},
}


@pytest.mark.parametrize("message", IDLE)
def test_settings_that_would_do_nothing_are_refused_with_what_they_need(message, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path / "run", **{**ADP, **IDLE[message]})


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        ({}, []),
        ({"adp.density": 1.0, "adp.warmup-rounds": 5}, []),
        ({"adp.warmup-rounds": 2, "adp.ramp-rounds": 0}, []),
        ({"adp.warmup-rounds": 3, "adp.ramp-rounds": 0}, ["nothing is ever pruned .* num-rounds to 4 or more"]),
        ({"adp.ramp-rounds": 4}, ["ends at density 0.75 instead of adp.density=0.5: num-rounds=3 .* to 5 or more"]),
        (
            {"adp.mode": "magnitude", "model.gates": False},
            ["adp.warmup-rounds=1, adp.ramp-rounds=1: has no effect with adp.mode=magnitude"],
        ),
    ],
)
def test_a_schedule_that_does_not_get_to_its_density_is_warned_of_once(keys, messages, tmp_path: Path):
    rows = tiny_run(tmp_path / "run", **{**ADP, **keys})
    found = [row["message"] for row in select(rows, "warning")]
    assert len(found) == len(messages)
    for mine, pattern in zip(found, messages, strict=True):
        assert re.search(pattern, mine), mine


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_contradict_each_other_are_refused_with_the_remedy(message, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path / "run", **{**ADP, **REFUSED[message]})


@pytest.mark.parametrize(
    ("key", "value"),
    [("density", 0.0), ("density", 1.5), ("upload_density", 2.0), ("num_groups", 3), ("warmup_rounds", -1),
     ("sparsity", -0.1), ("share", "clinet"), ("mode", "gates"), ("base", "fedadam"), ("plan", "some"),
     ("gates", "own"), ("upload", "none"), ("mu", -1.0), ("threshold", -1.0)],
)  # fmt: skip
def test_values_outside_their_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=key.replace("_", "-")):
        ADPConfig(**{key: value})


def test_personal_gates_go_with_compressed_uploads_of_parts_that_change(tmp_path):
    keys = {"adp.gates": "personal", "compression.kind": "dgc", "evaluation.where": "federated", "num-clients": 2}
    rows = tiny_run(tmp_path / "run", **{**ADP, **keys, "num-rounds": 4, "adp.upload-density": 0.2})
    assert [(row["status"], row["reason"]) for row in select(rows, "arrival")] == [("merged", "")] * 8
