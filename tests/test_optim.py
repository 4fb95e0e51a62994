"""AdamWEMA where users treat it as one of torch's optimizers, and where they treat its network as any module."""

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdmd import ops
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


# What comes after construction: as with AdamW, or an error at the next step.


def replace(net):
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())


def transpose(net):
    net[2].bias.data = net[2].bias.data.flip(0)


MOVES = {
    "double": lambda opt: opt.network.double(),
    "half": lambda opt: opt.network.half(),
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
    "torch.save": lambda opt: torch.load(_saved(opt), weights_only=False),
    "deepcopy of its owner": lambda opt: copy.deepcopy({"network": opt.network, "optimizer": opt})["optimizer"],
}


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


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
    other = copy.deepcopy(optimizer)
    train(other)
    assert other.network[0].weight.eq(0.5).all()


def test_gradients_whose_data_was_replaced_count():
    optimizer, reference, (net, other) = pair()
    for step, module in ((optimizer, net), (reference, other)):
        for _ in range(2):
            loss_of(module).backward()
            for parameter in module.parameters():
                parameter.grad.data = 3 * parameter.grad.data.sign()
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


BAD_NETWORKS = {
    "no module": (lambda: [nn.Parameter(torch.zeros(1))], TypeError, "network to be a torch.nn.Module, got list"),
    "no parameters": (nn.SiLU, ValueError, "with parameters that require a gradient, got a SiLU without"),
    "all fixed": (lambda: network().requires_grad_(False), ValueError, "require a gradient, got a Sequential without"),
    "bfloat16": (lambda: network().bfloat16(), TypeError, r"float32 or float64 \(.*, got 0.weight in torch.bfloat16"),
    "mixed": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), TypeError,
              "expected parameters of one dtype, torch.float32 as 0.weight, got 1.weight in torch.float64"),
    "two devices": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), ValueError,
                    "expected parameters on one device, cpu as 0.weight, got 1.weight on meta"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2)), ValueError, "got 0.weight, which waits for a first forward"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_NETWORKS)
def test_networks_that_cannot_be_flat_are_refused(kind):
    make, error, message = BAD_NETWORKS[kind]
    with pytest.raises(error, match=message):
        AdamWEMA(make(), learning_rate=0.1)


# Options.


NAN = math.nan
BAD_OPTIONS = [
    ("learning_rate", [-1.0, NAN, math.inf], [None, "1", True, torch.tensor(1.0)]),
    ("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN)], [None, 0.9, (0.9,), (0.9, 0.9, 0.9), (None, 0.9)]),
    ("eps", [-1e-8, NAN, math.inf], [None]),
    ("weight_decay", [-1.0, NAN, math.inf], [None, "0"]),
    ("max_grad_norm", [-1.0, NAN], [None]),
    ("ema_decay", [-0.1, 1.5, NAN], ["0.9"]),
    ("warmup_steps", [-1], [None, 1.5, NAN]),
    ("decay_steps", [0, -1], [1.5, "10"]),
    ("compute_dtype", [torch.int8, torch.float64], []),
]


@pytest.mark.parametrize(("name", "values", "other_types"), BAD_OPTIONS, ids=[name for name, *_ in BAD_OPTIONS])
def test_options_out_of_range_are_named(name, values, other_types):
    for error, bad in ((ValueError, values), (TypeError, other_types)):
        for value in bad:
            net = network()
            before = net[0].weight.data_ptr()
            with pytest.raises(error, match=rf"^fastdmd.AdamWEMA: expected {name} .*got "):
                AdamWEMA(net, **{"learning_rate": 0.1, name: value})
            assert net[0].weight.data_ptr() == before


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"no_such_name": {"weight_decay": 0.0}}, r"match trained parameters .* got \['no_such_name'\]"),
        ({"weight|bias": {}, "bias": {}}, r"which no earlier one matches, got \['bias'\]"),
        ({"(": {}}, "expected a regular expression, got '\\('"),
        ({"bias": {"weight_decay": -1.0}}, "expected weight_decay of 'bias' >= 0 and finite, got -1.0"),
        ({"bias": {"learning_rate_factor": NAN}}, "expected learning_rate_factor of 'bias' >= 0 and finite, got nan"),
        ({"bias": {"lr": 1.0}}, "expected groups with weight_decay or learning_rate_factor, got"),
    ],
)
def test_groups_that_cannot_be_meant_are_named(groups, message):
    with pytest.raises(ValueError, match="^fastdmd.AdamWEMA: .*" + message):
        AdamWEMA(network(), learning_rate=0.1, groups=groups)


