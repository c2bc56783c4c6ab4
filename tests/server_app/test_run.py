"""One run: what it leaves behind when it completes, fails, is interrupted or resumed."""

from __future__ import annotations

import json
import logging
import math
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from client_app.handler import handle
from reporting.log import read_events
from reporting.report import write_report
from server_app.checkpoint import CheckpointError, load_checkpoint
from server_app.run import RunFolderError
from strategies.base import RunStoppedError
from tests.marks import slow_but
from tests.runs import equal_states, final_state, read_rows, select, tiny_run, without_timings
from wire.flat import ConfigError
from wire.message import Instruction, Report


def test_a_run_leaves_its_config_its_log_and_its_checkpoints(tmp_path):
    rows = tiny_run(tmp_path / "run", strategy="fedavg", num_rounds=2, loop__quorum=3)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.toml",
        "events.jsonl",
        "lineage",
    ]
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (config["strategy"], config["loop"]["quorum"]) == ("fedavg", 3)
    run, clients = rows[:2]
    assert (run["num_clients"], run["data"], run["model"], run["seed"]) == (4, "digits", "mlp", 0)
    assert run["num_parameters"] == sum(t.numel() for t in final_state(tmp_path / "run").values())
    assert run["versions"].keys() == {"flwr", "torch", "numpy", "python"}
    assert [client["partition_id"] for client in clients["clients"]] == [0, 1, 2, 3]
    assert all(sum(c["label_counts"]) == c["num_examples"] == 100 for c in clients["clients"])
    assert read_rows(tmp_path / "run")[-1]["status"] == "completed"


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_written_stops_the_run_before_it_begins(below, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunFolderError, match=r"run-dir: cannot write to .*; choose another run-dir"):
        tiny_run(tmp_path / below)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_that_holds_a_run_is_not_touched(tmp_path):
    folder = tmp_path / "run"
    tiny_run(folder, strategy="fedavg", num_rounds=1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="already holds a run; choose another, or use resume="):
        tiny_run(folder, strategy="heterofl")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_l1_penalty_that_would_punish_nothing_is_refused_with_the_one_that_would(tmp_path):
    with pytest.raises(
        ConfigError, match=r"train\.sparsity=0\.001: .*'mlp' has one; set .*=group-lasso, or .* model\.scales=true"
    ):
        tiny_run(tmp_path / "a", train__sparsity=1e-3)
    assert select(tiny_run(tmp_path / "scales", train__sparsity=1e-3, model__scales=True, num_rounds=1), "end")
    assert select(
        tiny_run(tmp_path / "b", train__sparsity=1e-3, train__sparsity_norm="group-lasso", num_rounds=1), "end"
    )
    assert select(tiny_run(tmp_path / "c", train__sparsity=1e-3, model__name="cnn", num_rounds=1), "end")


def test_images_that_are_not_square_are_refused_with_the_size_that_makes_them_so(tmp_path):
    rng = np.random.default_rng(0)
    parts = {"x_train": (200, 8, 12), "y_train": 200, "x_test": (40, 8, 12), "y_test": 40}
    arrays = {name: rng.integers(0, 10, size).astype(np.uint8) for name, size in parts.items()}
    np.savez(tmp_path / "wide.npz", **arrays)
    name = f"npz:{tmp_path / 'wide.npz'}"
    with pytest.raises(ConfigError, match=r"images are 8 x 12 pixels, .*; append a size, such as data\.name=npz:.*@8"):
        tiny_run(tmp_path / "a", data__name=name, data__max_train=0)
    assert select(tiny_run(tmp_path / "b", data__name=f"{name}@8", data__max_train=0, num_rounds=1), "end")


def grouped(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """A model one of whose layers cannot be narrowed."""
    first, second = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(8 * image_size**2, num_classes))


