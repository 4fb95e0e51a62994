"""Groups of parameters, with rates and decays of their own."""

import copy

import pytest
import torch

from fastdmd.optim import AdamWEMA
from tests.helpers.optimizers import network, train

OPTIONS = dict(learning_rate=1e-2, max_grad_norm=0.1, ema_decay=0.9)


def test_groups_that_differ_in_nothing_change_nothing():
    one, two = (AdamWEMA(network(), groups=g, **OPTIONS) for g in (None, {"bias": {"weight_decay": 0.01}}))
    torch.testing.assert_close(train(one, num_steps=3), train(two, num_steps=3))
    for name, parameter in one.network.named_parameters():
        torch.testing.assert_close(parameter, dict(two.network.named_parameters())[name], rtol=1e-5, atol=1e-6)


def test_groups_have_their_own_rate_and_decay():
    groups = {r"^0\.": {"learning_rate_factor": 0.0}, "bias": {"weight_decay": 0.5}}
    optimizer, plain = AdamWEMA(network(), groups=groups, **OPTIONS), AdamWEMA(network(), **OPTIONS)
    start = network()
    train(optimizer, num_steps=1), train(plain, num_steps=1)
    assert torch.equal(optimizer.network[0].weight, start[0].weight)
    assert not torch.equal(plain.network[0].weight, start[0].weight)
    assert not torch.equal(optimizer.network[2].weight, start[2].weight)
    decayed = plain.network[2].bias - 1e-2 * (0.5 - 0.01) * start[2].bias
    torch.testing.assert_close(optimizer.network[2].bias, decayed, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected groups with weight_decay or learning_rate_factor, got"):
        AdamWEMA(network(), groups={"bias": {"lr": 1.0}}, **OPTIONS)


def test_one_gradient_that_is_not_finite_stops_all_groups():
    optimizer = AdamWEMA(network(), groups={"bias": {}}, **OPTIONS)
    before = copy.deepcopy(optimizer.state_dict()["param"])
    optimizer.network[0].bias.grad[0] = float("nan")
    assert optimizer.step().isnan()
    for name, value in optimizer.state_dict()["param"].items():
        assert torch.equal(value, before[name])
    assert all(p.grad.eq(0).all() for p in optimizer.network.parameters())
