"""Runs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reporting.__main__ import main
from reporting.compare import CompareError, compare

MakeRun = Callable[..., Path]


def tiny(
    strategy: str, accuracies: list[float], round_s: float, round_bytes: int, seed: int = 1
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"event": "run", "strategy": strategy, "model": "mlp", "data": "digits", "seed": seed}
    ]
    for number, accuracy in enumerate(accuracies, 1):
        common = {"server_round": number, "global_version": number}
        rows += [
            {"event": "arrival", **common, "partition_id": 0, "status": "merged", "start_s": (number - 1) * round_s,
             "finish_s": number * round_s, "update_time_s": round_s, "upload_bytes": round_bytes, "train_macs": 10},
            {"event": "merge", **common, "time_s": number * round_s, "num_merged": 1},
            {"event": "evaluation", **common, "time_s": number * round_s, "accuracy": accuracy},
        ]  # fmt: skip
    return [
        *rows,
        {"event": "end", "status": "completed", "num_rounds": len(accuracies), "time_s": len(accuracies) * round_s},
    ]


def test_equal_rounds_time_bytes_and_speedups_are_those_worked_out_by_hand(make_run: MakeRun, tmp_path: Path) -> None:
    slow = make_run("a", rows=tiny("fedavg", [0.5, 0.7, 0.8, 0.9], round_s=10.0, round_bytes=100))
    fast = make_run("b", rows=tiny("adaptcl", [0.4, 0.6, 0.7, 0.8, 0.88, 0.89], round_s=2.0, round_bytes=50))
    compare([slow, fast], tmp_path / "out", targets=[0.7])
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (numbers["equal_rounds"], numbers["equal_time_s"], numbers["equal_bytes"]) == (4, 12.0, 300)
    first, second = numbers["runs"]
    assert (first["accuracy_at_equal_rounds"], second["accuracy_at_equal_rounds"]) == (0.9, 0.8)
    assert second["speedup_at_equal_rounds"] == 40.0 / 8.0
    assert (first["accuracy_at_equal_time"], second["accuracy_at_equal_time"]) == (0.5, 0.89)
    assert (first["accuracy_at_equal_bytes"], second["accuracy_at_equal_bytes"]) == (0.8, 0.89)
    # 95 % of 0.9 is 0.855: reached after 40 s and after 10 s
    assert [run["targets"][0]["time_s"] for run in numbers["runs"]] == [40.0, 10.0]
    assert second["targets"][0]["speedup"] == 4.0
    assert second["targets"][1]["speedup"] == 20.0 / 6.0


def test_one_page_json_and_table_are_written_and_name_every_run(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run(name, strategy=name, num_rounds=12) for name in ("fedavg", "adaptcl", "heterofl")]
    html_path, text = compare(folders, tmp_path / "new" / "out")
    page = html_path.read_text(encoding="utf-8")
    assert json.loads((html_path.parent / "comparison.json").read_text())["first"] == "fedavg"
    for name in ("fedavg", "adaptcl", "heterofl"):
        assert name in page
        assert name in text
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_target_never_reached_has_no_speedup(make_run: MakeRun, tmp_path: Path) -> None:
    good = make_run("a", rows=tiny("fedavg", [0.5, 0.9], 1.0, 1))
    bad = make_run("b", rows=tiny("fedavg", [0.1, 0.2], 1.0, 1, seed=2))
    _, text = compare([good, bad], tmp_path)
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    assert numbers["runs"][1]["targets"][0]["speedup"] is None
    assert "never" in text
    assert [run["label"] for run in numbers["runs"]] == ["fedavg, seed 1", "fedavg, seed 2"]
    assert any("seed" in text for text in numbers["differences"])


def test_runs_that_cannot_be_compared_are_refused_with_the_reason(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", rows=tiny("fedavg", [0.5], 1.0, 1))
    empty = make_run("b", rows=[{"event": "run", "strategy": "x"}])
    with pytest.raises(CompareError, match="at least two"):
        compare([run], tmp_path)
    with pytest.raises(CompareError, match="no evaluation"):
        compare([run, empty], tmp_path)
    with pytest.raises(CompareError, match=r"0\.95"):
        compare([run, run], tmp_path, targets=[95])


@pytest.mark.slow
def test_the_command_line_writes_reports_and_comparisons(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("a", rows=tiny("fedavg", [0.5, 0.9], 1.0, 1))
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main(["compare", str(run), str(run), "--out", str(tmp_path / "out"), "--target", "0.8"]) == 0
    assert "1: fedavg (a)" in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.json").exists()


def test_the_command_line_fails_with_one_line_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: event log: cannot read")
    assert error.count("\n") == 1


def test_settings_that_differ_beside_the_strategy_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run(f"run{sigma}", sigma=sigma, num_rounds=2, num_clients=3) for sigma in (2.0, 5.0)]
    compare(folders, tmp_path)
    differences = json.loads((tmp_path / "comparison.json").read_text())["differences"]
    assert differences == ["the runs differ in fleet.name: linear:2, linear:5"]
