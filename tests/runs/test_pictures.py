"""Pictures of samples, whatever the number of their channels."""

import numpy as np
import torch
from PIL import Image

from fastdmd import ops
from fastdmd.randomness import Stream, normals
from fastdmd.runs import pictures
from fastdmd.sampling import Generator
from tests.helpers.networks import make_network


def test_pictures_of_any_number_of_channels(tmp_path):
    """Grey and RGB as they are; channels of a latent space side by side."""
    for channels, mode, width in ((1, "L", 4), (2, "L", 8), (3, "RGB", 4), (4, "L", 16), (16, "L", 64)):
        images = torch.linspace(-1, 1, 2 * channels * 16).reshape(2, channels, 4, 4)
        picture = pictures.image_grid(images, 2)
        assert (picture.mode, picture.size) == (mode, (2 * width + 1, 4))
    latent = torch.stack([torch.full((4, 4), value) for value in (-1.0, 0.0, 1.0, 2.0)])[None]
    assert np.asarray(pictures.image_grid(latent, 1))[0, ::4].tolist() == [0, 128, 255, 255]
    history = pictures.SampleHistory(tmp_path / "samples.png")
    history.add(torch.zeros(2, 3, 5, 4, 4), 0)
    assert Image.open(tmp_path / "samples.png").mode == "L"


def test_a_sheet_has_the_same_noise_throughout_a_run():
    """A row for each class, of a stream of random numbers that nothing else draws from."""
    network = make_network()
    sheet = pictures.SampleSheet(network, 7, torch.device("cpu"))
    noise = normals((110, *network.image_shape), ops.rng_key(7, stream=Stream.PICTURE_NOISE)).unflatten(0, (10, 11))
    images = sheet.of(Generator(network, (80.0,)))
    for label in range(10):
        one_class = network(80 * noise[label], torch.full((11,), 80.0), torch.full((11,), label))
        torch.testing.assert_close(images[label], one_class, rtol=1e-4, atol=1e-5)
