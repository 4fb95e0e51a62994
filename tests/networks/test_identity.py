"""What tells one network from another."""

import copy
import dataclasses

import torch

from fastdmd.networks.identity import identity
from fastdmd.networks.weights import load_network
from tests.helpers.networks import SMALL, make_network


def test_it_is_that_of_the_file_and_of_every_layout(teacher, teacher_file):
    loaded, _ = load_network(teacher_file)
    contiguous = copy.deepcopy(teacher).to(memory_format=torch.contiguous_format)
    assert identity(loaded) == identity(teacher) == identity(contiguous)
    assert identity(copy.deepcopy(teacher).requires_grad_(True)) == identity(teacher)


def test_any_weight_and_any_option_makes_another(teacher):
    others = [make_network(seed=1), make_network(dataclasses.replace(SMALL, sigma_data=0.6))]
    for index in (0, 7, -1):
        other = copy.deepcopy(teacher)
        parameter = list(other.parameters())[index].data
        parameter[(-1,) * parameter.dim()] += 1e-3
        others.append(other)
    found = {identity(network) for network in (teacher, *others)}
    assert len(found) == len(others) + 1
