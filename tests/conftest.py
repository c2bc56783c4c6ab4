"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# A busy machine is no failure: properties are about results, not about milliseconds.
settings.register_profile("prunus", deadline=None)
settings.load_profile("prunus")

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real federations first: they wait more than they compute, so that one worker waits while the other computes."""
    items.sort(key=lambda item: (ROOT / "tests" / "deploy") not in item.path.parents)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the extra real data sets: $PRUNUS_DATA, or ``../shared/data`` beside the repository."""
    folder = Path(os.environ.get("PRUNUS_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "load.py").is_file():
        pytest.skip(f"the extra data sets are not at {folder} (set PRUNUS_DATA to the folder that holds their load.py)")
    return folder


@pytest.fixture(scope="session")
def cifar10_npz(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uncompressed ``cifar10.npz`` with 2,000 training and 500 test images of the real CIFAR-10."""
    spec = importlib.util.spec_from_file_location("shared_load", shared_data / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x_train, y_train, x_test, y_test = module.load("cifar10")
    path = tmp_path_factory.mktemp("cifar10") / "cifar10.npz"
    np.savez(path, x_train=x_train[:2000], y_train=y_train[:2000], x_test=x_test[:500], y_test=y_test[:500])
    return path


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB, or of the test's own size (``parametrize(..., indirect=True)``)."""
    folder, size = tmp_path / "disk", getattr(request, "param", "3m")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
