"""What options and a network come to: nothing left open, the same from a file; and what networks say of themselves."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastdmd.networks.adapted import Adapted
from fastdmd.networks.options import AdapterOptions
from fastdmd.networks.weights import save_network
from tests.helpers.networks import make_network
from tests.networks.test_adapted import SHAPE, Tiny

ALWAYS = {"parameterization", "image_shape", "num_classes", "labels", "sigma_data"}
NAMED = {"noise_schedule", "num_train_timesteps", "timesteps"}


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({"parameterization": "x0"}, set()),
        ({"parameterization": "x0", "noise_schedule": "cosine"}, NAMED),
        ({"parameterization": "edm"}, set()),
        ({"parameterization": "epsilon", "num_train_timesteps": 7}, NAMED | {"beta_start", "beta_end"}),
        ({"parameterization": "v", "alphas_cumprod": [0.9, 0.5, 0.1]}, {"alphas_cumprod", "timesteps"}),
        ({"parameterization": "flow"}, {"velocity", "time_scale", "time_direction"}),
    ],
)
def test_an_interface_leaves_nothing_open_and_is_made_again_from_what_a_file_holds(options, stated):
    network = Adapted(Tiny(), **options, **SHAPE)
    values = {field.name: getattr(network.interface, field.name) for field in dataclasses.fields(network.interface)}
    assert None not in values.values() and None not in network.interface.stated.values()
    assert network.interface.stated.keys() == ALWAYS | stated
    kept = json.loads(json.dumps(network.describe()))["options"]
    assert AdapterOptions(**kept).resolve(nn.Identity()) == network.interface
    length = {"x0": 1000 if stated else 0, "epsilon": 7, "v": 3}.get(options["parameterization"], 0)
    assert len(network.interface.alphas_cumprod) == len(network.ln_sigmas) == length
    assert network.sigma_max == (network.ln_sigmas[-1].exp().item() if length else math.inf)


def test_networks_say_of_themselves_what_others_need(tmp_path):
    """Ours and anybody's: description, tensors, layout, and whether code that is not ours runs in it."""
    ours = make_network().to(memory_format=torch.contiguous_format)
    assert ours.describe() == dataclasses.asdict(ours.config) and ours.inner is ours
    assert ours.foreign_name == "" and ours.is_one_graph and ours.parameterization == "edm"
    assert ours.in_best_layout() is ours
    assert ours.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    theirs = Adapted(Tiny(), parameterization="v", **SHAPE)
    weight = theirs.network.conv_in.weight
    assert theirs.inner is theirs.network and theirs.foreign_name == "Tiny" and not theirs.is_one_graph
    assert theirs.in_best_layout() is theirs and theirs.network.conv_in.weight.stride() == weight.stride()
    for network in (ours, theirs):
        save_network(tmp_path / "w.safetensors", network, kind="teacher")
        assert load_file(tmp_path / "w.safetensors").keys() == network.inner.state_dict().keys()
