"""Weights that a user changes in place are taken over by AdamWEMA."""

import pytest
import torch
from torch import nn

from fastdmd.optim import AdamWEMA
from tests.helpers.optimizers import LOW, loss_of, network, train

CHANGES = {
    "load_state_dict": lambda net, values: net.load_state_dict(values),
    "initialisation": lambda net, values: [nn.init.constant_(p, 0.375) for p in net.parameters()],
    "in place": lambda net, values: [p.detach().mul_(3).add_(1) for p in net.parameters()],
    "one element": lambda net, values: net[0].weight.detach()[0, 0, 0, 0].fill_(7.0),
    "clipped weights": lambda net, values: [p.detach().clamp_(-0.01, 0.01) for p in net.parameters()],
}


@pytest.mark.parametrize("compute_dtype", [None, *LOW], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_in_place_stay(change, compute_dtype):
    values = {name: torch.full_like(value, 1.5) for name, value in network().state_dict().items()}
    optimizer = AdamWEMA(network(), learning_rate=0.0, weight_decay=0.0, compute_dtype=compute_dtype)
    net = optimizer.network
    for route in (optimizer.step, lambda: (optimizer.advance(), optimizer.update())):
        loss_of(net).backward()
        route()
        CHANGES[change](net, values)
        expected = [p.detach().clone() for p in net.parameters()]
        loss_of(net).backward()
        route()
        for parameter, value, master in zip(
            net.parameters(), expected, optimizer.state_dict()["param"].values(), strict=True
        ):
            assert torch.equal(parameter, value) and torch.equal(master.to(value.dtype), value)


def test_equal_weights_keep_the_digits_of_their_masters():
    optimizer = AdamWEMA(network(), learning_rate=0.0, weight_decay=0.0, compute_dtype=torch.bfloat16)
    exact = {name: p.detach().clone() for name, p in network().named_parameters()}
    assert not torch.equal(exact["0.weight"], exact["0.weight"].bfloat16().float())
    optimizer.network.load_state_dict(optimizer.network.state_dict())
    train(optimizer)
    for name, value in optimizer.state_dict()["param"].items():
        assert torch.equal(value, exact[name])
