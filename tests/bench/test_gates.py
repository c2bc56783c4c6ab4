"""What the benchmark of gates compares."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
import torch

from bench import gates


def test_training_and_inference_are_both_compared_at_every_batch(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(sys, "argv", ["bench", "--nets", "resnet32", "--out", str(tmp_path / "made.json")])
    monkeypatch.setattr(gates.torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(gates, "compare", lambda name, net, what, batch, *rest: seen.append((what, batch)) or [])
    gates.main()
    assert seen == [("training", 1), ("training", 64), ("inference", 1), ("inference", 64)]


@pytest.mark.parametrize("net", gates.QUICK)
def test_a_batch_of_one_is_trained_with_winners_of_its_own_and_its_plan_is_judged_like_any_other(net):
    arguments = argparse.Namespace(seed=0, density=0.5, turns=1, seconds=0.0)
    rows = gates.compare(net, gates.QUICK[net], "training", 1, gates.SIZE, arguments)
    labels = ["dense, plain", "dense", "masked", "compact, sample", "planned, sample"]
    assert [row["variant"] for row in rows] == labels
    assert {row["batch"] for row in rows} == {1}
    (floor,) = gates.judge(rows)
    assert floor["by"] == f"{net}, training, batch 1, planned, sample"


def test_vectors_that_the_machine_has_not_are_refused_and_wider_ones_are_left_unused():
    code = (
        "import torch; from bench.gates import limit_vectors; "
        "print(limit_vectors('avx2'), torch.backends.cpu.get_cpu_capability())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if "AVX" in torch.backends.cpu.get_cpu_capability():
        assert done.stdout.split() == ["AVX2", "AVX2"]
    else:
        assert done.returncode == 1
        assert "leave the option out" in done.stderr
