"""Files that version 0.1.0 wrote while the package was flat: weights, ours and adapted, and a network pickled whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastdmd import load_generator, sample

GOLDEN = Path(__file__).parents[1] / "golden"


class Network(nn.Module):
    """The code that is not in the file of the adapted network."""

    def __init__(self):
        super().__init__()
        self.mix, self.level, self.label = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(1, 1), nn.Linear(3, 1)

    def forward(self, x, level, labels):
        return self.mix(x) + (self.level(level.log1p()[:, None]) + self.label(labels))[:, :, None, None]


@pytest.fixture
def images():
    """Noise, labels, and the images that either generator made of them then."""
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "former_images.npz").items()}


@pytest.mark.parametrize(("name", "code"), [("unet", None), ("adapted", Network)])
def test_generators_make_the_images_that_they_made(images, name, code):
    generator = load_generator(GOLDEN / f"former_{name}.safetensors", network=code)
    torch.testing.assert_close(generator(images["noise"], images["labels"]), images[name], rtol=1e-5, atol=1e-5)


def test_a_network_pickled_whole_is_found_where_it_is_now(images):
    """In a process of its own, where nothing has been imported yet; an old path names a module that moved."""
    code = f"""
import torch, warnings
warnings.simplefilter("ignore", DeprecationWarning)
network = torch.load({str(GOLDEN / "former_unet.pt")!r}, weights_only=False)
assert type(network).__module__ == "fastdmd.networks.unet" and network.is_one_graph
noise, labels = torch.tensor({images["noise"].tolist()}), torch.tensor({images["labels"].tolist()})
with torch.no_grad():
    images = network(noise * 80, torch.full((2,), 80.0), labels)
print((images - torch.tensor({images["unet"].tolist()})).abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4


def test_a_command_takes_them(tmp_path):
    sample.main([str(GOLDEN / "former_unet.safetensors"), "--num", "3", "--out", str(tmp_path / "images.npz")])
    assert np.load(tmp_path / "images.npz")["images"].shape == (3, 8, 8, 1)
