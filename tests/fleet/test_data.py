"""Data sets by name: what arrives is labelled images in one form, or an error that says what is wrong."""

import pickle
import struct
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from fleet.data import DataError, ImageData, _image_data, check_data, load_data, train_labels
from fleet.names import FleetError

RNG = np.random.default_rng(0)


def arrays(num_train: int = 12, num_test: int = 4, shape: tuple[int, ...] = (6, 5, 3)) -> dict[str, np.ndarray]:
    return {
        "x_train": RNG.integers(0, 256, (num_train, *shape), np.uint8),
        "y_train": np.arange(num_train) % 3,
        "x_test": RNG.integers(0, 256, (num_test, *shape), np.uint8),
        "y_test": np.arange(num_test) % 3,
    }


def in_order(made: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return made["x_train"], made["y_train"], made["x_test"], made["y_test"]


def is_mapped(array: np.ndarray) -> bool:
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


# --- digits


def test_digits_are_1437_and_360_stratified_uint8_images_without_any_file():
    data = load_data("digits")
    assert data.x_train.shape == (1437, 8, 8)
    assert data.x_test.shape == (360, 8, 8)
    assert (data.num_classes, data.in_channels, data.x_train.shape[1:]) == (10, 1, (8, 8))
    assert data.x_train.dtype == np.uint8
    assert (data.x_train.min(), data.x_train.max()) == (0, 255)
    assert len(np.unique(data.x_train)) == 17
    shares = np.bincount(data.y_test) / 360 - np.bincount(data.y_train) / 1437
    assert abs(shares).max() < 0.005


def test_digits_are_scikit_learns_own_each_once():
    from sklearn.datasets import load_digits

    data, bunch = load_data("digits"), load_digits()
    ours = np.concatenate([data.x_train, data.x_test]).reshape(-1, 64).astype(float)
    labels = np.concatenate([data.y_train, data.y_test])
    back = np.column_stack([np.rint(ours * 16 / 255), labels])
    theirs = np.column_stack([bunch.data, bunch.target])
    np.testing.assert_array_equal(back[np.lexsort(back.T)], theirs[np.lexsort(theirs.T)])


def test_same_arguments_return_the_same_object_and_it_cannot_be_written_to():
    data = load_data("digits")
    assert load_data("digits") is data
    for array in (data.x_train, data.y_train, data.x_test, data.y_test):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# --- statistics and normalisation


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(4, 3), (2, 2, 1), (3, 4, 3)]),
    kind=st.sampled_from([np.uint8, np.float32, np.float64]),
)
def test_mean_and_std_are_those_of_each_channel(seed, shape, kind):
    rng = np.random.default_rng(seed)
    images = (rng.random((7, *shape)) * (255 if kind == np.uint8 else 1)).astype(kind)
    data = _image_data("x", (images, np.arange(7), images[:2], np.arange(2)))
    unit = images.astype(np.float64).reshape(-1, shape[2] if len(shape) == 3 else 1) / (255 if kind == np.uint8 else 1)
    np.testing.assert_allclose(data.mean, unit.mean(0), rtol=1e-5)
    np.testing.assert_allclose(data.std, unit.std(0), rtol=1e-4)


def test_a_constant_channel_has_std_1():
    made = arrays() | {"x_train": np.full((12, 6, 5, 3), 7, np.uint8)}
    assert _image_data("x", in_order(made)).std == (1.0, 1.0, 1.0)


# --- npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_back_what_was_saved_and_maps_it_where_it_is_not_compressed(tmp_path, save):
    made = arrays()
    save(tmp_path / "set.npz", **made)
    data = load_data(f"npz:{tmp_path / 'set.npz'}")
    for key, array in made.items():
        np.testing.assert_array_equal(getattr(data, key), array)
    assert is_mapped(data.x_train) == (save is np.savez)
    assert not data.x_train.flags.writeable


