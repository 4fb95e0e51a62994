"""Where the gradients of AdamWEMA come from: the engine, functions that it does not see through, and from before."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdmd.networks.unet_blocks import AddBias
from fastdmd.optim import AdamWEMA, gradients
from tests.helpers.optimizers import adamw, assert_alike, images, loss_of, network, pair, train


class Hidden(torch.autograd.Function):
    """A module whose backward pass runs one of its own, as reversible networks and reentrant checkpoints do."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        torch.autograd.backward(y, grad)
        return x.grad, None


class Double(torch.autograd.Function):
    """An honest one."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def leaf():
    return images().requires_grad_()


def judged():
    return images() * JUDGE.weight.sum()


JUDGE = nn.Linear(3, 3)  # a network of somebody else
HIDDEN = {
    "a reentrant checkpoint at the start": lambda net: net[2](checkpoint(net[:2], leaf(), use_reentrant=True)),
    "a reentrant checkpoint behind": lambda net: net[2](checkpoint(net[1], net[0](images()), use_reentrant=True)),
    "a function at the start": lambda net: net[2](Hidden.apply(leaf(), net[:2])),
    "a function behind": lambda net: net[2](Hidden.apply(net[0](images()), net[1])),
    "all in a function": lambda net: Hidden.apply(leaf(), net),
    "the same weights outside, too": lambda net: Hidden.apply(leaf(), net) + net(images()),
    "a reentrant checkpoint behind another network": lambda net: checkpoint(net, judged(), use_reentrant=True),
    "and outside, too": lambda net: checkpoint(net, judged(), use_reentrant=True) + net(images()),
    "a function behind another network": lambda net: net[2](Hidden.apply(judged(), net[:2])),
}


@pytest.mark.parametrize("max_bytes", [gradients.MAX_BYTES_TWICE, 0], ids=["copied", "in place"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_backward_passes_are_right_or_refused(kind, max_bytes, monkeypatch):
    """`loss.backward()` is always right; `backward(loss)` gives the same, or says what does."""
    monkeypatch.setattr(gradients, "MAX_BYTES_TWICE", max_bytes)
    optimizer, reference, (net, other) = pair()
    HIDDEN[kind](other).square().mean().backward()
    try:
        optimizer.backward(HIDDEN[kind](net).square().mean())
    except (ValueError, RuntimeError) as error:
        assert "use_reentrant=False" in str(error) and ("loss.backward()" in str(error) or "checkpoint" in kind)
        optimizer.zero_grad(set_to_none=False)
        HIDDEN[kind](net).square().mean().backward()
    else:
        assert (kind, max_bytes) == ("a function behind", 0)  # the engine itself adds there
    for own, exact in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.grad, exact.grad)
    optimizer.step(), reference.step()
    assert_alike(net, other)


def test_functions_of_this_package_hide_nothing():
    net, other = network(), network()
    optimizer = AdamWEMA(net, learning_rate=1e-2)
    bias = torch.zeros(3, requires_grad=True)
    optimizer.backward(AddBias.apply(net(AddBias.apply(images(), bias)), bias).square().mean())
    other(images()).square().mean().backward()
    for own, exact in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.grad, exact.grad)


def test_functions_that_hide_nothing_are_allowed():
    optimizer, reference, (net, other) = pair()
    for step, module in ((optimizer, net), (reference, other)):
        loss = Double.apply(checkpoint(module, images(), use_reentrant=False)).square().mean()
        step.backward(loss) if step is optimizer else loss.backward()
        step.step()
    assert_alike(net, other)


def test_functions_on_the_way_to_another_network_are_allowed():
    """As in a fake score that a generator's images pass through."""
    net, reference = network(), network()
    optimizer = AdamWEMA(net, learning_rate=1e-2)

    def loss(generator):
        return (generator(images()) * Double.apply(JUDGE.weight).sum()).square().mean()

    optimizer.backward(loss(net))
    loss(reference).backward()
    for own, exact in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, exact.grad)


def test_hooks_run_or_are_refused():
    optimizer, reference, (net, other) = pair()
    for module in (net, other):
        module[0].weight.register_hook(lambda grad: 3 * grad)
    optimizer.backward(loss_of(net)), loss_of(other).backward()
    torch.testing.assert_close(net[0].weight.grad, other[0].weight.grad)
    seen = []
    net[1].bias.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    with pytest.raises(ValueError, match="expected parameters without post-accumulate hooks, which it does not run"):
        optimizer.backward(loss_of(net))
    train(optimizer, num_steps=1), train(reference, other, 1)
    assert len(seen) == 1
    assert_alike(net, other)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_gradients_from_before_count(compute_dtype):
    net, other = network(), network()
    loss_of(net).backward(), loss_of(other).backward()
    exact = [parameter.grad.clone() for parameter in other.parameters()]
    reference = adamw(other)
    optimizer = AdamWEMA(net, learning_rate=1e-2, compute_dtype=compute_dtype)
    for parameter, gradient in zip(net.parameters(), exact, strict=True):
        assert torch.equal(parameter.grad, gradient.to(parameter.dtype))
    copied = copy.deepcopy(optimizer)
    norms = optimizer.step(), copied.step()
    reference.step()
    assert norms[0] == norms[1] > 0
    if compute_dtype is None:
        assert_alike(net, other)
    assert_alike(net, copied.network, rtol=0, atol=0)


