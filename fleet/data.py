"""Data sets: one type for images with labels, and :func:`load_data`, which makes it from a name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleet import data_sources
from fleet.data_sources import Arrays, DataError

CHANNEL_COUNTS = (1, 3, 4)
_CHUNK = 4096

__all__ = ["DataError", "ImageData", "check_data", "load_data", "train_labels"]


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images with labels, a training and a test part. All arrays are read-only.

    Attributes
    ----------
    name : name it was loaded by.
    x_train, x_test : images, [N, H, W] or [N, H, W, C] with C in (1, 3, 4); uint8 (0 to 255), or float32 as it is.
    y_train, y_test : class of each image, int64, [N].
    num_classes : largest label of both parts + 1.
    mean, std : mean and standard deviation of each channel of the training images, [C]; uint8 images divided by 255
        first. A channel that is constant has std 1.
    """

    name: str
    x_train: NDArray[Any]
    y_train: NDArray[np.int64]
    x_test: NDArray[Any]
    y_test: NDArray[np.int64]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def in_channels(self) -> int:
        """Channels of an image, C."""
        return self.x_train.shape[3] if self.x_train.ndim == 4 else 1


def load_data(name: str, data_dir: str | Path | None = None, download: bool = False) -> ImageData:
    """Load a data set by name; a second call with the same arguments in the same process returns the same object.

    ==================================================  =============================================================
    ``digits``                                          scikit-learn's handwritten digits, 8x8, 1,437 / 360 stratified
                                                        and fixed; the 17 grey levels stretched to uint8 0 to 255
    ``cifar10 cifar100 mnist fashion-mnist``            DATA_DIR/NAME.npz where that exists, else torchvision's files
                                                        (DATA_DIR/cifar-10-batches-py, DATA_DIR/MNIST/raw, ...)
    ``npz:PATH``                                        x_train, y_train, x_test, y_test; relative paths: to DATA_DIR
    ``folder:PATH``                                     PATH/train/CLASS/*.png and PATH/test/CLASS/*.png, or
                                                        PATH/CLASS/*.png (every class split 80 / 20)
    ``hub:NAME``                                        a data set of the Hugging Face hub through flwr-datasets, which
                                                        keeps what it fetched
    ``package.module:function``                         ``function()`` returns an ImageData or the four arrays
    ==================================================  =============================================================

    ``@SIZE`` after any of them makes the images SIZE pixels high and wide: ``cifar10@16`` has a quarter of the pixels.
    Those of ``folder:`` and ``hub:`` may differ in size before.

    Parameters
    ----------
    name : one of the above.
    data_dir : folder with the data sets that are files. Give an absolute path where processes start in other folders.
    download : let torchvision fetch what is missing into ``data_dir``, and flwr-datasets what is missing in its cache.
        Nothing is ever fetched without it, and ``hub:`` is refused: what its cache has shows only by asking the hub.

    Raises
    ------
    DataError : unknown name, missing files or packages, or arrays that are no labelled images.
    """
    return _load(name, None if data_dir in (None, "") else str(data_dir), bool(download))


def check_data(name: str, data_dir: str | Path | None = None, download: bool = False) -> None:
    """Refuse what :func:`load_data` would, as far as that shows without reading data or running code of others.

    Raises
    ------
    DataError : unknown name, files that are not there, or a hub that may not be asked or cannot.
    """
    folder = None if data_dir in (None, "") else Path(str(data_dir)).expanduser()
    kind, rest, _ = _read_name(name)
    if kind == "hub":
        data_sources.check_hub(rest, download)
    elif kind == "npz":
        data_sources.check_file(_inside(folder, rest))
    elif kind == "folder":
        data_sources.check_folder(_inside(folder, rest))
    elif not kind:
        data_sources.check_files(rest, folder, download)