def test_npz_keeps_the_order_of_fortran_arrays(tmp_path):
    made = arrays()
    np.savez(tmp_path / "set.npz", **(made | {"x_train": np.asfortranarray(made["x_train"])}))
    np.testing.assert_array_equal(load_data("npz:set.npz", tmp_path).x_train, made["x_train"])


@pytest.mark.parametrize("stem", ["fashion-mnist", "fashion_mnist"])
def test_a_named_set_is_read_from_an_npz_in_the_data_folder(tmp_path, stem):
    np.savez(tmp_path / f"{stem}.npz", **arrays(shape=(6, 5)))
    assert load_data("fashion-mnist", tmp_path).x_train.shape == (12, 6, 5)


def test_a_slice_of_the_real_cifar_10_is_read_mapped_with_its_known_mean(cifar10_npz):
    data = load_data("cifar10", cifar10_npz.parent)
    assert (data.num_classes, data.in_channels, data.x_train.shape[1:3]) == (10, 3, (32, 32))
    assert is_mapped(data.x_train)
    np.testing.assert_allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=0.01)
    np.testing.assert_allclose(data.std, (0.2470, 0.2435, 0.2616), atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)])
def test_real_grey_sets_are_complete_and_have_their_known_mean_and_std(shared_data, name, mean, std):
    data = load_data(name, shared_data)
    assert (len(data.x_train), len(data.x_test)) == (60000, 10000)
    np.testing.assert_allclose((*data.mean, *data.std), (mean, std), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.zeros((12, 6, 5, 3), np.int32)}, "uint8"),
        ({"x_train": np.zeros((12, 3, 6, 5), np.uint8)}, "transpose"),
        ({"x_train": np.zeros((12, 30), np.uint8)}, r"\[N, H, W\]"),
        ({"x_train": np.full((12, 6, 5, 3), np.nan)}, "NaN"),
        ({"x_train": np.zeros((11, 6, 5, 3), np.uint8)}, "as many labels"),
        ({"x_test": np.zeros((4, 6, 6, 3), np.uint8)}, "must be alike"),
        ({"x_test": np.zeros((4, 6, 5, 3), np.float32)}, "must be alike"),
        ({"y_train": np.arange(12.0)}, "integers"),
        ({"y_train": np.full(12, -1)}, ">= 0"),
        ({"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)}, "test part"),
    ],
)
def test_arrays_that_are_no_labelled_images_are_an_error_that_says_why(tmp_path, change, expected):
    made = {key: array for key, array in (arrays() | change).items() if array is not None}
    np.savez(tmp_path / "set.npz", **made)
    with pytest.raises(DataError, match=expected):
        load_data("npz:set.npz", tmp_path)


def test_a_file_that_is_missing_or_no_npz_or_holds_pickles_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_data("npz:none.npz", tmp_path)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="cannot be read"):
        load_data("npz:text.npz", tmp_path)
    np.savez(tmp_path / "pickled.npz", **(arrays() | {"y_train": np.array([{}] * 12, object)}))
    with pytest.raises(DataError, match="cannot be read"):
        load_data("npz:pickled.npz", tmp_path)


# --- torchvision's own files


