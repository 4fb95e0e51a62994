"""What tells one network from another."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from fastdmd.networks.adapted import Adapted
from fastdmd.networks.identity import identity
from fastdmd.networks.weights import load_network, save_network
from fastdmd.shards import fill_parts
from tests.helpers.networks import SMALL, make_network


def test_it_is_that_of_the_file_and_of_every_layout(teacher, teacher_file):
    loaded, _ = load_network(teacher_file)
    contiguous = copy.deepcopy(teacher).to(memory_format=torch.contiguous_format)
    assert identity(loaded) == identity(teacher) == identity(contiguous)
    assert identity(copy.deepcopy(teacher).requires_grad_(True)) == identity(teacher)


def test_what_a_state_holds_beside_tensors_is_left_out():
    class Told(nn.Linear):
        told = None

        def get_extra_state(self):
            return self.told

    options = {"parameterization": "x0", "image_shape": (1, 8, 8), "num_classes": 0, "sigma_data": 0.5}
    found = set()
    for told in (None, {"version": 2}, b"bytes"):
        torch.manual_seed(0)
        network = Told(8, 8)
        network.told = told
        found.add(identity(Adapted(network, **options)))
    assert len(found) == 1


def test_files_have_tensors_alone(tmp_path):
    """What a module keeps besides is as its code makes it."""

    class Told(nn.Linear):
        told = "made"

        def get_extra_state(self):
            return {"told": self.told}

        def set_extra_state(self, state):
            self.told = state["told"]

    options = {"parameterization": "x0", "image_shape": (1, 8, 8), "num_classes": 0, "sigma_data": 0.5}
    save_network(tmp_path / "a.safetensors", Adapted(Told(8, 8), **options), kind="generator", conditioning_sigma=80.0)
    loaded, _ = load_network(tmp_path / "a.safetensors", network=Told(8, 8))
    assert loaded.network.told == "made"
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias". *\n.*Unexpected key.*"b"'):
        fill_parts(Told(8, 8), {"weight": torch.zeros(8, 8), "b": torch.zeros(8)})


def test_any_weight_and_any_option_makes_another(teacher):
    others = [make_network(seed=1), make_network(dataclasses.replace(SMALL, sigma_data=0.6))]
    for index in (0, 7, -1):
        other = copy.deepcopy(teacher)
        parameter = list(other.parameters())[index].data
        parameter[(-1,) * parameter.dim()] += 1e-3
        others.append(other)
    found = {identity(network) for network in (teacher, *others)}
    assert len(found) == len(others) + 1
