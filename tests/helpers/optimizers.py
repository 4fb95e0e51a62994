"""What the tests of the optimizer share: a network, torch's loop, and AdamW beside AdamWEMA."""

import io

import torch
from torch import nn

from fastdmd.optim import AdamWEMA

LOW = [torch.bfloat16, torch.float16]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3)).to(dtype)


def images(dtype=torch.float32):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(net):
    return net(images(next(net.parameters()).dtype)).float().square().mean()


def train(optimizer, net=None, num_steps=2):
    """torch's loop."""
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_of(net or optimizer.network).backward()
        norm = optimizer.step()
    return norm


def adamw(net, **options):
    return torch.optim.AdamW(net.parameters(), **{"lr": 1e-2, **options})


def pair(change=lambda net: None, **options):
    """AdamWEMA and AdamW, each over its own of two equal networks."""
    nets = network(), network()
    for net in nets:
        change(net)
    return AdamWEMA(nets[0], learning_rate=1e-2, **options), adamw(nets[1]), nets


def assert_alike(net, other, **tolerance):
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda message, name=name: f"{name}: {message}", **tolerance)


def assert_moved(net, start):
    assert all(not torch.equal(a, b) for a, b in zip(net.parameters(), start.parameters(), strict=True))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file