def write_mnist(folder: Path, made: dict[str, np.ndarray]) -> None:
    """The IDX files that torchvision's MNIST reads: big-endian magic number, extents, bytes."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        x, y = made[f"x_{part}"], made[f"y_{part}"]
        images = struct.pack(">iiii", 2051, *x.shape) + x.tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">ii", 2049, len(y)) + y.astype(np.uint8).tobytes()
        )


def test_mnist_is_read_from_torchvisions_files(tmp_path):
    made = arrays(shape=(28, 28))
    write_mnist(tmp_path, made)
    data = load_data("mnist", tmp_path)
    for key, array in made.items():
        np.testing.assert_array_equal(getattr(data, key), array)


@pytest.mark.parametrize(
    ("name", "folder", "train", "test", "key"),
    [
        ("cifar10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels"),
        ("cifar100", "cifar-100-python", ["train"], "test", "fine_labels"),
    ],
)
def test_cifar_is_read_from_torchvisions_files(tmp_path, monkeypatch, name, folder, train, test, key):
    from compat import import_torchvision

    import_torchvision()
    from torchvision.datasets import cifar

    # torchvision knows the checksums of the real files; these are small ones of the same format.
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    made = arrays(10, 4, (32, 32, 3))
    (tmp_path / folder).mkdir()

    def write(file: str, x: np.ndarray, y: np.ndarray) -> None:
        batch = {"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), key: y.tolist()}
        (tmp_path / folder / file).write_bytes(pickle.dumps(batch))

    for file, x, y in zip(
        train, np.split(made["x_train"], len(train)), np.split(made["y_train"], len(train)), strict=True
    ):
        write(file, x, y)
    write(test, made["x_test"], made["y_test"])
    for meta, field in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
        (tmp_path / folder / meta).write_bytes(pickle.dumps({field: ["a", "b", "c"]}))
    data = load_data(name, tmp_path)
    for array in made:
        np.testing.assert_array_equal(getattr(data, array), made[array])


def test_a_named_set_without_files_is_an_error_with_three_remedies_and_no_download(tmp_path):
    with pytest.raises(DataError) as caught:
        load_data("cifar10", tmp_path)
    assert all(word in str(caught.value) for word in ("cifar10.npz", "data.dir", "data.download=true"))
    assert not list(tmp_path.iterdir())


def test_download_is_passed_on_only_when_asked_for(tmp_path, monkeypatch):
    from compat import import_torchvision

    asked = []

    class Recorder:
        data, targets = np.zeros((3, 4, 4), np.uint8), [0, 1, 2]

        def __init__(self, root: str, train: bool, download: bool) -> None:
            asked.append((root, train, download))

    monkeypatch.setattr(import_torchvision().datasets, "MNIST", Recorder)
    load_data("mnist", tmp_path, download=True)
    load_data("mnist", tmp_path)
    assert asked == [(str(tmp_path), part, download) for download in (True, False) for part in (True, False)]


@pytest.mark.parametrize("data_dir", [None, ""])
def test_a_named_set_without_a_data_folder_is_an_error(data_dir):
    with pytest.raises(DataError, match=r"set data\.dir"):
        load_data("mnist", data_dir)


# --- image folders


def write_images(folder: Path, images: dict[str, np.ndarray]) -> None:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(image).save(folder / name)


def test_a_folder_with_train_and_test_is_read_as_it_is_with_classes_by_name(tmp_path):
    pictures = RNG.integers(0, 256, (5, 4, 6, 3), np.uint8)
    names = ["train/cat/0.png", "train/cat/1.png", "train/ant/0.png", "test/cat/9.png", "test/ant/9.png"]
    write_images(tmp_path, dict(zip(names, pictures, strict=True)))
    data = load_data(f"folder:{tmp_path}")
    np.testing.assert_array_equal(data.x_train, pictures[[2, 0, 1]])
    np.testing.assert_array_equal(data.y_train, [0, 1, 1])
    np.testing.assert_array_equal(data.x_test, pictures[[4, 3]])
    assert data.x_train.shape[1:3] == (4, 6)


def test_a_folder_of_classes_is_split_80_to_20_in_every_class(tmp_path):
    grey = RNG.integers(0, 256, (20, 4, 4), np.uint8)
    write_images(tmp_path, {f"{'ab'[i % 2]}/{i:02}.png": image for i, image in enumerate(grey)})
    data = load_data("folder:" + tmp_path.name, tmp_path.parent)
    assert data.in_channels == 1
    assert (np.bincount(data.y_train).tolist(), np.bincount(data.y_test).tolist()) == ([8, 8], [2, 2])


def test_grey_and_colour_images_together_become_colour(tmp_path):
    write_images(tmp_path, {f"a/{i}.png": np.full((4, 4), 9, np.uint8) for i in range(5)})
    write_images(tmp_path, {f"b/{i}.png": np.full((4, 4, 3), 9, np.uint8) for i in range(5)})
    assert load_data(f"folder:{tmp_path}").x_train.shape == (8, 4, 4, 3)


def test_unequal_sizes_are_an_error_whose_remedy_works(tmp_path):
    write_images(tmp_path, {f"a/{i}.png": np.zeros((4 + i, 4), np.uint8) for i in range(5)})
    with pytest.raises(DataError, match="@SIZE"):
        load_data(f"folder:{tmp_path}")
    assert load_data(f"folder:{tmp_path}@8").x_train.shape == (4, 8, 8)


def blocks():
    """Four images [4, 6, 3] of uint8 whose quarters are of two values each, labels up to 2 of four classes."""
    quarters = np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3) * 5
    images = quarters.repeat(2, axis=1).repeat(3, axis=2)
    images[:, 0] += 2  # the upper of the two rows of every quarter above
    return ImageData(
        "blocks", images, np.array([0, 1, 2, 0]), images, np.array([0, 1, 2, 0]), 4, (0.5,) * 3, (0.2,) * 3
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_size_makes_every_pixel_the_mean_of_its_area(monkeypatch, dtype):
    module = types.ModuleType(f"blocks_{dtype.__name__}")
    big = blocks()
    module.load = lambda: replace(big, x_train=big.x_train.astype(dtype), x_test=big.x_test.astype(dtype))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    small = load_data(f"{module.__name__}:load@2")
    expected = np.arange(48).reshape(4, 2, 2, 3) * 5
    expected[:, 0] += 1
    assert small.x_train.dtype == dtype
    np.testing.assert_allclose(small.x_train, expected, rtol=1e-6)
    assert (small.num_classes, small.y_train.tolist()) == (4, [0, 1, 2, 0])
    assert small.mean == pytest.approx(expected.mean((0, 1, 2)) / (255 if dtype == np.uint8 else 1), rel=1e-6)


def test_grey_images_are_resized_too_and_the_original_is_left_as_it_was():
    small, whole = load_data("digits@4"), load_data("digits")
    assert (small.x_train.shape, whole.x_train.shape) == ((1437, 4, 4), (1437, 8, 8))
    halves = whole.x_test.reshape(360, 4, 2, 4, 2).astype(float).mean((2, 4))
    assert np.abs(small.x_test - halves).max() <= 0.5


def test_images_without_pixels_are_refused():
    with pytest.raises(DataError, match=r"digits@0.*0 pixels"):
        load_data("digits@0")


def test_a_folder_that_cannot_be_used_is_an_error_that_says_why(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_data("folder:none", tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="no images"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "a" / "0.png").write_text("no image")
    with pytest.raises(DataError, match="no image that can be read"):
        load_data(f"folder:{tmp_path}")
    Pillow.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "a" / "0.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        load_data(f"folder:{tmp_path}")


@pytest.mark.parametrize("parts", [("train", "val"), ("train",), ("train", "test", "val")])
def test_parts_of_an_image_folder_are_never_taken_for_classes(parts, tmp_path):
    images = [np.full((2, 2), level, np.uint8) for level in range(4)]
    for part in parts:
        write_images(tmp_path, {f"{part}/{name}/{i}.png": image for name in "ab" for i, image in enumerate(images)})
    if "test" in parts:
        assert load_data(f"folder:{tmp_path}").num_classes == 2
    else:
        with pytest.raises(DataError, match=f"{', '.join(parts)} would be taken for classes; call the parts train and"):
            load_data(f"folder:{tmp_path}")


def test_a_class_may_be_called_train(tmp_path):
    pixel = np.zeros((2, 2), np.uint8)
    write_images(tmp_path, {f"{name}/{i}.png": pixel + i for name in ("bus", "train") for i in range(5)})
    assert load_data(f"folder:{tmp_path}").num_classes == 2


def test_what_a_function_of_ones_own_raises_is_named_with_the_data_it_was_asked_for():
    with pytest.raises(DataError, match=r"data 'json:loads': the function raised TypeError: loads\(\) missing"):
        load_data("json:loads")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digitz", "Did you mean 'digits'"),
        ("npz:none.npz", "none.npz: does not exist"),
        ("folder:none", "none: does not exist"),
        ("folder:parts", "train would be taken for classes"),
        ("cifar10", "there is no folder cifar-10-batches-py"),
        ("npz:", "nothing follows the colon"),
        (":npz", "nothing stands before the colon"),
        ("hub:owner/set", r"hub:owner/set.*allow that with data\.download=true"),
    ],
)
def test_what_is_not_there_shows_before_anything_is_read(name, message, tmp_path):
    (tmp_path / "parts" / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=message):
        check_data(name, tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for good in ("digits", "digits@4", "cifar10", "package.module:function"):
        check_data(good, tmp_path)
    check_data("mnist", tmp_path, download=True)


def test_a_test_class_that_training_lacks_is_an_error(tmp_path):
    pixel = np.zeros((2, 2), np.uint8)
    write_images(tmp_path, {"train/a/0.png": pixel, "test/b/0.png": pixel})
    with pytest.raises(DataError, match="train lacks: b"):
        load_data(f"folder:{tmp_path}")


# --- the hub


class ImageColumn:
    pass


class ClassColumn:
    pass


class Rows(dict):
    features: dict[str, object]


@pytest.fixture
def hub(monkeypatch):
    """Stand-ins for flwr_datasets and datasets with one small data set; returns its splits."""
    splits: dict[str, Rows] = {}

    class FederatedDataset:
        def __init__(self, *, dataset: str, partitioners: dict[str, int]) -> None:
            if dataset != "owner/set":
                raise FileNotFoundError(f"{dataset} is not on the hub")

        def load_split(self, split: str) -> Rows:
            if split not in splits:
                raise ValueError(f"no split {split}")
            return splits[split]

    package = types.SimpleNamespace(FederatedDataset=FederatedDataset, __spec__=object())
    monkeypatch.setitem(sys.modules, "flwr_datasets", package)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(Image=ImageColumn, ClassLabel=ClassColumn))
    load_data.__globals__["_load"].cache_clear()
    return splits


def rows(images: np.ndarray, labels: np.ndarray) -> Rows:
    made = Rows(picture=[Pillow.fromarray(image) for image in images], kind=labels.tolist())
    made.features = {"id": object(), "picture": ImageColumn(), "kind": ClassColumn()}
    return made


def test_a_hub_set_is_read_by_the_types_of_its_columns(hub):
    made = arrays()
    hub["train"], hub["test"] = rows(made["x_train"], made["y_train"]), rows(made["x_test"], made["y_test"])
    data = load_data("hub:owner/set", download=True)
    for key, array in made.items():
        np.testing.assert_array_equal(getattr(data, key), array)


def test_a_hub_set_without_a_test_part_is_split(hub):
    made = arrays(20)
    hub["train"] = rows(made["x_train"], made["y_train"])
    data = load_data("hub:owner/set", download=True)
    assert (len(data.x_train), len(data.x_test)) == (16, 4)


def test_a_hub_set_that_cannot_be_used_is_an_error(hub):
    with pytest.raises(DataError, match="cannot be fetched"):
        load_data("hub:owner/none", download=True)
    hub["train"] = rows(arrays()["x_train"], arrays()["y_train"])
    hub["train"].features = {"text": object()}
    with pytest.raises(DataError, match="an image and a class column"):
        load_data("hub:owner/set", download=True)


def test_hub_images_of_unequal_sizes_are_an_error_whose_remedy_works(hub):
    images = [np.full((4 + i % 2, 6), 10 * i, np.uint8) for i in range(8)]
    hub["train"], hub["test"] = (
        rows(images, np.arange(8)),
        rows([images[0], np.full((9, 9, 3), 1, np.uint8)], np.arange(2)),
    )
    with pytest.raises(DataError, match=r"6x4 and of 6x5.*'hub:owner/set@32'"):
        load_data("hub:owner/set", download=True)
    hub["test"] = rows(images[:2], np.arange(2))
    data = load_data("hub:owner/set@8", download=True)
    assert (data.x_train.shape, data.x_test.shape) == ((8, 8, 8), (2, 8, 8))
    assert data.x_train[:, 0, 0].tolist() == list(range(0, 80, 10))


def test_nothing_is_fetched_from_the_hub_without_leave(hub):
    hub["train"] = rows(arrays()["x_train"], arrays()["y_train"])
    with pytest.raises(DataError, match=r"data\.download=true"):
        load_data("hub:owner/set")


@pytest.mark.parametrize("use", [load_data, check_data])
def test_the_hub_without_its_package_is_an_error_with_a_remedy(use, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(DataError, match="pip install 'flwr-datasets"):
        use("hub:owner/other", download=True)


# --- labels alone


def test_labels_are_read_without_the_images_where_they_lie_apart(tmp_path, monkeypatch):
    np.savez(tmp_path / "set.npz", **arrays())
    np.savez(tmp_path / "cifar10.npz", **arrays())
    whole = load_data("digits").y_train
    monkeypatch.setattr("fleet.data._image_data", lambda *_: pytest.fail("images were read"))
    for name in ("npz:set.npz", "npz:set.npz@8", "cifar10"):
        np.testing.assert_array_equal(train_labels(name, tmp_path), arrays()["y_train"])
    np.testing.assert_array_equal(train_labels("digits"), whole)
    for name in ("mnist", "folder:x", "hub:owner/set", "package.module:function"):
        assert train_labels(name, tmp_path) is None


# --- one's own function, and names


@pytest.fixture
def own_module(monkeypatch):
    module = types.ModuleType("own_data")
    monkeypatch.setitem(sys.modules, "own_data", module)
    load_data.__globals__["_load"].cache_clear()
    return module


def test_a_function_may_return_four_arrays_and_they_stay_writeable_for_their_owner(own_module):
    made = arrays()
    own_module.make = lambda: in_order(made)
    data = load_data("own_data:make")
    np.testing.assert_array_equal(data.x_test, made["x_test"])
    assert data.name == "own_data:make"
    made["x_test"][0] = 0


def test_a_function_may_return_an_image_data_whose_own_statistics_are_kept(own_module):
    own_module.make = lambda: ImageData("own", *in_order(arrays()), 7, (0.5,) * 3, (0.25,) * 3)
    data = load_data("own_data:make")
    assert (data.num_classes, data.mean, data.std) == (7, (0.5,) * 3, (0.25,) * 3)


def test_a_function_that_returns_something_else_is_an_error(own_module):
    own_module.make = lambda: "images"
    with pytest.raises(DataError, match="got str"):
        load_data("own_data:make")
    own_module.wrong = lambda: ImageData("own", *in_order(arrays()), 2, (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(DataError, match="do not fit"):
        load_data("own_data:wrong")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar-10", "Did you mean 'cifar10'"),
        ("digit", "Did you mean 'digits'"),
        ("no.such.module:make", "No module named"),
        ("math:make", "no attribute 'make'"),
        ("npz:", "nothing follows the colon"),
    ],
)
def test_a_name_that_cannot_be_served_is_an_error_that_says_what_would_be(name, expected):
    with pytest.raises(DataError, match=expected):
        load_data(name)


def test_a_data_error_is_a_fleet_error():
    assert issubclass(DataError, FleetError)
