"""Plain `flwr run`, as the README tells it: on the project itself, not on a copy of the app."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

from server_app.engine import _find_free_port
from server_app.processes import adopt_orphans, end_descendants, list_descendants
from tests.runs import read_rows, select

REPOSITORY = Path(__file__).resolve().parents[2]
FAB_LIMIT_BYTES = 8_000_000
"""Flower refuses an app above 10 MiB; records of benchmarks, which it packs too, are what grows."""


def test_what_flower_packs_of_the_project_stays_well_below_its_limit() -> None:
    ignored = {line.strip("/") for line in (REPOSITORY / ".gitignore").read_text().splitlines() if line[-1:] == "/"}
    files: dict[str, bytes | Path] = {}
    for folder, names, file_names in os.walk(REPOSITORY):
        is_top = Path(folder) == REPOSITORY
        # what Flower leaves out by the rules below as well, after having looked at each of its files
        names[:] = [name for name in names if name != ".git" and not (name in ignored and (is_top or name[0] in "._"))]
        paths = [Path(folder) / name for name in file_names]
        files |= {path.relative_to(REPOSITORY).as_posix(): path for path in paths if not path.is_symlink()}
    packed, _ = build_fab_from_files(files)
    assert 100_000 < len(packed) < FAB_LIMIT_BYTES


@pytest.mark.slow
def test_the_readmes_recipe_for_flwr_run_trains_from_another_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    flwr = shutil.which("flwr", path=str(Path(sys.executable).parent))
    assert flwr is not None
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"### With Flower's own commands\n.*?```\n(.*?)```", text, re.DOTALL)
    assert found is not None
    recipe = found[1]
    for told, here in (
        ("/path/to/prunus/.venv/bin/flwr", flwr),
        ("/path/to/prunus", str(REPOSITORY)),
        ("/path/to/results", str(tmp_path)),
        ("cd /tmp ", f"cd {tmp_path / 'elsewhere'} "),
        ("num-rounds=20", "num-rounds=1"),
    ):
        assert told in recipe
        recipe = recipe.replace(told, here)
    adopt_orphans()
    earlier = list_descendants(os.getpid())
    with tempfile.TemporaryDirectory(prefix="prunus-", dir="/tmp", ignore_cleanup_errors=True) as ray_dir:
        try:
            done = subprocess.run(
                ["bash", "-c", recipe],
                env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
                | {
                    "PATH": os.pathsep.join([str(Path(flwr).parent), os.environ.get("PATH", os.defpath)]),
                    "FLWR_HOME": str(tmp_path / "home"),
                    "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_find_free_port()),
                    "FLWR_LOCAL_CONTROL_API_PORT": str(_find_free_port()),
                    "FLWR_TELEMETRY_ENABLED": "0",
                    "FLWR_DISABLE_UPDATE_CHECK": "1",
                    "RAY_ADDRESS": "local",
                    "RAY_TMPDIR": ray_dir,
                    "RAY_USAGE_STATS_ENABLED": "0",
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=240,
                check=False,
            )
        finally:  # the local SuperLink stays up otherwise
            end_descendants(keep=earlier)
    assert (tmp_path / "mine" / "events.jsonl").exists(), done.stdout[-3000:]
    rows = read_rows(tmp_path / "mine")
    assert select(rows, "end")[0]["status"] == "completed"
    assert len(select(rows, "merge")) == 1
    assert (tmp_path / "mine" / "report.html").exists()
