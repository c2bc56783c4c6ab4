"""Several runs side by side: the first is the yardstick."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting.c3 import score_runs
from reporting.comparison import format_page, format_table
from reporting.curve import Point, accuracy_curve, last_within
from reporting.log import RunLog, read_events
from reporting.style import clean
from reporting.summary import reach, summarise
from reporting.write import write_json, write_text

COMPARISON_FILE = "comparison.html"
COMPARISON_JSON = "comparison.json"
SHARE_OF_FIRST = 0.95


class CompareError(ValueError):
    """The runs cannot be set side by side."""


def compare(
    run_folders: Sequence[str | Path],
    out: str | Path,
    targets: Sequence[float] = (),
    max_bytes: float | None = None,
    max_macs: float | None = None,
) -> tuple[Path, str]:
    """Compare runs and write ``comparison.html`` and ``comparison.json`` into folder ``out``, atomically.

    Returns the path of the page and a plain table for the terminal.

    Parameters
    ----------
    run_folders : two or more run folders; speed-ups are against the first.
    targets : accuracies (0 to 1) for time-to-accuracy, beside 95 % of the best accuracy of the first run.
    max_bytes, max_macs : budgets of the C3-Score (``reporting.c3``); None for the largest of the runs.

    Raises
    ------
    C3Error : a budget that is not positive.
    CompareError : fewer than two runs, a run without any accuracy, or a target outside (0, 1].
    LogError : a log cannot be read.
    """
    if len(run_folders) < 2:
        raise CompareError(f"compare: needs at least two run folders, got {len(run_folders)}")
    wrong = [target for target in targets if not 0 < target <= 1]
    if wrong:
        raise CompareError(f"compare: targets are accuracies within 0 to 1, got {wrong[0]:g}; for 95 % give 0.95")
    logs = [read_events(folder) for folder in run_folders]
    curves = [accuracy_curve(log) for log in logs]
    for folder, curve in zip(run_folders, curves, strict=True):
        if not curve:
            raise CompareError(
                f"compare: {folder} has no evaluation with an accuracy yet; "
                "leave it out or wait for its first evaluation"
            )
    numbers = compare_numbers(logs, curves, targets, [str(folder) for folder in run_folders])
    numbers |= score_runs(logs, numbers["runs"], max_bytes, max_macs)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / COMPARISON_JSON, numbers)
    html_path = write_text(out / COMPARISON_FILE, format_page(numbers, curves))
    return html_path, format_table(numbers)


def compare_numbers(
    logs: Sequence[RunLog], curves: Sequence[Sequence[Point]], targets: Sequence[float], folders: Sequence[str]
) -> dict[str, Any]:
    """Return what ``comparison.json`` holds.

    Equal rounds, time and bytes are the least of the runs' totals, so every run has an accuracy there: that of its last
    evaluation within the limit. Speed-ups are the first run's figure divided by the run's own; above 1 is better.
    """
    summaries = [summarise(log) for log in logs]
    limits = {
        name: min(getattr(curve[-1], name) for curve in curves) for name in ("server_round", "time_s", "total_bytes")
    }
    best_first = max(point.accuracy for point in curves[0])
    wanted = [(f"{SHARE_OF_FIRST * 100:g} % of the first run's best", SHARE_OF_FIRST * best_first)]
    wanted += [(f"{target * 100:g} %", target) for target in targets]
    runs = []
    for label, folder, summary, curve in zip(_labels(logs, folders), folders, summaries, curves, strict=True):
        at = {name: last_within(curve, name, limit) for name, limit in limits.items()}
        family = summary["family"]
        runs.append(
            {
                "label": label,
                "folder": folder,
                **{key: summary[key] for key in _KEPT},
                "accuracy_at_equal_rounds": at["server_round"].accuracy if at["server_round"] else None,
                "time_s_at_equal_rounds": at["server_round"].time_s if at["server_round"] else None,
                "accuracy_at_equal_time": at["time_s"].accuracy if at["time_s"] else None,
                "accuracy_at_equal_bytes": at["total_bytes"].accuracy if at["total_bytes"] else None,
                "family_best_accuracy": family["best_accuracy"] if family else None,
                "family_best_retention_ratio": family["best_retention_ratio"] if family else None,
                "targets": [reach(curve, name, target) for name, target in wanted],
            }
        )
    first = runs[0]
    for run in runs:
        run["speedup_at_equal_rounds"] = _factor(first["time_s_at_equal_rounds"], run["time_s_at_equal_rounds"])
        for mine, theirs in zip(run["targets"], first["targets"], strict=True):
            mine["speedup"] = _factor(theirs["time_s"], mine["time_s"])
            mine["bytes_factor"] = _factor(theirs["total_bytes"], mine["total_bytes"])
    return {
        "first": first["label"],
        "equal_rounds": limits["server_round"],
        "equal_time_s": limits["time_s"],
        "equal_bytes": limits["total_bytes"],
        "differences": _differences(logs, summaries),
        "runs": runs,
    }


_KEPT = (
    "strategy",
    "model",
    "data",
    "seed",
    "num_clients",
    "num_rounds",
    "status",
    "evaluation",
    "final_accuracy",
    "best_accuracy",
    "total_time_s",
    "download_bytes",
    "upload_bytes",
    "train_macs",
    "straggler_wait_ratio",
    "utilisation_ratio",
    "n_star_min",
)


def _factor(first: float | None, own: float | None) -> float | None:
    return first / own if first is not None and own else None


def _labels(logs: Sequence[RunLog], folders: Sequence[str]) -> list[str]:
    """Return the shortest names that tell the runs apart: strategy, then with seed, then with folder, then numbered."""
    choices = [
        [clean(log.run.strategy, 32) for log in logs],
        [clean(f"{log.run.strategy}, seed {log.run.seed}", 40) for log in logs],
        [clean(f"{log.run.strategy} ({Path(folder).name})", 60) for log, folder in zip(logs, folders, strict=True)],
    ]
    for labels in choices:
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index}: {label}" for index, label in enumerate(choices[-1], 1)]


# what says nothing about the outcome, and what is told apart by the rows above
_EXPECTED_TO_DIFFER = {
    "strategy",
    "run-dir",
    "resume",
    "num-workers",
    "keep-checkpoints",
    "reply-timeout-s",
    "seed",
    "num-clients",
    "model.name",
    "data.name",
    "evaluation.where",
}


def _differences(logs: Sequence[RunLog], summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Return in words what makes the runs unlike beyond their strategy."""
    found = []
    for key in ("data", "model", "num_clients", "seed", "evaluation"):
        values = [summary[key] for summary in summaries]
        if len({repr(value) for value in values}) > 1:
            found.append(f"the runs differ in {key}: " + ", ".join(clean(value) for value in values))
    shared = set(logs[0].run.config).intersection(*(log.run.config for log in logs[1:])) - _EXPECTED_TO_DIFFER
    for key in sorted(shared):
        settings = [log.run.config[key] for log in logs]
        if len({repr(value) for value in settings}) > 1:
            found.append(f"the runs differ in {key}: " + ", ".join(clean(value) for value in settings))
    for log, summary in zip(logs, summaries, strict=True):
        if summary["status"] != "completed":
            found.append(f"{log.path.parent.name} is {summary['status']}: its totals are those so far")
    return found