def test_options_of_the_op_are_checked():
    n = 4
    flat, step, rate = torch.ones(n), torch.zeros(1, dtype=torch.int64), torch.tensor(0.1)
    for name, values, other_types in [*BAD_OPTIONS[1:6], ("ema_warmup", [-1.0, NAN], [None])]:
        for error, bad in ((ValueError, values), (TypeError, other_types)):
            for value in bad:
                with pytest.raises(error, match=rf"^fastdmd.adamw_ema_: expected {name} .*got "):
                    ops.adamw_ema_(flat, flat.clone(), flat.clone(), flat.clone(), step, rate, **{name: value})
    assert flat.eq(1).all() and step.item() == 0


# Low precision, stale graphs, averages, schedulers, files, processes.


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_follows_float32(dtype):
    wide, low = (AdamWEMA(network(), learning_rate=1e-2, ema_decay=0.9, compute_dtype=d) for d in (None, dtype))
    norms = [train(optimizer, num_steps=5) for optimizer in (wide, low)]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=0.02)
    assert {p.dtype for p in low.network.parameters()} == {dtype}
    for name, value in low.state_dict()["param"].items():
        torch.testing.assert_close(value, wide.state_dict()["param"][name], rtol=0.02, atol=0.03)
        assert torch.equal(low.network.get_parameter(name), value.to(dtype))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_a_stale_graph_raises(compute_dtype):
    optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=0.9, compute_dtype=compute_dtype)
    x = images(compute_dtype or torch.float32).requires_grad_()
    for module, change in (
        (optimizer.network, optimizer.step),
        (optimizer.network, lambda: optimizer.load_state_dict(optimizer.state_dict())),
        (optimizer.ema_network, optimizer.step),
    ):
        y = module(x if module is optimizer.network else x.float()).sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("backend", ops.implementations("adamw_ema_"))
def test_ops_count_what_they_write(backend):
    n = 4
    flats = [torch.ones(n) for _ in range(5)]
    shadow, step, rate = torch.ones(n, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64), torch.tensor(0.1)
    *state, ema = flats
    state_of_noise = ops.rng_state(seed=0)
    factor = torch.ones(n, requires_grad=True)
    stale = (flats[0] * factor).sum()
    with ops.use_backend(backend):
        ops.adamw_ema_(*state, step, rate, ema=ema, shadow=shadow, zero_grad=True)
        ops.add_noise(torch.zeros(1, 1, 2, 2), torch.ones(1), rng_state=state_of_noise)
        with torch.inference_mode():  # whose tensors count nothing
            ops.adamw_ema_(*(torch.ones(n) for _ in range(4)), torch.zeros(1, dtype=torch.int64), rate)
    assert all(tensor._version > 0 for tensor in (*flats, shadow, step, state_of_noise)) and rate._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


class Statistics(nn.Module):
    """Buffers of every kind: batch statistics, one reassigned, one that appears, a constant; and a fixed weight."""

    def __init__(self):
        super().__init__()
        self.norm, self.instance = nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)
        self.scale, self.shift = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("last", None)
        self.register_buffer("constant", torch.arange(3))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
            self.last = x.detach()[: 1 + self.norm.num_batches_tracked].mean(dim=(2, 3))
        return self.scale * self.instance(self.norm(x)) + self.shift


