"""A teacher whose labels are emphasized before it is distilled, and that is measured as it came."""

import copy
import dataclasses

import pytest
import torch

from fastdmd import teachers
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig
from tests.helpers import foreign
from tests.helpers.networks import SMALL, make_network


def test_all_networks_start_from_the_emphasized_teacher():
    teacher = make_network()
    before = copy.deepcopy(teacher.state_dict())
    model = distillation.build(TrainConfig(batch_size=4).replace(label_emphasis=0.5), teacher)
    weight = before["map_label.weight"]
    mean = weight.mean(1, keepdim=True)
    for network in (model.teacher, model.generator, model.fake_score, model.average):
        found = network.state_dict()
        torch.testing.assert_close(found.pop("map_label.weight"), mean + 0.5 * (weight - mean))
        assert all(torch.equal(value, before[name]) for name, value in found.items())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_without_known_embeddings_it_is_refused():
    unconditional = make_network(dataclasses.replace(SMALL, num_classes=0))
    with pytest.raises(ValueError, match="expected a class-conditional network, got an unconditional one"):
        distillation.build(TrainConfig(batch_size=4).replace(label_emphasis=2.0), unconditional)
    other = teachers.load(foreign.build, parameterization="x0")
    with pytest.raises(ValueError, match="expected class embeddings that are known, got a"):
        distillation.build(TrainConfig(batch_size=4).replace(label_emphasis=2.0), other)
