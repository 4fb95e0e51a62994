"""What users do to a network that AdamWEMA has: as with AdamW, or an error at the next step."""

import copy
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from fastdmd.optim import AdamWEMA
from tests.helpers.optimizers import adamw, assert_alike, loss_of, network, pair, train


def replace(net):
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())


def transpose(net):
    net[2].bias.data = net[2].bias.data.flip(0)


MOVES = {
    "double": lambda opt: opt.network.double(),
    "half": lambda opt: opt.network.half(),
    "there and back": lambda opt: [opt.network.double().float() for _ in range(20)],
    "a part in double": lambda opt: opt.network[2].double(),
    "channels_last": lambda opt: opt.network.to(memory_format=torch.channels_last),
    "another device": lambda opt: opt.network.to("meta"),
    "to_empty": lambda opt: opt.network.to_empty(device="cpu"),
    "a second AdamWEMA": lambda opt: AdamWEMA(opt.network.float(), learning_rate=0.1),
    "load_state_dict(assign=True)": lambda opt: opt.network.load_state_dict(network().state_dict(), assign=True),
    "another parameter": lambda opt: replace(opt.network),
    "another .data": lambda opt: transpose(opt.network),
    "vector_to_parameters": lambda opt: nn.utils.vector_to_parameters(torch.ones(467), opt.network.parameters()),
    "the average in double": lambda opt: opt.ema_network.double(),
    "the average replaced": lambda opt: replace(opt.ema_network),
    "share_memory": lambda opt: opt.network.share_memory(),
    "the average shared": lambda opt: opt.ema_network.share_memory(),
    "a queue of processes": lambda opt: ForkingPickler.dumps(opt.network.state_dict()),
    "another head": lambda opt: opt.network.__setitem__(2, nn.Conv2d(8, 5, 3)),
    "a head removed": lambda opt: opt.network.__delitem__(2),
    "the average's head": lambda opt: opt.ema_network.__setitem__(2, nn.Conv2d(8, 5, 3)),
    "pruning": lambda opt: nn.utils.parametrizations.weight_norm(opt.network[0]),
}


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("move", MOVES)
def test_what_moves_parameters_raises_at_the_next_step(move, compute_dtype):
    optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=0.9, compute_dtype=compute_dtype)
    train(optimizer, num_steps=1)
    before = copy.deepcopy(optimizer.state_dict()["param"])
    MOVES[move](optimizer)
    message = r"fastdmd.AdamWEMA: expected \d\.(weight|bias)( of ema_network)? where the optimizer put it, got it moved"
    loss = torch.ones((), requires_grad=True)
    for step in (
        optimizer.step,
        optimizer.advance,
        optimizer.zero_grad,
        lambda: optimizer.backward(loss),
        lambda: copy.deepcopy(optimizer),
    ):
        with pytest.raises(ValueError, match=message):
            step()
    assert optimizer.num_updates == 1
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state_dict()["param"].items())


OTHER_STRUCTURE = {
    "a module appended": (lambda net: net.append(nn.Conv2d(3, 3, 1)), "5 of the Sequential added"),
    "a module without parameters": (lambda net: net.__setitem__(3, nn.ReLU()), "3 of the Sequential added, removed or"),
    "a parameter added": (lambda net: net[0].register_parameter("gain", nn.Parameter(torch.ones(1))), "0.gain of the"),
    "a fixed one replaced": (lambda net: setattr(net[1], "weight", nn.Parameter(torch.ones(8))), "1.weight of the"),
    "a tie cut": (lambda net: setattr(net[4], "bias", nn.Parameter(torch.ones(8))), "4.bias of the Sequential"),
}


@pytest.mark.parametrize("kind", OTHER_STRUCTURE)
def test_other_modules_and_parameters_raise_at_the_next_step(kind):
    """Nothing would train them, and the average would be one of another network."""
    net = network().extend([nn.SiLU(), nn.Conv2d(3, 8, 1)])
    net[1].weight.requires_grad_(False)
    net[4].bias = net[0].bias
    optimizer = AdamWEMA(net, learning_rate=0.1, ema_decay=0.9)
    train(optimizer)
    change, message = OTHER_STRUCTURE[kind]
    change(net)
    for step in (optimizer.step, optimizer.advance, optimizer.zero_grad, lambda: copy.deepcopy(optimizer)):
        with pytest.raises(ValueError, match="expected modules and parameters as at construction, got " + message):
            step()
    assert optimizer.num_updates == 2


def test_removed_parametrizations_raise():
    net = network()
    nn.utils.parametrizations.weight_norm(net[0])
    optimizer = AdamWEMA(net, learning_rate=0.1)
    train(optimizer)
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    with pytest.raises(ValueError, match="expected 0.parametrizations.weight.original0 where the optimizer put it"):
        optimizer.step()


def test_shared_gradients_are_collected():
    """What `share_memory_` does to them: they keep their storage, and its memory is another."""
    optimizer, reference, (net, other) = pair()
    for _ in range(2):
        loss_of(net).backward()
        for parameter in net.parameters():
            parameter.grad.share_memory_()
        optimizer.step()
        train(reference, other, 1)
    assert_alike(net, other)


def test_what_moves_nothing_is_allowed():
    optimizer, reference, (net, other) = pair(ema_decay=0.9)
    net.to("cpu").float().to(memory_format=torch.contiguous_format).eval().train()
    copy.deepcopy(net).double()
    net.zero_grad(), optimizer.ema_network.requires_grad_(True)
    train(optimizer), train(reference, other)
    assert_alike(net, other)


def test_changed_flags_raise():
    optimizer = AdamWEMA(network(), learning_rate=0.1)
    optimizer.network[1].requires_grad_(False)
    with pytest.raises(ValueError, match="expected requires_grad of 1.weight as at construction, True, got False"):
        optimizer.step()
    net = network()
    net[0].requires_grad_(False)
    optimizer = AdamWEMA(net, learning_rate=0.1)
    net[0].requires_grad_(True)
    with pytest.raises(ValueError, match="expected requires_grad of 0.weight as at construction, False, got True"):
        optimizer.step()


def test_torch_adamw_over_the_same_parameters_moves_them_too():
    optimizer, reference, (net, other) = pair()
    second, both = adamw(net, lr=0.03), adamw(other, lr=0.03)
    for step in (optimizer, second, reference, both):
        train(step, net if step in (optimizer, second) else other)
    assert_alike(net, other, rtol=1e-4, atol=1e-5)
