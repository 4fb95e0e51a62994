"""What users do to a network that AdamWEMA has: as with AdamW, or an error at the next step."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from fastdmd.optim import AdamWEMA
from tests.helpers.optimizers import LOW, adamw, assert_alike, assert_moved, loss_of, network, pair, saved, train

# What comes after construction.


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
        optimizer.step, optimizer.advance, optimizer.zero_grad, lambda: optimizer.backward(loss),
        lambda: copy.deepcopy(optimizer),
    ):  # fmt: skip
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


# Weights that change in place are taken over.


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


# Copies.


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


def test_a_copy_takes_changed_weights_along():
    optimizer = AdamWEMA(network(), learning_rate=0.0, weight_decay=0.0, compute_dtype=torch.bfloat16)
    nn.init.constant_(optimizer.network[0].weight, 0.5)
    assert optimizer.state_dict()["param"]["0.weight"].eq(0.5).all()
    nn.init.constant_(optimizer.network[0].weight, 0.75)
    other = copy.deepcopy(optimizer)
    train(other)
    assert other.network[0].weight.eq(0.75).all()


def test_gradients_whose_data_was_replaced_count():
    optimizer, reference, (net, other) = pair()
    for step, module in ((optimizer, net), (reference, other)):
        for _ in range(2):
            loss_of(module).backward()
            for parameter in module.parameters():
                for _ in range(20):
                    parameter.grad.data = 2 * parameter.grad.data.sign()
            step.step()
            step.zero_grad()
    assert_alike(net, other)


# Which parameters.


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
