"""One client's share of the data, as tensors on its device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fleet.data import DataError, ImageData, load_data
from fleet.partition import partition_labels, split_local
from wire.message import DataConfig, Job

OWN = "own"
"""Partition of runs whose devices have data of their own."""


@dataclass(frozen=True)
class Examples:
    """Images and labels of one purpose.

    Attributes
    ----------
    x : [num_examples, channels, height, width], uint8 or float32, not yet normalised.
    y : int64 [num_examples].
    """

    x: Tensor
    y: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Normalised float32 images [batch, channels, height, width], and labels [batch]."""
        x = self.x[index]
        scaled = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return (scaled - self.mean) / self.std, self.y[index]

    def to(self, device: torch.device) -> Examples:
        """The same on another device."""
        return Examples(self.x.to(device), self.y.to(device), self.mean.to(device), self.std.to(device))


@lru_cache(maxsize=4)
def load_images(config: DataConfig) -> ImageData:
    """The whole data set, once per process, cut to ``max-train`` and ``max-test``."""
    data = load_data(config.name, config.dir, download=config.download)
    return limited(data, config.max_train, config.max_test)


def limited(data: ImageData, max_train: int, max_test: int) -> ImageData:
    """The first ``max_train`` training and ``max_test`` test examples; 0 for all."""
    if max_train:
        data = replace(data, x_train=data.x_train[:max_train], y_train=data.y_train[:max_train])
    if max_test:
        data = replace(data, x_test=data.x_test[:max_test], y_test=data.y_test[:max_test])
    return data


@lru_cache(maxsize=4)
def partitions(config: DataConfig, num_clients: int) -> tuple[np.ndarray, ...]:
    """Every client's training indices; a function of the configuration alone, so that all processes agree."""
    labels = load_images(config).y_train
    if config.partition == OWN:  # nobody's share of this data; the devices have theirs
        return (np.zeros(0, dtype=np.int64),) * num_clients
    return partition_labels(labels, num_clients, config.partition, seed=config.seed, min_size=config.min_size)


@lru_cache(maxsize=256)
def client_examples(config: DataConfig, num_clients: int, partition_id: int) -> tuple[Examples, Examples]:
    """One client's (training, test) examples."""
    data = load_images(config)
    mine = partitions(config, num_clients)[partition_id]
    train, test = split_local(mine, data.y_train, config.test_ratio, seed=config.seed + partition_id)
    return examples_of(data, data.x_train, data.y_train, train), examples_of(data, data.x_train, data.y_train, test)


def job_examples(job: Job, partition_id: int) -> tuple[Examples, Examples, int]:
    """One client's (training, test) examples and the number of classes of all clients."""
    if job.data.partition != OWN:
        train, test = client_examples(job.data, job.num_clients, partition_id)
        return train, test, load_images(job.data).num_classes
    x, y = read_share(job.data.name.removeprefix("npz:"), job.num_classes)
    mean, std = (tuple(float(part) for part in text.split(",")) for text in (job.mean, job.std))
    data = ImageData(job.data.name, x, y, x[:0], y[:0], job.num_classes, mean, std)
    kept, held = split_local(np.arange(len(y)), y, job.data.test_ratio, seed=job.data.seed + partition_id)
    return examples_of(data, x, y, kept), examples_of(data, x, y, held), job.num_classes


def read_share(path: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A device's own images [N, H, W] or [N, H, W, C] and labels [N], from an ``.npz`` file with ``x`` and ``y``.

    Raises
    ------
    DataError
        If the file is no such data, or a label is not one of the run's.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data: {path} is no .npz file with x (images) and y (labels): {error}") from error
    if x.ndim not in (3, 4) or y.shape != x.shape[:1] or y.dtype.kind not in "iu" or len(y) == 0:
        raise DataError(f"data: {path} has x {x.shape} and y {y.shape} {y.dtype}, expected images and whole labels")
    if y.min() < 0 or y.max() >= num_classes:
        raise DataError(f"data: {path} has labels {y.min()} to {y.max()}, the run's are 0 to {num_classes - 1}")
    return x, y.astype(np.int64)


def examples_of(data: ImageData, x: np.ndarray, y: np.ndarray, index: np.ndarray | slice = slice(None)) -> Examples:
    """Tensors of the examples at ``index``; images become [num_examples, channels, height, width].

    Colour images stay channels last in memory, and so do their batches: convolutions on CPUs are faster on them.
    """
    images = np.ascontiguousarray(x[index])
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(np.array(images))
    stats = [torch.tensor(np.asarray(s), dtype=torch.float32).reshape(1, -1, 1, 1) for s in (data.mean, data.std)]
    return Examples(tensor, torch.from_numpy(np.array(y[index], dtype=np.int64)), stats[0], stats[1])
