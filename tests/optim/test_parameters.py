"""Which parameters AdamWEMA trains: fixed, sliced, tied and unused ones, and those that share memory."""

import copy

import pytest
import torch
from torch import nn

from fastdmd.optim import AdamWEMA
from tests.helpers.optimizers import adamw, assert_alike, assert_moved, loss_of, network, pair, train


def test_fixed_parameters_neither_decay_nor_count():
    def freeze(net):
        net[0].weight.requires_grad_(False)
        net[1].requires_grad_(False)

    optimizer, reference, (net, other) = pair(freeze, ema_decay=0.5)
    start = network()
    train(optimizer), train(reference, other)
    assert_alike(net, other)
    assert torch.equal(net[0].weight, start[0].weight) and torch.equal(net[1].bias, start[1].bias)
    assert set(optimizer.state_dict()["param"]) == {"0.bias", "2.weight", "2.bias"}


class Slices(nn.Module):
    """Two interleaved halves and one row block of larger tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        whole, rows = torch.randn(4, 6), torch.randn(6, 3)
        self.even, self.odd = nn.Parameter(whole[:, ::2]), nn.Parameter(whole[:, 1::2])
        self.rows = nn.Parameter(rows[2:4])

    def forward(self, x):
        return (x[:, 0, 0, :3] @ self.even.T).sum() + (self.odd * self.rows.sum()).square().sum()


def test_slices_of_larger_tensors_are_parameters_like_others():
    nets = Slices(), Slices()
    optimizer, reference = AdamWEMA(nets[0], learning_rate=1e-2), adamw(nets[1])
    start = Slices()
    for net, other in ((nets[0], start), (nets[1], start)):
        assert_alike(net, other, rtol=0, atol=0)
    train(optimizer, nets[0]), train(reference, nets[1])
    assert_alike(*nets)
    assert_moved(nets[0], start)


def test_tied_parameters_move_once():
    def tie(net):
        net[2].bias = net[0].bias = nn.Parameter(torch.full((8,), 0.5))
        net[2].weight = nn.Parameter(torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(2)))

    optimizer, reference, (net, other) = pair(tie, ema_decay=0.5)
    train(optimizer), train(reference, other)
    assert_alike(net, other)
    assert net[0].bias is net[2].bias and optimizer.ema_network[0].bias is optimizer.ema_network[2].bias


def shared(kind):
    net = network()
    if kind == "the same memory":
        net[1].weight = nn.Parameter(net[0].bias.data)
    elif kind == "overlapping slices":
        memory = torch.randn(12)
        net[1].weight, net[1].bias = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])
    elif kind == "a buffer":
        net.register_buffer("all_biases", net[0].bias.data)
    elif kind == "a fixed parameter":
        net[1].weight = nn.Parameter(net[0].bias.data, requires_grad=False)
    else:
        net[0].bias = nn.Parameter(torch.zeros(1).expand(8))
    return net


@pytest.mark.parametrize(
    "kind", ["the same memory", "overlapping slices", "a buffer", "a fixed parameter", "an expanded one"]
)
def test_shared_memory_is_refused(kind):
    """AdamW would update the other tensor too; a parameter that has moved would not."""
    net = shared(kind)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="expected parameters that share no memory .*, got .+ and .+"):
        AdamWEMA(net, learning_rate=0.1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = network(), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_parameters_without_gradient():
    """None raises, before anything has moved; zero is zero, as with AdamW."""
    torch.manual_seed(0)
    net = Unused()
    other, start = copy.deepcopy(net), copy.deepcopy(net)
    optimizer, reference = AdamWEMA(net, learning_rate=1e-2), adamw(other)
    for clear in (optimizer.zero_grad, net.zero_grad):
        clear()
        loss_of(net).backward()
        for step in (optimizer.step, optimizer.update):
            with pytest.raises(ValueError, match="expected a gradient of unused.weight, got none"):
                step()
        assert optimizer.num_updates == 0
    assert_alike(net, start, rtol=0, atol=0)
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step, module in ((optimizer, net), (reference, other)):
        for _ in range(2):
            step.zero_grad(set_to_none=False)
            loss_of(module).backward()
            step.step()
    assert_alike(net, other)
    optimizer.zero_grad()
    optimizer.backward(loss_of(net))
    assert net.unused.weight.grad.eq(0).all() and net.used[0].weight.grad.norm() > 0