def test_the_log_names_what_of_a_model_is_kept_whole_and_why(tmp_path):
    pytest.importorskip("torch_pruning")
    settings = {"strategy": "fedavg", "model.name": "tests.server_app.test_run:grouped", "num-rounds": 1}
    rows = tiny_run(tmp_path / "run", **settings)
    messages = [row["message"] for row in select(rows, "warning")]
    assert any(message.startswith("group 0 is kept whole: '2' is a grouped convolution") for message in messages)
    assert not logging.getLogger("pruning").handlers


class Interruptor:
    """Presses Ctrl-C in the middle of a round."""

    def __init__(self, server_round: int, error: BaseException) -> None:
        self.server_round, self.error = server_round, error

    def __call__(self, instruction: Instruction) -> Report:
        if instruction.server_round == self.server_round:
            raise self.error
        return handle(instruction)


@pytest.mark.parametrize("mode", slow_but(("semi-async",), ("sync", "semi-async")))
def test_an_interrupted_run_says_so_and_goes_on_where_it_stopped(mode, tmp_path):
    settings = {"loop.quorum": 3, "loop.max-staleness": 3} if mode == "semi-async" else {}
    whole = tiny_run(tmp_path / "whole", strategy="adaptcl", num_rounds=6, **settings)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "first", Interruptor(5, KeyboardInterrupt()), strategy="adaptcl", num_rounds=6, **settings)
    end = read_rows(tmp_path / "first")[-1]
    assert (end["status"], end["reason"]) == ("interrupted", "interrupted by the user")
    stopped = load_checkpoint(tmp_path / "first")[0].server_round
    assert stopped == end["num_rounds"] == 4
    resumed = tiny_run(
        tmp_path / "second", strategy="adaptcl", num_rounds=6, resume=str(tmp_path / "first"), **settings
    )
    assert without_timings(resumed) == without_timings(whole)
    assert equal_states(final_state(tmp_path / "second"), final_state(tmp_path / "whole"))
    assert len(select(resumed, "end")) == 1


def test_a_run_can_go_on_from_any_checkpoint_that_was_kept(tmp_path):
    tiny_run(tmp_path / "first", strategy="heterofl", num_rounds=4)
    path = tmp_path / "first" / "checkpoints" / "round-000002.pt"
    resumed = tiny_run(tmp_path / "second", strategy="heterofl", num_rounds=4, resume=str(path))
    assert without_timings(resumed) == without_timings(read_rows(tmp_path / "first"))


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "scaffold"},
        {"strategy": "scaffold", "loop.quorum": 2, "loop.max-staleness": 3},
        {"strategy": "fedavg", "compression.kind": "dgc"},
    ],
)
def test_clients_go_back_with_the_run_to_any_checkpoint_that_was_kept(settings, tmp_path):
    """They remember variates, or what compression held back, also of answers that the checkpoint holds unmerged."""
    whole = tiny_run(tmp_path / "whole", num_rounds=5, **settings)
    path = tmp_path / "whole" / "checkpoints" / "round-000002.pt"
    resumed = tiny_run(tmp_path / "second", num_rounds=5, resume=str(path), **settings)
    assert without_timings(resumed) == without_timings(whole)
    assert equal_states(final_state(tmp_path / "second"), final_state(tmp_path / "whole"))


def test_clients_drop_what_belongs_to_no_checkpoint_that_is_kept(tmp_path):
    tiny_run(tmp_path / "run", strategy="scaffold", num_rounds=6, keep_checkpoints=2)
    left = [path.stem for path in (tmp_path / "run" / "clients").glob("000001-*.pt")]
    assert len(left) <= 3


@pytest.mark.slow
def test_compressed_clients_go_on_with_their_memories(tmp_path):
    settings = {"strategy": "fedavg", "compression.kind": "dgc", "evaluation.family-every": 3}
    tiny_run(tmp_path / "whole", num_rounds=6, **settings)
    tiny_run(tmp_path / "first", num_rounds=3, **settings)
    tiny_run(tmp_path / "second", num_rounds=6, resume=str(tmp_path / "first"), **settings)
    assert equal_states(final_state(tmp_path / "second"), final_state(tmp_path / "whole"))