@pytest.mark.parametrize("route", ["backward", "zero_grad", "before"])
def test_sparse_gradients_are_refused(route):
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    loss = net(torch.tensor([1, 1, 3])).square().mean()
    if route == "before":
        loss.backward()
        with pytest.raises(TypeError, match="expected dense gradients, got that of 0.weight in torch.sparse_coo"):
            AdamWEMA(net, learning_rate=0.1)
        return
    optimizer = AdamWEMA(net, learning_rate=0.1)
    loss = net(torch.tensor([1, 1, 3])).square().mean()
    with pytest.raises(TypeError, match="expected a dense gradient of 0.weight, got one in torch.sparse_coo"):
        if route == "backward":
            optimizer.backward(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert optimizer.num_updates == 0


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_groups_clip_as_one_does(compute_dtype, max_grad_norm):
    """A gradient that clipping makes too small for float16 still counts."""
    states = []
    for groups in (None, {"bias": {"learning_rate_factor": 1.0}, "1": {"weight_decay": 0.01}}):
        optimizer = AdamWEMA(
            network(),
            learning_rate=0.1,
            eps=1e-14,
            compute_dtype=compute_dtype,
            max_grad_norm=max_grad_norm,
            groups=groups,
            ema_decay=0.9,
        )
        for _ in range(2):
            optimizer.backward(100 * loss_of(optimizer.network))
            optimizer.step()
            assert all(parameter.grad.eq(0).all() for parameter in optimizer.network.parameters())
        states.append(optimizer.state_dict())
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, value in states[0][kind].items():
            assert value.norm() > 0
            relative = (states[1][kind][name] - value).norm() / value.norm()
            assert relative < (1e-3 if compute_dtype is None else 0.03), (kind, name)


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


@pytest.mark.parametrize("max_bytes", [0, gradients.MAX_BYTES_TWICE])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_two_that_take_turns_need_the_room_of_one(compute_dtype, max_bytes, monkeypatch):
    monkeypatch.setattr(gradients, "MAX_BYTES_TWICE", max_bytes)
    options = {"learning_rate": 1e-2, "ema_decay": 0.9, "compute_dtype": compute_dtype}
    first, apart = (AdamWEMA(network(), **options) for _ in range(2))
    second = AdamWEMA(network(), gradients_with=first, **options)
    copies = copy.deepcopy([first, second])
    for one, other in ((first, second), copies):
        for own, its in zip(one.parameters, other.parameters, strict=True):
            assert own.grad.data_ptr() == its.grad.data_ptr()
    assert copies[0].parameters[0].grad.data_ptr() != first.parameters[0].grad.data_ptr()
    for _ in range(3):
        for optimizer in (first, second, *copies, apart):
            optimizer.backward(loss_of(optimizer.network))
            optimizer.backward(loss_of(optimizer.network), accumulate=True)
            optimizer.step()
    train(second)
    train(apart)
    for optimizer in (second, *copies, first):
        if optimizer is not second:
            train(optimizer)
        assert_alike(optimizer.network, apart.network, rtol=0, atol=0)
        assert_alike(optimizer.ema_network, apart.ema_network, rtol=0, atol=0)


def test_the_room_of_another_has_to_fit():
    other = AdamWEMA(network(), learning_rate=0.1)
    expected = (
        "expected gradients_with the optimizer of a network that is alike, .* got one of a Sequential that is not"
    )
    turned = nn.Sequential(*reversed(network()))  # as many numbers, in another order
    for net, options in (
        (turned, {}),
        (network(), {"compute_dtype": torch.bfloat16}),
        (network(), {"groups": {"bias": {"weight_decay": 0.0}}}),
        (network(torch.float64), {}),
    ):
        with pytest.raises(ValueError, match=expected):
            AdamWEMA(net, learning_rate=0.1, gradients_with=other, **options)
    with pytest.raises(TypeError, match="expected gradients_with an AdamWEMA, got SGD"):
        AdamWEMA(network(), learning_rate=0.1, gradients_with=torch.optim.SGD(network().parameters()))
    net = network()
    loss_of(net).backward()
    with pytest.raises(ValueError, match="expected no gradients yet of a network with gradients_with, got some"):
        AdamWEMA(net, learning_rate=0.1, gradients_with=other)
