"""What of the project is sent to a SuperLink and on to the devices."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# What Flower packs of an app, less what a run has no use for. Handing over a copy spares `flwr run` the walk through
# every file of `.venv`, seconds per run.
SUFFIXES = (".py", ".toml", ".json", ".yaml", ".yml")
NAMES = (".gitignore", "LICENSE")
LEFT_OUT = ("tests", "bench", "deploy", "docs", "results")


def copy_app(app_dir: Path, target_dir: Path) -> None:
    """Copy the files that make up the app: no environments, hidden folders, nor what a run has no use for."""
    for folder, folder_names, file_names in os.walk(app_dir):
        is_top = Path(folder) == app_dir
        folder_names[:] = [
            name
            for name in folder_names
            if not name.startswith((".", "__pycache__"))
            and not (is_top and name in LEFT_OUT)
            and not (Path(folder) / name / "pyvenv.cfg").exists()
            and not target_dir.is_relative_to(Path(folder) / name)
        ]
        target = target_dir / Path(folder).relative_to(app_dir)
        target.mkdir(parents=True, exist_ok=True)
        for name in file_names:
            if name.endswith(SUFFIXES) or (is_top and name in NAMES):
                shutil.copyfile(Path(folder) / name, target / name)