def test_a_run_that_fails_says_why_and_keeps_its_checkpoints(tmp_path, monkeypatch):
    real, calls = os.replace, []

    def full_disk(source: str, target: Path) -> None:
        calls.append(target)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_run(tmp_path / "run", strategy="fedavg")
    end = read_rows(tmp_path / "run")[-1]
    assert end["status"] == "failed"
    assert "No space left on device" in end["reason"]
    assert load_checkpoint(tmp_path / "run")[0].server_round == 2


def test_rounds_in_a_row_without_a_usable_answer_stop_the_run(tmp_path):
    def broken(instruction: Instruction) -> Report:
        if instruction.server_round > 1:
            raise RuntimeError("no battery")
        return handle(instruction)

    with pytest.raises(RunStoppedError, match="no usable answer in 2 rounds in a row"):
        tiny_run(tmp_path / "run", broken, strategy="fedavg", num_rounds=9, loop__max_empty_rounds=2)
    rows = read_rows(tmp_path / "run")
    assert {row["status"] for row in select(rows, "arrival", server_round=2)} == {"failed"}
    assert [row["message"] for row in select(rows, "warning")] == ["no usable answer in this round"] * 2
    assert rows[-1]["status"] == "failed"
    first = torch.load(tmp_path / "run" / "checkpoints" / "round-000001.pt", weights_only=True)["state"]
    assert equal_states(final_state(tmp_path / "run"), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"train.learning-rate": 0.2}, r"train\.learning-rate: 0\.05 then, 0\.2 now"),
        ({"strategy": "heterofl"}, r"differently: strategy: 'fedavg' then, 'heterofl' now\. .* leave them out"),
        ({"num-clients": 3}, "num-clients: 4 then, 3 now"),
    ],
)
def test_a_resumed_run_must_be_configured_as_before(change, message, tmp_path):
    tiny_run(tmp_path / "first", strategy="fedavg", num_rounds=1)
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path / "second", **{"strategy": "fedavg", "resume": str(tmp_path / "first"), **change})


def test_a_cosine_schedule_fixes_the_number_of_rounds(tmp_path):
    settings = {"strategy": "fedavg", "train.schedule": "cosine"}
    tiny_run(tmp_path / "first", num_rounds=1, **settings)
    with pytest.raises(ConfigError, match="num-rounds: 1 then, 2 now"):
        tiny_run(tmp_path / "second", num_rounds=2, resume=str(tmp_path / "first"), **settings)


def test_a_resumed_run_without_a_round_of_its_own_ends_where_the_earlier_one_did(tmp_path):
    settings = {"strategy": "fedavg", "num_rounds": 2}
    tiny_run(tmp_path / "first", **settings)
    tiny_run(tmp_path / "second", resume=str(tmp_path / "first"), **settings)
    stop = Interruptor(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "third", stop, resume=str(tmp_path / "first"), strategy="fedavg", num_rounds=3)
    ends = [read_rows(tmp_path / name)[-1] for name in ("first", "second", "third")]
    assert [end["num_rounds"] for end in ends] == [2, 2, 2]
    assert ends[1]["time_s"] == ends[0]["time_s"] > 0
    assert ends[2]["time_s"] >= ends[0]["time_s"]


