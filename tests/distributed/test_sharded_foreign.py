"""Somebody's network of which each process has a part."""

import copy

import torch
from torch import nn

from fastdmd.networks.adapted import Adapted
from fastdmd.shards import Sharding
from tests.helpers.gloo import in_processes


def of_somebodys_network(group):
    """Whose first parameter is gathered by itself, and still in float32 when the network is asked for its precision."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))
    options = {"parameterization": "x0", "image_shape": (1, 8, 8), "num_classes": 0, "sigma_data": 0.5}
    network = Adapted(Unconditional(layers), **options).eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    expected = copy.deepcopy(network).to(torch.bfloat16)(x, sigma)
    found = Sharding(network, group).cut_(network, compute_dtype=torch.bfloat16)(x, sigma)
    return found.detach(), expected.detach()


class Unconditional(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, level):
        return self.layers(x)


def test_a_network_of_somebodys_computes_in_the_precision_that_it_is_gathered_in(tmp_path):
    for found, expected in in_processes(2, of_somebodys_network, tmp_path):
        torch.testing.assert_close(found, expected)
