"""What a run that continues another one takes over: its settings, its state, its log and its clients' memories."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_app.checkpoint import CheckpointError, load_checkpoint
from server_app.config import Config
from strategies.setting import DeploymentConfig, Progress
from wire.check import Limits
from wire.flat import ConfigError, Scalar, to_flat

OWN_KEYS = ("run-dir", "resume")
"""Keys that a resumed run never takes over."""

MAY_DIFFER = (
    *OWN_KEYS,
    "num-rounds",
    "num-workers",
    "transport",
    "reply-timeout-s",
    "keep-checkpoints",
    "data.dir",
    "data.download",
    "evaluation.every",
    "evaluation.family-every",
    *to_flat(DeploymentConfig(), "deployment."),
    *to_flat(Limits(), "limits."),
)
"""Keys that a resumed run may change: nothing merged depends on them (but a cosine schedule on num-rounds)."""

CONFIG = "config.toml"
"""File of a run's folder: every key in force."""

LINEAGE = "lineage"
"""File of a run's folder: a name of its own and those of the runs it continues, under which devices keep memory."""


def home_of(source: Path) -> Path:
    """The run's folder: ``source`` itself, or where it is a checkpoint, the folder that this lies in."""
    return source.parent.parent if source.suffix == ".pt" and not source.is_dir() else source


def earlier_settings(source: Path) -> dict[str, Scalar]:
    """Every key of the run that ``source`` (its folder, or a checkpoint) is of, but where it lay.

    Empty where there is no configuration: the run may lie on the machine of the SuperLink.

    Raises
    ------
    CheckpointError
        If the configuration is there and cannot be read.
    """
    path = home_of(source) / CONFIG
    try:
        flat = _flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"resume: {path} cannot be read as a run's configuration: {error}") from error
    if not Path(str(flat.get("data.dir", "/"))).is_absolute():
        del flat["data.dir"]  # nobody knows any more relative to what
    return {key: value for key, value in flat.items() if key not in OWN_KEYS}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_settings(before: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> None:
    """Refuse to continue a run with settings that what it has merged does not fit.

    Parameters
    ----------
    before, now : every key in force, of the run that is continued and of the one that continues it.

    Raises
    ------
    ConfigError
        With every key that differs and must not.
    """
    may_differ = set(MAY_DIFFER) - ({"num-rounds"} if now["train.schedule"] == "cosine" else set())
    keys = before.keys() | now.keys()
    if before.get("strategy") != now["strategy"]:
        keys = {"strategy"}  # all settings of the two methods would be named as well
    changed = [key for key in sorted(keys) if now.get(key) != before.get(key) and key not in may_differ]
    if not changed:
        return
    what = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed)
    why = "; num-rounds because the learning rate falls to zero over them" if "num-rounds" in changed else ""
    raise ConfigError(
        f"config: resume: the run that is continued was configured differently: {what}. These cannot change in the "
        f"middle of a run{why}: leave them out of ./run.sh, which takes them from that run, or begin a new one"
    )


@dataclass(frozen=True)
class Continued:
    """What a run takes over.

    Attributes
    ----------
    progress : of the event loop.
    own : the method's state.
    num_rows : rows of the log that were taken over.
    row : the ``resume`` row: from where it goes on, and what of the earlier run is lost.
    """

    progress: Progress
    own: dict[str, Any]
    num_rows: int
    row: dict[str, Any]


def take_over(config: Config, folder: Path) -> Continued:
    """Continue an earlier run in ``folder``: its progress, the method's state, and the rows of its log up to there.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or no log beside it.
    ConfigError
        If the run was configured differently.
    """
    source = Path(config.run.resume)
    progress, own, before, num_rows = load_checkpoint(source)
    check_settings(before, config.flat())
    home = home_of(source)
    if not (home / "events.jsonl").is_file():
        raise CheckpointError(f"resume: {source} has no event log beside it; expected {home / 'events.jsonl'}")
    with (home / "events.jsonl").open("rb") as old, (folder / "events.jsonl").open("wb") as new:
        for _ in range(num_rows):
            new.write(old.readline())
        row = _resume_row(home, progress, old)
    if (home / LINEAGE).is_file():
        with (folder / LINEAGE).open("a", encoding="utf-8") as file:
            file.write((home / LINEAGE).read_text(encoding="utf-8"))
    for name in ("clients", "versions"):
        if (home / name).is_dir():
            shutil.copytree(home / name, folder / name, dirs_exist_ok=True)
    return Continued(progress, own, num_rows, row)


def _resume_row(home: Path, progress: Progress, left_out: Iterable[bytes]) -> dict[str, Any]:
    """What a run says when it goes on; ``left_out``: lines of the earlier log that came after the checkpoint."""
    last, is_complete = progress.server_round, False
    for line in left_out:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short when the run was killed
        last = max(last, row.get("server_round") or 0)
        is_complete = row["event"] == "end" and row["status"] == "completed"
    if not is_complete:  # a round's answers are logged when it closes: of the one that was open there is nothing
        last = max(last, progress.server_round + 1)
    return {
        "event": "resume",
        "source": str(home),
        "server_round": progress.server_round,
        "last_round_again": last,
        "num_held": len(progress.held),
        "time_s": progress.now_s,
        "message": _resume_message(home, progress, last),
    }


def _resume_message(home: Path, progress: Progress, last: int) -> str:
    done, held = progress.server_round, len(progress.held)
    kept = f"; {held} answers that had come and waited for a later round are kept" if held else ""
    if last == done:
        return f"continues {home} after round {done}, its last{kept}"
    again = f"round {last} is" if last == done + 1 else f"rounds {done + 1} to {last} are"
    return (
        f"continues {home} after round {done}: {again} done again, and answers that were under way are lost and asked "
        f"for again{kept}"
    )