def test_averages_have_the_buffers_of_the_network():
    net = Statistics()
    optimizer = AdamWEMA(net, learning_rate=0.1, ema_decay=0.9)
    for step in range(3):
        x = 1 + step + images()
        optimizer.backward(net(x).square().mean() + net.norm.weight.sum())
        with torch.no_grad():
            net.shift.add_(1)
        optimizer.step()
        average = optimizer.ema_network
        assert torch.equal(average.shift, net.shift) and not average.training
        for (name, value), (_, copied) in zip(net.named_buffers(), average.named_buffers(), strict=True):
            assert torch.equal(value, copied) and value is not copied, name
    assert average.norm.running_mean.norm() > 0 and average.mean > 0 and average.last.shape == (3, 3)
    copied = copy.deepcopy(optimizer)
    copied.backward(copied.network(x).mean())
    copied.step()
    assert torch.equal(copied.ema_network.norm.running_mean, copied.network.norm.running_mean)
    assert not torch.equal(copied.network.norm.running_mean, net.norm.running_mean)


class Launches(TorchDispatchMode):
    """Names of the ops that run, but those that only make views."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), function._schema.name]
        return function(*args, **(kwargs or {}))

    def work(self):
        return [name for name in self.names if name not in ("aten::slice", "aten::detach", "aten::alias")]


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_an_update_is_one_launch_a_group(compute_dtype):
    for groups, expected in (
        (None, ["fastdmd::adamw_ema_"]),
        ({"bias": {"weight_decay": 0.0}}, ["aten::mul_", "fastdmd::adamw_ema_", "fastdmd::adamw_ema_"]),
    ):
        net = network()
        net.register_buffer("frequencies", torch.ones(4))
        optimizer = AdamWEMA(net, learning_rate=0.1, ema_decay=0.9, compute_dtype=compute_dtype, groups=groups)
        for _ in range(2):
            optimizer.backward(loss_of(net))
            optimizer.advance()
            with Launches() as launches:
                optimizer.update()
            assert launches.work()[-len(expected) :] == expected
            assert launches.work().count("fastdmd::adamw_ema_") == len(optimizer.param_groups)
            assert groups or launches.work() == expected


SCHEDULERS = {
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=8),
    "ExponentialLR": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch(name):
    """Their rates, and where they cycle them their betas; also on from a saved state."""
    optimizer, reference, (net, other) = pair(max_grad_norm=math.inf)
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, reference)]

    def go(optimizer, net, scheduler):
        for _ in range(3):
            train(optimizer, net, 1)
            scheduler.step()

    go(optimizer, net, schedulers[0]), go(reference, other, schedulers[1])
    assert_alike(net, other, rtol=1e-4, atol=1e-6)
    resumed = AdamWEMA(network(), learning_rate=1e-2)
    scheduler = SCHEDULERS[name](resumed)
    resumed.load_state_dict(torch.load(_saved(optimizer.state_dict()), weights_only=True))
    scheduler.load_state_dict(schedulers[0].state_dict())
    go(resumed, resumed.network, scheduler), go(optimizer, net, schedulers[0])
    assert_alike(net, resumed.network, rtol=0, atol=0)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 1e-2


def test_rates_of_groups_multiply():
    groups = {"bias": {"learning_rate_factor": 0.1}}
    optimizer = AdamWEMA(network(), learning_rate=0.5, warmup_steps=4, groups=groups)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
    optimizer.advance()
    assert [group.learning_rate.item() for group in optimizer._groups] == pytest.approx([0.00625, 0.0625])
    optimizer.peak_learning_rate = 0.1
    assert optimizer.learning_rate(0) == pytest.approx(0.025)
    optimizer.advance()
    assert [group.learning_rate.item() for group in optimizer._groups] == pytest.approx([0.005, 0.05])


def test_states_without_groups_are_read():
    optimizer, other = (AdamWEMA(network(), learning_rate=rate, ema_decay=0.9) for rate in (0.1, 0.2))
    train(optimizer)
    state = optimizer.state_dict()
    del state["param_groups"]
    other.load_state_dict(state)
    assert_alike(other.network, optimizer.network, rtol=0, atol=0)
    assert other.peak_learning_rate == 0.2 and other.num_updates == 2


def test_the_rest_of_the_interface():
    optimizer, reference, (net, other) = pair()
    seen = []
    optimizer.register_step_post_hook(lambda *arguments: seen.append("step"))

    def closure(opt, module):
        def call():
            opt.zero_grad()
            loss = loss_of(module)
            loss.backward()
            return loss

        return call

    losses = optimizer.step(closure(optimizer, net)), reference.step(closure(reference, other))
    torch.testing.assert_close(*losses)
    assert_alike(net, other)
    assert seen == ["step"] and "lr: 0.01" in repr(optimizer)
    with pytest.raises(ValueError, match="expected its groups at construction, got add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer._captured_options = optimizer._fixed_options()  # as a capture does
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.advance()
    optimizer.param_groups[0]["weight_decay"] = 0.2
    with pytest.raises(ValueError, match="expected lr alone to change under a captured graph"):
        optimizer.advance()


@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e38])
@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
def test_a_norm_that_is_not_finite_stops_every_group(bad, max_grad_norm):
    """Also where the gradients are finite and the sum of their squares is not."""
    groups = {"bias": {"weight_decay": 0.5}}
    optimizer = AdamWEMA(network(), learning_rate=0.1, max_grad_norm=max_grad_norm, groups=groups)
    start = copy.deepcopy(optimizer.state_dict())
    optimizer.network[0].weight.grad[0] = bad
    assert not optimizer.step().isfinite()
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(value, start[kind][name]) for name, value in optimizer.state_dict()[kind].items())
    assert [step.item() for step in optimizer.state_dict()["steps"]] == [0, 0]


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_files_hold_parameters_as_tensors_of_their_own(compute_dtype, tmp_path):
    optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=0.9, compute_dtype=compute_dtype)
    train(optimizer)
    for name in ("network", "ema_network"):
        module = getattr(optimizer, name)
        save_model(module, str(tmp_path / "weights.safetensors"))
        read = network().to(next(module.parameters()).dtype)
        load_model(read, str(tmp_path / "weights.safetensors"))
        assert_alike(read, module, rtol=0, atol=0)
    parameter = optimizer.network[1].bias
    assert len(_saved(parameter.detach()).getvalue()) < 2000  # not the whole buffer
    assert parameter.untyped_storage().nbytes() == 8 * parameter.itemsize


@pytest.fixture
def two_processes():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_gradients_that_nobody_would_reduce_raise(two_processes):
    optimizer = AdamWEMA(network(), learning_rate=0.1)
    with pytest.raises(ValueError, match="AdamWEMA.backward: expected one process, got 2, whose gradients"):
        optimizer.backward(loss_of(optimizer.network))
    wrapped = nn.parallel.DistributedDataParallel(optimizer.network)
    with pytest.raises(TypeError, match="expected the network inside DistributedDataParallel, its .module, got"):
        AdamWEMA(wrapped, learning_rate=0.1)


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_gradients_of_a_data_parallel_wrapper_arrive(bucket_view, wrapped_first):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        net, other = network(), network()
        wrap = functools.partial(nn.parallel.DistributedDataParallel, net, gradient_as_bucket_view=bucket_view)
        wrapper = wrap() if wrapped_first else None
        optimizer, reference = AdamWEMA(net, learning_rate=1e-2), adamw(other)
        wrapper = wrapper or wrap()
        for _ in range(3):
            loss_of(wrapper).backward()
            norm = optimizer.step()
            reference.zero_grad()
            loss_of(other).backward()
            torch.testing.assert_close(norm, nn.utils.get_total_norm([p.grad for p in other.parameters()]))
            reference.step()
        assert_alike(net, other)
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_parameters_are_refused(two_processes):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    net = network()
    optimizer = AdamWEMA(net, learning_rate=0.1)
    fully_shard(net, mesh=mesh)
    with pytest.raises(ValueError, match="expected 0.weight where the optimizer put it, got it moved or replaced"):
        optimizer.step()
    with pytest.raises(TypeError, match="expected plain tensors as parameters, got 0.weight, a DTensor"):
        AdamWEMA(net, learning_rate=0.1)
