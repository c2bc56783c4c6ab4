"""A client's examples as tensors."""

from __future__ import annotations

import numpy as np
import torch

from client_app.batches import flip_shift
from client_app.data import examples_of
from fleet.data import ImageData


def test_colour_images_and_their_batches_lie_channels_last():
    x, y = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 10
    data = ImageData("own", x, y, x[:0], y[:0], 10, (0.5,) * 3, (0.25,) * 3)
    examples = examples_of(data, data.x_train, data.y_train, np.arange(1, 20, 2))
    batch, labels = examples.batch(torch.tensor([3, 0, 4, 1]))
    assert labels.tolist() == [7, 1, 9, 3]
    torch.testing.assert_close(batch[0, 2], (torch.from_numpy(x[7, :, :, 2]) / 255 - 0.5) / 0.25)
    for images in (examples.x, batch, flip_shift(batch, torch.Generator())):
        assert images.stride(1) == 1