@pytest.mark.parametrize(
    ("settings", "held"), [({}, ""), ({"loop.quorum": 3, "loop.max-staleness": 3}, "; 1 answers that had come")]
)
def test_a_resumed_run_says_from_where_it_goes_on_and_what_is_done_again(settings, held, tmp_path, capsys):
    """In its log, on the terminal and in the report."""
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "first", Interruptor(3, KeyboardInterrupt()), strategy="fedavg", **settings)
    capsys.readouterr()
    rows = tiny_run(tmp_path / "second", strategy="fedavg", resume=str(tmp_path / "first"), **settings)
    (row,) = select(rows, "resume")
    assert (row["server_round"], row["last_round_again"]) == (2, 3)
    assert row["source"] == str(tmp_path / "first")
    said = (
        f"continues {tmp_path / 'first'} after round 2: round 3 is done again, and answers that were under way are lost"
    )
    assert row["message"].startswith(said)
    assert held in row["message"]
    assert said in capsys.readouterr().err
    later = next(i for i, other in enumerate(rows) if other.get("server_round") == 3)
    assert rows.index(row) < later
    log = read_events(tmp_path / "second")
    assert log.num_resumes == 1
    assert said in write_report(tmp_path / "second").read_text()


def test_a_run_that_goes_back_or_further_says_which_rounds_are_done_again(tmp_path):
    tiny_run(tmp_path / "first", strategy="fedavg")
    path = tmp_path / "first" / "checkpoints" / "round-000001.pt"
    for name, source, again in (("back", path, "rounds 2 to 4 are done again"), ("on", tmp_path / "first", "its last")):
        rows = tiny_run(tmp_path / name, strategy="fedavg", num_rounds=5, resume=str(source))
        assert again in select(rows, "resume")[0]["message"]
    again = tiny_run(tmp_path / "third", strategy="fedavg", num_rounds=6, resume=str(tmp_path / "back"))
    assert [row["server_round"] for row in select(again, "resume")] == [1, 5]


def test_resuming_needs_a_checkpoint_and_its_log(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        tiny_run(tmp_path / "a", resume=str(tmp_path / "nowhere"))
    tiny_run(tmp_path / "first", strategy="fedavg", num_rounds=1)
    (tmp_path / "first" / "events.jsonl").unlink()
    with pytest.raises(CheckpointError, match="has no event log beside it"):
        tiny_run(tmp_path / "b", strategy="fedavg", resume=str(tmp_path / "first"))


def test_federated_evaluation_is_weighted_by_examples_and_shows_every_client(tmp_path):
    rows = tiny_run(
        tmp_path / "run", strategy="heterofl", num_rounds=2, evaluation__where="both", data__partition="quantity:1.5"
    )
    for row in select(rows, "evaluation", where="federated"):
        assert list(row["clients"]) == ["0", "1", "2", "3"]
        sizes = [c["num_examples"] for c in rows[1]["clients"]]
        assert len(set(sizes)) > 1
        assert 0.15 * sum(sizes) < row["num_examples"] < 0.25 * sum(sizes)
        assert min(row["clients"].values()) <= row["accuracy"] <= max(row["clients"].values())
    assert len(select(rows, "evaluation", where="central")) == len(select(rows, "evaluation", where="federated")) == 3


def test_evaluating_more_often_does_not_change_what_is_trained(tmp_path):
    tiny_run(tmp_path / "often", strategy="adaptcl", evaluation__where="both", evaluation__family_every=1)
    tiny_run(tmp_path / "seldom", strategy="adaptcl", evaluation__every=4)
    assert equal_states(final_state(tmp_path / "often"), final_state(tmp_path / "seldom"))
    rounds = [row["server_round"] for row in select(read_rows(tmp_path / "seldom"), "evaluation")]
    assert rounds == [0, 4]


def test_a_model_that_diverges_leaves_a_log_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("strategies.answers.MAX_ENTRY", math.inf)  # such answers are turned away

    def explode(instruction: Instruction) -> Report:
        report = handle(instruction)
        for tensor in report.state.values():
            if tensor.is_floating_point():
                tensor.mul_(1e25)
        return report

    rows = tiny_run(tmp_path / "run", explode, strategy="fedavg", num_rounds=1)
    assert select(rows, "evaluation")[-1]["loss"] is None
    for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