def train_labels(name: str, data_dir: str | Path | None = None) -> NDArray[np.int64] | None:
    """Class of each training image, int64 [N], where it is known without reading images: of digits and ``.npz`` files.

    Raises
    ------
    DataError : a file that cannot be read, or labels of another kind.
    """
    folder = None if data_dir in (None, "") else Path(str(data_dir)).expanduser()
    kind, rest, _ = _read_name(name)
    if (kind, rest) == ("", "digits"):
        return load_data("digits").y_train
    file = _inside(folder, rest) if kind == "npz" else data_sources.own_file(rest, folder) if not kind else None
    return None if file is None else _labels(name, "y_train", data_sources.npz_labels(file))


def _read_name(name: str) -> tuple[str, str, int | None]:
    """A data set's name taken apart: what stands before and after the colon, and the size to resize to."""
    before, _, after = name.rpartition("@")
    source, size = (before, int(after)) if after.isdecimal() else (name, None)
    if size == 0:
        raise DataError(f"data {name!r}: images of 0 pixels; write for example 'cifar10@16'")
    kind, colon, rest = source.partition(":")
    if colon and not (kind and rest):
        what = "follows" if kind else "stands before"
        raise DataError(f"data {name!r}: nothing {what} the colon; write for example 'npz:faces.npz'")
    return (kind, rest, size) if colon else ("", source, size)


@lru_cache(maxsize=4)
def _load(name: str, data_dir: str | None, download: bool) -> ImageData:
    folder = None if data_dir is None else Path(data_dir).expanduser()
    kind, rest, size = _read_name(name)
    if kind == "folder":  # its images may differ in size until they are resized
        return _image_data(name, data_sources.image_folder(_inside(folder, rest), size))
    if kind == "hub":
        return _image_data(name, data_sources.hub(rest, size, download))
    if not kind:
        data = _image_data(name, data_sources.named(rest, folder, download))
    elif kind == "npz":
        data = _image_data(name, data_sources.npz(_inside(folder, rest)))
    else:
        data = _from_function(name, kind, rest)
    return data if size is None else _resized(data, size)


def _resized(data: ImageData, size: int) -> ImageData:
    """The data with images of ``size`` x ``size``, each pixel the mean of the area that it stands for."""
    from torch import from_numpy
    from torch.nn.functional import interpolate

    def part(x: NDArray[Any]) -> NDArray[Any]:
        found = np.empty((len(x), size, size, *x.shape[3:]), x.dtype)
        for start in range(0, len(x), _CHUNK):
            chunk = np.array(x[start : start + _CHUNK], np.float32).reshape(-1, *x.shape[1:3], data.in_channels)
            means = interpolate(from_numpy(chunk).permute(0, 3, 1, 2), size=size, mode="area").permute(0, 2, 3, 1)
            rounded = means.round() if x.dtype == np.uint8 else means
            found[start : start + _CHUNK] = rounded.reshape(-1, *found.shape[1:]).numpy()
        return found

    small = _image_data(data.name, (part(data.x_train), data.y_train, part(data.x_test), data.y_test))
    return replace(small, num_classes=data.num_classes)


def _inside(folder: Path | None, path: str) -> Path:
    expanded = Path(path).expanduser()
    return expanded if folder is None else folder / expanded


def _from_function(name: str, module_name: str, function_name: str) -> ImageData:
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"data {name!r}: {error}. Expected 'package.module:function', npz:PATH, folder:PATH, hub:NAME or one of "
            f"{', '.join(data_sources.NAMES)}"
        ) from error
    try:
        made = function()
    except Exception as error:  # whatever code of others raises: what it was asked for is not in its message
        raise DataError(f"data {name!r}: the function raised {type(error).__name__}: {error}") from error
    if isinstance(made, ImageData):
        checked = _image_data(name, (made.x_train, made.y_train, made.x_test, made.y_test))
        if made.num_classes < checked.num_classes or not len(made.mean) == len(made.std) == checked.in_channels:
            raise DataError(
                f"data {name!r}: num_classes {made.num_classes}, mean {made.mean} and std {made.std} do not fit labels "
                f"up to {checked.num_classes - 1} and {checked.in_channels} channels"
            )
        return replace(checked, num_classes=made.num_classes, mean=made.mean, std=made.std)
    if not isinstance(made, tuple | list) or len(made) != 4:
        raise DataError(
            f"data {name!r}: the function must return an ImageData or (x_train, y_train, x_test, y_test), "
            f"got {type(made).__name__}"
        )
    return _image_data(name, (made[0], made[1], made[2], made[3]))


