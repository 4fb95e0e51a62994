"""Copies of AdamWEMA, and of what owns one, move networks of their own."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastdmd.optim import AdamWEMA
from tests.helpers.optimizers import assert_alike, assert_moved, loss_of, network, saved, train

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "torch.save": lambda opt: torch.load(saved(opt), weights_only=False),
    "deepcopy of its owner": lambda opt: copy.deepcopy({"network": opt.network, "optimizer": opt})["optimizer"],
}


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_moves_its_own_network(way, compute_dtype):
    """Even where a scheduler has hung a wrapper on the original's `step`; and then it goes on as the original does."""
    optimizer = AdamWEMA(network(), learning_rate=1e-2, ema_decay=0.9, compute_dtype=compute_dtype)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    train(optimizer)
    start = copy.deepcopy(optimizer.network)
    other = COPIES[way](optimizer)
    assert other.network is not optimizer.network and other.num_updates == 2
    train(other)
    assert_alike(optimizer.network, start)
    assert_moved(other.network, start)
    train(optimizer)
    assert_alike(optimizer.network, other.network, rtol=0, atol=0)
    assert_alike(optimizer.ema_network, other.ema_network, rtol=0, atol=0)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_the_gradients_that_are_there(way):
    """Those of a batch that was rejected by `zero_grad()` are not: they would be added to the next ones."""
    optimizer = AdamWEMA(network(), learning_rate=1e-2)
    for is_rejected in (True, False):
        optimizer.backward(loss_of(optimizer.network))
        expected = [parameter.grad.clone() for parameter in optimizer.network.parameters()]
        if is_rejected:
            optimizer.zero_grad()
            expected = [torch.zeros_like(grad) for grad in expected]
        other = COPIES[way](optimizer)
        for parameter, own, grad in zip(
            optimizer.network.parameters(), other.network.parameters(), expected, strict=True
        ):
            assert (parameter.grad is None) == is_rejected and torch.equal(own.grad, grad)
        loss_of(other.network).backward()
        found = [parameter.grad.clone() for parameter in other.network.parameters()]
        optimizer.zero_grad()
        loss_of(optimizer.network).backward()
        for parameter, own, before in zip(optimizer.network.parameters(), found, expected, strict=True):
            torch.testing.assert_close(own, parameter.grad + before)


def test_a_copy_takes_changed_weights_along():
    optimizer = AdamWEMA(network(), learning_rate=0.0, weight_decay=0.0, compute_dtype=torch.bfloat16)
    nn.init.constant_(optimizer.network[0].weight, 0.5)
    assert optimizer.state_dict()["param"]["0.weight"].eq(0.5).all()
    nn.init.constant_(optimizer.network[0].weight, 0.75)
    other = copy.deepcopy(optimizer)
    train(other)
    assert other.network[0].weight.eq(0.75).all()
