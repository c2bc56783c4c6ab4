"""Where images come from: one reader per kind of source, each returning (x_train, y_train, x_test, y_test)."""

from __future__ import annotations

import importlib.util
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleet.names import FleetError, unknown_name
from fleet.partition import split_local

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]

TORCHVISION_CLASSES = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "mnist": ("MNIST", "MNIST"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST"),
}
"""Data set name -> class in torchvision.datasets, and the folder that its files lie in."""

NAMES = ("digits", *TORCHVISION_CLASSES)
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
PARTS = ("train", "test", "val", "valid", "validation", "dev")
"""Folders that hold classes' folders of their own are parts of the data; as classes they would teach nothing."""

TEST_RATIO = 0.2
"""Share of the fixed test part where a source brings none."""


class DataError(FleetError):
    """A data set cannot be found, read, or used."""


def check_named(name: str, data_dir: Path | None) -> None:
    """Refuse a name that is not of ``NAMES``, and one of files without a folder that they could be in."""
    if name not in NAMES:
        raise DataError(
            f"{unknown_name('data', name, NAMES)}, npz:PATH, folder:PATH, hub:NAME or package.module:function"
        )
    if name != "digits" and data_dir is None:
        raise DataError(
            f"data {name!r}: is read from files; set data.dir to the (absolute) folder that has them, or that they may "
            "be downloaded to with data.download=true"
        )


def check_files(name: str, data_dir: Path | None, download: bool) -> None:
    """Refuse what ``check_named`` refuses, and a name whose files are nowhere and are not to be fetched."""
    check_named(name, data_dir)
    if name == "digits" or data_dir is None or download or own_file(name, data_dir) is not None:
        return
    files = TORCHVISION_CLASSES[name][1]
    if not (data_dir / files).is_dir():
        raise _no_files(name, data_dir, f"there is no folder {files}")


def named(name: str, data_dir: Path | None, download: bool) -> Arrays:
    """Read a data set of ``NAMES``."""
    check_named(name, data_dir)
    if name == "digits" or data_dir is None:
        return _digits()
    own = own_file(name, data_dir)
    return _torchvision(name, data_dir, download) if own is None else npz(own)


def own_file(name: str, data_dir: Path | None) -> Path | None:
    """The ``.npz`` file in ``data_dir`` that holds the data set."""
    if data_dir is None:
        return None
    files = (data_dir / f"{stem}.npz" for stem in (name, name.replace("-", "_")))
    return next((file for file in files if file.is_file()), None)


def _no_files(name: str, data_dir: Path, why: object) -> DataError:
    return DataError(
        f"data {name!r}: neither {data_dir / name}.npz nor torchvision's files are in {data_dir} ({why}). "
        "Put them there, correct data.dir, or set data.download=true"
    )


