"""Checkpoints: the whole state of a run after a merge, in one file, written atomically, read without unpickling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fleet.clock import Duration
from strategies.exchange import Arrival, Entry
from strategies.setting import Progress
from strategies.shelf import ShelvedState
from wire.files import save
from wire.message import Failure, Report
from wire.spec import spec_from_json, spec_to_json

FORMAT = 3
SCALARS = ("server_round", "global_version", "now_s", "next_dispatch", "num_merged")


class CheckpointError(ValueError):
    """A checkpoint is missing, unreadable, or belongs to another kind of run."""


def save_checkpoint(
    folder: Path, progress: Progress, own: dict[str, Any], config: Mapping[str, Any], num_rows: int, keep: int
) -> Path:
    """Write ``folder/round-N.pt`` and drop all but the newest ``keep``.

    Parameters
    ----------
    progress : of the event loop.
    own : the method's state; JSON values under ``json``-able keys, tensors in dicts.
    config : flat run config, so that a resumed run can be checked against it.
    num_rows : rows of the event log so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = [_arrival_to_plain(arrival) for arrival in progress.held]
    stem = f"round-{progress.server_round:06d}"
    for arrival, plain in zip(progress.held, held, strict=True):
        if isinstance(arrival.answer, Report) and isinstance(arrival.answer.state, ShelvedState):
            plain["file"] = f"{stem}-held-{arrival.entry.dispatch}.tensors"
            arrival.answer.state.keep_as(folder / plain["file"])
    scalars = {name: getattr(progress, name) for name in SCALARS}
    content = {
        "format": FORMAT,
        "state": progress.state,
        "mean_square": progress.mean_square,
        "holders": progress.holders,
        "held_tensors": [
            {name: _tensors(arrival.answer, name) for name in ("state", "companions")} for arrival in progress.held
        ],
        "json": json.dumps(
            {
                **scalars,
                "last_dispatch": {str(pid): dispatch for pid, dispatch in progress.last_dispatch.items()},
                "clocks": {str(pid): clock for pid, clock in progress.clocks.items()},
                "held": held,
                "config": dict(config),
                "num_rows": num_rows,
            }
        ),
        "own": own,
    }
    target = save(content, folder / f"{stem}.pt", is_synced=True)
    for old in sorted(folder.glob("round-*.pt"))[:-keep]:
        old.unlink(missing_ok=True)
        for large in folder.glob(f"{old.stem}-held-*.tensors"):
            large.unlink(missing_ok=True)
    return target


def load_checkpoint(path: Path) -> tuple[Progress, dict[str, Any], dict[str, Any], int]:
    """Read a checkpoint file, or the newest of a run folder: (progress, the method's state, flat config, rows logged).

    Raises
    ------
    CheckpointError
        If there is none or it cannot be read.
    """
    path = find_checkpoint(path)
    try:
        content = torch.load(path, weights_only=True)
        plain, found_format = json.loads(content["json"]), content["format"]
    except Exception as error:
        raise CheckpointError(
            f"resume: {path} is not a readable checkpoint: {type(error).__name__}: {error}"
        ) from error
    if found_format != FORMAT:
        raise CheckpointError(f"resume: {path} has format {found_format}, this version reads {FORMAT}")
    progress = Progress(
        state=content["state"],
        **{name: plain[name] for name in SCALARS},
        last_dispatch={int(pid): dispatch for pid, dispatch in plain["last_dispatch"].items()},
        clocks={int(pid): clock for pid, clock in plain["clocks"].items()},
        mean_square=content["mean_square"],
        holders=content["holders"],
        held=[
            _arrival_from_plain(raw, tensors, path.parent)
            for raw, tensors in zip(plain["held"], content["held_tensors"], strict=True)
        ],
    )
    return progress, content["own"], plain["config"], plain["num_rows"]


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file: ``path`` itself, or the newest of a run folder.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    if path.is_dir():
        found = sorted((path / "checkpoints").glob("round-*.pt"))
        if not found:
            raise CheckpointError(f"resume: {path} holds no checkpoint; expected checkpoints/round-*.pt")
        path = found[-1]
    if not path.exists():
        raise CheckpointError(f"resume: there is no checkpoint {path}; give the folder of a run, or a checkpoint")
    return path


def _arrival_to_plain(arrival: Arrival) -> dict[str, Any]:
    entry = {f.name: getattr(arrival.entry, f.name) for f in fields(Entry) if f.name != "spec"}
    answer = {f.name: getattr(arrival.answer, f.name) for f in fields(arrival.answer) if f.name not in _NOT_PLAIN}
    is_report = isinstance(arrival.answer, Report)
    return {
        "entry": entry,
        "spec": spec_to_json(arrival.entry.spec),
        "answer": answer | ({"metrics": dict(arrival.answer.metrics)} if isinstance(arrival.answer, Report) else {}),
        "is_report": is_report,
        "narrowed": spec_to_json(arrival.answer.narrowed) if isinstance(arrival.answer, Report) else "",
        "duration": asdict(arrival.duration),
        "finish_s": arrival.finish_s,
    }


_NOT_PLAIN = {"state", "companions", "narrowed", "metrics"}


def _tensors(answer: Report | Failure, name: str) -> dict[str, torch.Tensor]:
    held = getattr(answer, name, {})
    return {} if isinstance(held, ShelvedState) else dict(held)


def _arrival_from_plain(raw: dict[str, Any], tensors: dict[str, Any], folder: Path) -> Arrival:
    spec = spec_from_json(raw["spec"])
    assert spec is not None
    asked = {"wants_delta": raw["answer"].get("is_delta", False)}  # checkpoints from before entries knew it
    entry = Entry(**asked | raw["entry"], spec=spec)
    if "file" in raw:
        if not (folder / raw["file"]).is_file():
            raise CheckpointError(f"resume: {folder / raw['file']} is missing, which the checkpoint needs")
        tensors = {**tensors, "state": ShelvedState(folder / raw["file"])}
    answer: Report | Failure = Failure(**raw["answer"]) if not raw["is_report"] else _report(raw, tensors)
    return Arrival(entry, answer, Duration(**raw["duration"]), raw["finish_s"])


def _report(raw: dict[str, Any], tensors: dict[str, Any]) -> Report:
    answer = dict(raw["answer"])
    answer["label_counts"] = tuple(answer["label_counts"])
    return Report(**answer | tensors, narrowed=spec_from_json(raw["narrowed"]))
