"""The micro-benchmarks' quick versions work and end in one JSON object that says where its figures come from."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from bench import common, handmade
from tests.marks import slow_but
from zoo import get_model


def run(name, monkeypatch, capsys, *options):
    """Run a benchmark in this process; returns the text before its last line, and the object in it."""
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    threads = torch.get_num_threads()
    try:
        returned = importlib.import_module(f"bench.{name}").main()
    finally:
        torch.set_num_threads(threads)
    text, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    assert json.loads(last) == json.loads(json.dumps(returned))
    return text, returned


@pytest.mark.parametrize(
    "name", slow_but(("decide",), ("merge", "step", "engine", "decide", "gates", "cos2p_speed", "cos2p_scale", "scale"))
)
def test_the_quick_version_prints_a_table_and_one_json_object_and_keeps_it_where_told(
    name, monkeypatch, capsys, tmp_path
):
    text, record = run(name, monkeypatch, capsys, "--quick", "--seed", "3", "--out", str(tmp_path / "result.json"))
    assert "---" in text
    assert record["quick"] is True
    assert record["seeds"] == [3]
    assert record["command"].startswith(f"python -m bench.{name}")
    assert record["versions"].keys() == {"python", "flwr", "numpy", "torch"}
    assert record["results"]["rows"]
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(record))


def test_a_quick_run_does_not_replace_the_figures_that_are_quoted(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    run("decide", monkeypatch, capsys, "--quick")
    assert list(tmp_path.iterdir()) == []


def test_results_name_a_class_of_machine_and_no_machine():
    environment = common.environment()
    assert environment["machine"].split()[1] == "cores,"
    assert environment["machine"].split()[0].isdigit()


def test_what_fails_in_a_process_of_its_own_is_reported():
    assert common.in_fresh_process(divmod, 7, 2) == (3, 1)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        common.in_fresh_process(divmod, 1, 0)


@pytest.mark.parametrize(("name", "build"), [("resnet18", handmade.resnet18), ("vgg16", handmade.narrow_vgg16)])
def test_the_nets_written_by_hand_compute_what_the_zoo_models_do(name, build):
    model, by_hand = get_model(name, width=0.125)[0].eval(), build(0.125).eval()
    ours, theirs = model.state_dict(), by_hand.state_dict()
    of_shape = {shape: [t for t in ours.values() if t.shape == shape] for shape in {t.shape for t in ours.values()}}
    assert sorted(t.numel() for t in ours.values()) == sorted(t.numel() for t in theirs.values())
    for key, tensor in theirs.items():
        assert of_shape[tensor.shape], key
    assert by_hand(torch.zeros(2, 3, 32, 32)).shape == model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
