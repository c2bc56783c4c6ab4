"""Data of others: the hub, functions of one's own, and names that cannot be served."""

import sys
import types

import numpy as np
import pytest
from PIL import Image as Pillow

from fleet.data import DataError, ImageData, load_data
from fleet.names import FleetError
from tests.fleet.test_data import arrays, in_order

RNG = np.random.default_rng(0)


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

    monkeypatch.setitem(sys.modules, "flwr_datasets", types.SimpleNamespace(FederatedDataset=FederatedDataset))
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
    data = load_data("hub:owner/set")
    for key, array in made.items():
        np.testing.assert_array_equal(getattr(data, key), array)


def test_a_hub_set_without_a_test_part_is_split(hub):
    made = arrays(20)
    hub["train"] = rows(made["x_train"], made["y_train"])
    data = load_data("hub:owner/set")
    assert (len(data.x_train), len(data.x_test)) == (16, 4)


def test_a_hub_set_that_cannot_be_used_is_an_error(hub):
    with pytest.raises(DataError, match="cannot be fetched"):
        load_data("hub:owner/none")
    hub["train"] = rows(arrays()["x_train"], arrays()["y_train"])
    hub["train"].features = {"text": object()}
    with pytest.raises(DataError, match="an image and a class column"):
        load_data("hub:owner/set")


def test_the_hub_without_its_package_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(DataError, match="pip install 'flwr-datasets"):
        load_data("hub:owner/other")


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
