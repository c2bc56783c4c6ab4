"""The two data sets of AdaSplit's experiments, built from real images: ``data.name=bench.mixed:mixed_cifar``.

The folder with the images ($PRUNUS_DATA, or ``../shared/data`` beside the repository) holds a ``load.py`` whose
``load(name)`` returns x_train, y_train, x_test, y_test. Labels are numbered task by task, so that the partition
``label-blocks:2`` (or ``:5``) gives every client its task. MIXED_IMAGES bounds the images of a task, MIXED_SIZE
shrinks their sides, both for quick versions.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]

NONIID = ("cifar100", "cifar10", "fashion_mnist", "mnist", "notmnist10k")
CLASSES_PER_TASK = 5
NUM_HELD_OUT = 100


class MixedDataError(FileNotFoundError):
    """The images are not there."""


def data_folder() -> Path:
    """Where the images are.

    Raises
    ------
    MixedDataError
        If there is no ``load.py``.
    """
    folder = Path(os.environ.get("PRUNUS_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (folder / "load.py").is_file():
        raise MixedDataError(f"mixed data: no load.py in {folder}; set PRUNUS_DATA to the folder that holds it")
    return folder


def has_data() -> bool:
    """Whether the images are there."""
    try:
        data_folder()
    except MixedDataError:
        return False
    return True


@lru_cache(maxsize=1)
def _loader() -> Callable[[str], Arrays]:
    spec = importlib.util.spec_from_file_location("mixed_load", data_folder() / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load: Callable[[str], Arrays] = module.load
    return load


def mixed_cifar() -> Arrays:
    """CIFAR-10, training and test images joined; task i is the pair of classes 2 i and 2 i + 1."""
    x, y = _joined("cifar10")
    keep = _first_of_each(y // 2, num_images())
    return _split(x[keep], y[keep])


def mixed_noniid() -> Arrays:
    """Five tasks of five classes, one of each data set of ``NONIID``, as 32 x 32 colour images."""
    images, labels = [], []
    for task, name in enumerate(NONIID):
        x, y = _joined(name)
        keep = np.flatnonzero(y < CLASSES_PER_TASK)
        keep = keep[_first_of_each(np.zeros(len(keep), np.int64), num_images())]
        images.append(_as_colour(x[keep]))
        labels.append(y[keep] + task * CLASSES_PER_TASK)
    x, y = np.concatenate(images), np.concatenate(labels)
    order = np.random.default_rng(0).permutation(len(y))
    return _split(x[order], y[order])


def num_images() -> int:
    """Most images of a task."""
    return int(os.environ.get("MIXED_IMAGES", "0")) or 10**9


def _joined(name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    x_train, y_train, x_test, y_test = _loader()(name)
    return np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test]).astype(np.int64)


def _first_of_each(tasks: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Indices of the first ``number`` images of every task, in order; rows are class-mixed already."""
    return np.sort(np.concatenate([np.flatnonzero(tasks == task)[:number] for task in np.unique(tasks)]))


def _as_colour(x: NDArray[Any]) -> NDArray[Any]:
    if x.ndim == 4:
        return x
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(padded[..., None], 3, axis=3)


def _split(x: NDArray[Any], y: NDArray[np.int64]) -> Arrays:
    """Everything is the clients'; the server's held-out set is a formality, for clients test what they have."""
    side = int(os.environ.get("MIXED_SIZE", "0"))
    if side:
        x = x[:, :: x.shape[1] // side, :: x.shape[2] // side]
    return x, y, x[:NUM_HELD_OUT], y[:NUM_HELD_OUT]