def _digits() -> Arrays:
    # Read from scikit-learn's folder without importing it: a second and 80 MB, in each message's process on a device.
    found = importlib.util.find_spec("sklearn")
    home = Path(found.origin).parent if found is not None and found.origin else Path()
    try:
        table = np.loadtxt(home / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    except OSError as error:
        raise DataError(f"data 'digits': {error}; install scikit-learn, which brings them") from error
    # 0..16 -> 0..255: one convention for all images, and still 17 different levels.
    images = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return _split(images, table[:, -1].astype(np.int64))


def _split(x: NDArray[Any], y: NDArray[Any]) -> Arrays:
    """Split images into a training and a test part, stratified and always the same."""
    train, test = split_local(np.arange(len(y)), y, TEST_RATIO, seed=0)
    return x[train], y[train], x[test], y[test]


def _torchvision(name: str, data_dir: Path, download: bool) -> Arrays:
    from compat import TorchvisionError, import_torchvision

    try:
        import_torchvision()
        from torchvision import datasets
    except TorchvisionError as error:
        raise DataError(f"data {name!r}: {error}") from error
    kind = getattr(datasets, TORCHVISION_CLASSES[name][0])
    parts: list[NDArray[Any]] = []
    for is_train in (True, False):
        try:
            part = kind(str(data_dir), train=is_train, download=download)
        except (OSError, RuntimeError) as error:
            raise _no_files(name, data_dir, error) from error
        parts += [np.asarray(part.data), np.asarray(part.targets)]
    return parts[0], parts[1], parts[2], parts[3]


def npz(path: Path) -> Arrays:
    """Read x_train, y_train, x_test, y_test of a ``.npz`` file; memory-mapped if it is not compressed.

    Raises
    ------
    DataError : no such file, another format, or an array is missing.
    """
    arrays = _read_npz(path, NPZ_KEYS)
    return arrays[0], arrays[1], arrays[2], arrays[3]


def npz_labels(path: Path) -> NDArray[Any]:
    """Read y_train alone; errors are those of ``npz``."""
    return _read_npz(path, ("y_train",))[0]


def _read_npz(path: Path, keys: tuple[str, ...]) -> list[NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            missing = [key for key in NPZ_KEYS if key not in members]
            if missing:
                raise DataError(
                    f"data file {path}: lacks {', '.join(missing)}; expected {', '.join(NPZ_KEYS)}, "
                    f"got {', '.join(members)}"
                )
            return [_member(path, archive, members[key]) for key in keys]
    except FileNotFoundError as error:
        raise _not_there("file", path) from error
    except DataError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"data file {path}: cannot be read as .npz: {error}") from error


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """Read one array of a ``.npz``: mapped where it lies in the file as it is, so that processes share its pages."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        is_plain = info.compress_type == zipfile.ZIP_STORED and version == (1, 0)
        if is_plain:
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            header_bytes = stream.tell()
            is_plain = not dtype.hasobject and 0 not in shape
    if not is_plain:
        with archive.open(info) as stream:
            array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
            return array
    with path.open("rb") as raw:
        # The local header repeats name and extra field, with lengths of its own (zip specification, 4.3.7).
        raw.seek(info.header_offset)
        name_bytes, extra_bytes = struct.unpack("<26xHH", raw.read(30))
    offset = info.header_offset + 30 + name_bytes + extra_bytes + header_bytes
    return np.memmap(path, dtype, "r", offset, shape, "F" if is_fortran else "C")


def image_folder(path: Path, size: int | None) -> Arrays:
    """Read a folder of images, one folder per class; classes are numbered in the order of their names.

    Parameters
    ----------
    path : holds ``train/CLASS/`` and ``test/CLASS/``, or ``CLASS/`` (split 80 / 20, stratified).
    size : side length in pixels to resize every image to; None takes them as they are.

    Raises
    ------
    DataError : no such folder, no images, unequal sizes, or a file that is no image.
    """
    check_folder(path)
    if (path / "train").is_dir() and (path / "test").is_dir():
        classes = _class_names(path / "train")
        unseen = sorted(set(_class_names(path / "test")) - set(classes))
        if unseen:
            raise DataError(f"data folder {path}: test has classes that train lacks: {', '.join(unseen)}")
        files = [_class_files(path / part, classes) for part in ("train", "test")]
        (train_files, y_train), (test_files, y_test) = files
        images = _decode([*train_files, *test_files], size)
        return images[: len(y_train)], y_train, images[len(y_train) :], y_test
    image_files, labels = _class_files(path, _class_names(path))
    return _split(_decode(image_files, size), labels)


def check_file(path: Path) -> None:
    """Refuse a data file that does not exist."""
    if not path.is_file():
        raise _not_there("file", path)


def check_folder(path: Path) -> None:
    """Refuse an image folder that does not exist, or whose sub-folders are parts of the data and no classes."""
    if not path.is_dir():
        raise _not_there("folder", path)
    parts = [name for name in PARTS if (path / name).is_dir() and _class_names(path / name)]
    if parts and not {"train", "test"} <= set(parts):
        raise DataError(
            f"data folder {path}: {', '.join(parts)} would be taken for classes; call the parts train and test, or "
            "put the classes' folders of one part directly into the folder that you name (it is split 80 / 20)"
        )


def _not_there(kind: str, path: Path) -> DataError:
    return DataError(
        f"data {kind} {path}: does not exist; relative paths are read where ./run.sh is called, and with flwr run "
        "inside data.dir"
    )


def _class_names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _class_files(path: Path, classes: list[str]) -> tuple[list[Path], NDArray[np.int64]]:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (path / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"data folder {path}: no images in its sub-folders; expected {path}/CLASS/NAME.png")
    return files, np.array(labels, np.int64)


def _decode(files: list[Path], size: int | None) -> NDArray[np.uint8]:
    """Decode images to [N, H, W] if all are grey, to [N, H, W, 3] otherwise."""
    from PIL import Image, UnidentifiedImageError

    decoded: list[NDArray[np.uint8]] = []
    for file in files:
        try:
            with Image.open(file) as image:
                decoded.append(_pixels(image, size, f"data file {file}"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"data file {file}: is no image that can be read: {error}") from error
        if decoded[-1].shape[:2] != decoded[0].shape[:2]:
            raise DataError(
                f"data file {file}: is {_extent(decoded[-1])}, but {files[0]} is {_extent(decoded[0])}; images must "
                "have one size: add @SIZE to the name, as in 'folder:faces@32', to resize them"
            )
    return _stack(decoded)


def _pixels(image: Any, size: int | None, where: str) -> NDArray[np.uint8]:
    """A picture of Pillow's as [H, W] if it is grey, else [H, W, 3]; ``size`` x ``size`` unless that is None."""
    from PIL import Image

    if image.mode[0] in "IF":  # Pillow would clip them to 8 bits without a word
        raise DataError(f"{where}: has more than 8 bits a channel (mode {image.mode}); convert it")
    picture = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if size is not None:
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _stack(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    if all(image.ndim == 2 for image in images):
        return np.stack(images)
    return np.stack([image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images])


def _extent(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def check_hub(name: str, download: bool) -> None:
    """Refuse a data set of the hub without leave to fetch it, or without what fetches it."""
    if not download:
        raise DataError(
            f"data 'hub:{name}': is fetched from the Hugging Face hub, or from what it fetched before; allow that with "
            "data.download=true"
        )
    if importlib.util.find_spec("flwr_datasets") is None:
        raise _no_hub(name)


def _no_hub(name: str) -> DataError:
    return DataError(f"data 'hub:{name}': needs flwr-datasets; pip install 'flwr-datasets[vision]'")


def hub(name: str, size: int | None, download: bool) -> Arrays:
    """Read the data set ``name`` of the Hugging Face hub through flwr-datasets (an optional dependency).

    Parameters
    ----------
    size : side length in pixels to resize every image to; None takes them as they are.
    download : leave to ask the hub.

    Raises
    ------
    DataError : no leave, flwr-datasets is missing, the data set cannot be fetched, or it is not one of labelled images.
    """
    check_hub(name, download)
    try:
        from datasets import ClassLabel, Image
        from flwr_datasets import FederatedDataset
    except ImportError as error:
        raise _no_hub(name) from error
    try:
        federated = FederatedDataset(dataset=name, partitioners={"train": 1})
        train = federated.load_split("train")
    except Exception as error:  # the hub's libraries raise everything from OSError to their own kinds
        raise DataError(f"data 'hub:{name}': cannot be fetched: {type(error).__name__}: {error}") from error
    image_key = next((key for key, kind in train.features.items() if isinstance(kind, Image)), None)
    label_key = next((key for key, kind in train.features.items() if isinstance(kind, ClassLabel)), None)
    if image_key is None or label_key is None:
        raise DataError(f"data 'hub:{name}': needs an image and a class column, has {', '.join(train.features)}")
    x, y = _columns(name, train, image_key, label_key, size)
    try:
        test = federated.load_split("test")
    except (KeyError, ValueError):
        return _split(x, y)
    return x, y, *_columns(name, test, image_key, label_key, size)


def _columns(
    name: str, rows: Any, image_key: str, label_key: str, size: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = [_pixels(image, size, f"data 'hub:{name}': image {index}") for index, image in enumerate(rows[image_key])]
    other = next((image for image in images if image.shape[:2] != images[0].shape[:2]), None)
    if other is not None:
        raise DataError(
            f"data 'hub:{name}': has images of {_extent(images[0])} and of {_extent(other)}; images must have one "
            f"size: add @SIZE to the name, as in 'hub:{name}@32', to resize them"
        )
    return _stack(images), np.asarray(rows[label_key], np.int64)
