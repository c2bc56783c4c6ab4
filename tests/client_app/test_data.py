"""A client's examples as tensors."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from client_app.batches import flip_shift
from client_app.data import examples_of
from fleet.data import ImageData, load_data


def test_colour_images_and_their_batches_lie_channels_last():
    x, y = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 10
    data = ImageData("own", x, y, x[:0], y[:0], 10, (0.5,) * 3, (0.25,) * 3)
    examples = examples_of(data, data.x_train, data.y_train, np.arange(1, 20, 2))
    batch, labels = examples.batch(torch.tensor([3, 0, 4, 1]))
    assert labels.tolist() == [7, 1, 9, 3]
    torch.testing.assert_close(batch[0, 2], (torch.from_numpy(x[7, :, :, 2]) / 255 - 0.5) / 0.25)
    for images in (examples.x, batch, flip_shift(batch, torch.Generator())):
        assert images.stride(1) == 1


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3)])
def test_batches_of_all_examples_have_mean_0_and_std_1_in_every_channel(shape, kind, monkeypatch):
    rng = np.random.default_rng(1)
    x, y = (rng.random((50, *shape)) * 200).astype(kind), np.arange(50) % 10
    module = types.ModuleType(f"own_{kind.__name__}_{'_'.join(map(str, shape))}")
    module.load = lambda: (x, y, x, y)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    data = load_data(f"{module.__name__}:load")
    batch, _ = examples_of(data, data.x_train, data.y_train).batch(slice(None))
    assert (batch.shape, batch.dtype) == ((50, shape[2] if len(shape) == 3 else 1, 6, 5), torch.float32)
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(batch.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(batch.shape[1]), atol=1e-5, rtol=0)
