"""Pictures of samples, whatever the number of their channels."""

import numpy as np
import torch
from PIL import Image

from fastdmd.runs import pictures


def test_pictures_of_any_number_of_channels(tmp_path):
    """Grey and RGB as they are; channels of a latent space side by side."""
    for channels, mode, width in ((1, "L", 4), (2, "L", 8), (3, "RGB", 4), (4, "L", 16), (16, "L", 64)):
        images = torch.linspace(-1, 1, 2 * channels * 16).reshape(2, channels, 4, 4)
        picture = pictures.image_grid(images, 2)
        assert (picture.mode, picture.size) == (mode, (2 * width + 1, 4))
    latent = torch.stack([torch.full((4, 4), value) for value in (-1.0, 0.0, 1.0, 2.0)])[None]
    assert np.asarray(pictures.image_grid(latent, 1))[0, ::4].tolist() == [0, 128, 255, 255]
    history = pictures.SampleHistory(tmp_path / "samples.png")
    history.add(torch.zeros(2, 3, 5, 4, 4))
    assert Image.open(tmp_path / "samples.png").mode == "L"