def _image_data(name: str, arrays: Arrays) -> ImageData:
    x_train, x_test = _images(name, "x_train", arrays[0]), _images(name, "x_test", arrays[2])
    y_train, y_test = _labels(name, "y_train", arrays[1]), _labels(name, "y_test", arrays[3])
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y) or len(x) == 0:
            raise DataError(
                f"data {name!r}: the {part} part needs as many labels as images, >= 1; got {len(y)}, {len(x)}"
            )
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise DataError(
            f"data {name!r}: training and test images must be alike, got {x_train.dtype} {x_train.shape[1:]} "
            f"and {x_test.dtype} {x_test.shape[1:]}"
        )
    num_classes = int(max(y_train.max(), y_test.max())) + 1
    mean, std = _channel_statistics(x_train)
    for array in (x_train, y_train, x_test, y_test):
        array.flags.writeable = False
    return ImageData(name, x_train, y_train, x_test, y_test, num_classes, mean, std)


def _images(name: str, part: str, array: Any) -> NDArray[Any]:
    x = np.asarray(array).view()  # a view: the caller's own array stays writeable
    if x.dtype.kind == "f":
        x = x.astype(np.float32, copy=False).view()
        if not np.isfinite(x).all():
            raise DataError(f"data {name!r}: {part} holds NaN or infinity")
    elif x.dtype != np.uint8:
        raise DataError(f"data {name!r}: {part} must be uint8 (0 to 255) or floating point, got {x.dtype}")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in CHANNEL_COUNTS):
        hint = ""
        if x.ndim == 4 and x.shape[1] in CHANNEL_COUNTS:
            hint = ". These look channels-first: transpose them with x.transpose(0, 2, 3, 1)"
        raise DataError(f"data {name!r}: {part} must be [N, H, W] or [N, H, W, C], C 1, 3 or 4; got {x.shape}{hint}")
    return x


def _labels(name: str, part: str, array: Any) -> NDArray[np.int64]:
    y = np.asarray(array)
    if y.ndim != 1 or y.dtype.kind not in "iu" or (len(y) and y.min() < 0):
        raise DataError(f"data {name!r}: {part} must be integers >= 0 in one row, got {y.dtype} of shape {y.shape}")
    return y.astype(np.int64)


def _channel_statistics(x: NDArray[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of ``x`` [N, H, W(, C)], uint8 as fractions of 255."""
    num_channels = x.shape[3] if x.ndim == 4 else 1
    sums, squares = np.zeros(num_channels), np.zeros(num_channels)
    levels = np.arange(256)
    # In chunks: a memory-mapped data set is never in memory as a whole, and never copied to floats.
    for start in range(0, len(x), _CHUNK):
        chunk = x[start : start + _CHUNK].reshape(-1, num_channels)
        for channel in range(num_channels):
            values = chunk[:, channel]
            if x.dtype == np.uint8:
                counts = np.bincount(values, minlength=256)
                sums[channel] += counts @ levels
                squares[channel] += counts @ levels**2
            else:
                sums[channel] += values.sum(dtype=np.float64)
                squares[channel] += np.square(values, dtype=np.float64).sum()
    number = x.size / num_channels
    unit = 255.0 if x.dtype == np.uint8 else 1.0
    means = sums / number
    variances = np.maximum(squares / number - means**2, 0)
    stds = np.where(variances > 1e-12 * (1 + means**2), np.sqrt(variances), unit)
    return tuple(float(m) for m in means / unit), tuple(float(s) for s in stds / unit)
