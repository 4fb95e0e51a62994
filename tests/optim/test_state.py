"""Saved states of AdamWEMA: what a load takes over, what it refuses before anything has changed; and its options."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdmd.optim import AdamWEMA
from tests.helpers.optimizers import images, loss_of, network, train

OPTIONS = dict(learning_rate=1e-2, max_grad_norm=0.1, ema_decay=0.9)


class Uncounted(nn.Module):
    """Statistics of its own, which batch_norm changes without counting; a fixed weight, a buffer that comes late."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))
        self.shift = nn.Parameter(torch.zeros(4, 1, 1), requires_grad=False)

    def forward(self, x):
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(2))
        return F.batch_norm(self.convolution(x), self.mean, self.variance, training=self.training) + self.shift


def trained(seed):
    torch.manual_seed(0)
    optimizer = AdamWEMA(Uncounted(), learning_rate=0.1, ema_decay=0.9)
    for step in range(3):
        optimizer.backward(optimizer.network(5 + seed + step + images()).pow(3).mean())
        optimizer.step()
    return optimizer


def assert_average_follows(optimizer):
    average = dict(optimizer.ema_network.named_buffers()) | {"shift": optimizer.ema_network.shift}
    expected = dict(optimizer.network.named_buffers()) | {"shift": optimizer.network.shift}
    assert average.keys() == expected.keys() and len(average) == 4
    for name, value in expected.items():
        assert torch.equal(average[name], value) and average[name] is not value, name


def test_averages_have_uncounted_buffers():
    optimizer = trained(0)
    assert optimizer.network.mean.norm() > 0
    assert_average_follows(optimizer)
    optimizer.network.mean.data.fill_(7.0)
    with torch.inference_mode():
        optimizer.network.variance = torch.full((4,), 3.0)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            optimizer.step()
        assert_average_follows(optimizer)
    assert optimizer.ema_network.mean.eq(7).all() and optimizer.ema_network.variance.eq(3).all()


def test_averages_have_expanded_buffers():
    """To which torch does not write."""
    net = nn.Linear(2, 2)
    net.register_buffer("wide", torch.tensor([1.0]).expand(3))
    optimizer = AdamWEMA(net, learning_rate=0.1, ema_decay=0.9)
    net.wide = torch.tensor([2.0]).expand(3)
    optimizer.backward(net(torch.ones(1, 2)).sum())
    optimizer.step()
    assert optimizer.ema_network.wide.tolist() == [2.0] * 3


def test_an_average_is_right_as_soon_as_it_is_loaded():
    source, target = trained(0), trained(1)
    source.network.shift.data = torch.full((4, 1, 1), 2.0)
    x = images()
    target.network.load_state_dict(source.network.state_dict())
    target.load_state_dict(source.state_dict())
    assert_average_follows(target)
    average = source.ema_network
    average.shift.copy_(source.network.shift)
    assert torch.equal(target.ema_network(x), average(x))


def group(**changes):
    return lambda state: state["param_groups"][0].update(changes)


BAD_STATES = {
    "no mapping": (lambda state: state.clear() or state, "got others: "),
    "param None": (lambda state: state.update(param=None), "expected param by parameter name, got NoneType"),
    "steps None": (lambda state: state.update(steps=None), "expected steps to be a list, got None"),
    "a list for a tensor": (lambda state: state["param"].update({"0.bias": [1.0]}), "of 0.bias to be a floating point"),
    "whole numbers": (lambda state: state["exp_avg"].update({"0.bias": torch.ones(8, dtype=torch.int64)}), "floating"),
    "another shape": (lambda state: state["ema"].update({"0.bias": torch.ones(9)}), r"of shape \(8,\), got \(9,\)"),
    "one missing": (lambda state: state["ema"].pop("0.bias"), r"ema of 0.bias of shape \(8,\), got None"),
    "one more": (lambda state: state["ema"].update(x=torch.ones(2)), r"ema of x of shape None, got \(2,\)"),
    "steps of another shape": (lambda state: state.update(steps=[torch.zeros(2, dtype=torch.int64)]), "expected steps"),
    "steps of another dtype": (lambda state: state.update(steps=[torch.zeros(1)]), r"expected steps of shape \(1,\)"),
    "negative steps": (lambda state: state["steps"][0].fill_(-1), "expected steps of shape .*, whole and not negative"),
    "other groups": (lambda state: state["steps"].append(state["steps"][0]), "expected 1 parameter groups, got 2"),
    "a word of updates": (lambda state: state.update(num_updates="x"), "expected num_updates to be a whole number"),
    "negative updates": (lambda state: state.update(num_updates=-5), "expected num_updates >= 0, got -5"),
    "negative squares": (lambda state: state["exp_avg_sq"]["0.bias"].fill_(-1), "exp_avg_sq of 0.bias finite, not neg"),
    "nan": (lambda state: state["param"]["2.bias"].fill_(math.nan), "expected param of 2.bias finite, got"),
    "infinity": (lambda state: state["ema"]["2.bias"].fill_(math.inf), "expected ema of 2.bias finite, got"),
    "groups None": (lambda state: state.update(param_groups=None), "expected param_groups to be a list, got None"),
    "a group None": (lambda state: state.update(param_groups=[None]), "expected param_groups to be a list, got"),
    "a word for a rate": (group(lr="x"), "expected lr to be a number .*, got 'x'"),
    "a rate of nan": (group(lr=math.nan), "expected lr >= 0 and finite, got nan"),
    "betas of 1": (group(betas=(0.9, 1.0)), "expected betas in "),
    "a negative decay": (group(weight_decay=-1.0), "expected weight_decay >= 0 and finite, got -1.0"),
}


@pytest.mark.parametrize("kind", BAD_STATES)
def test_states_that_cannot_have_been_saved_change_nothing(kind):
    optimizer, other = (AdamWEMA(network(), learning_rate=0.1, ema_decay=0.9) for _ in range(2))
    train(optimizer), train(other, num_steps=1)
    state, before = copy.deepcopy(other.state_dict()), copy.deepcopy(optimizer.state_dict())
    change, message = BAD_STATES[kind]
    change(state)
    with pytest.raises((TypeError, ValueError), match="^fastdmd.AdamWEMA: .*" + message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["num_updates"] == 2 and after["param_groups"] == before["param_groups"]
    assert torch.equal(after["steps"][0], before["steps"][0])
    for entry in ("param", "exp_avg", "exp_avg_sq", "ema"):
        assert all(torch.equal(value, before[entry][name]) for name, value in after[entry].items())


BAD_OPTIONS = [
    ("lr", math.nan, ValueError),
    ("lr", -0.1, ValueError),
    ("lr", "x", TypeError),
    ("lr", torch.tensor(0.1), TypeError),
    ("learning_rate_factor", -1, ValueError),
    ("weight_decay", None, TypeError),
    ("betas", (0.9,), TypeError),
    ("eps", math.inf, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_OPTIONS)
def test_options_set_later_are_checked_before_a_step(name, value, error):
    optimizer = AdamWEMA(network(), learning_rate=0.1, groups={"bias": {"weight_decay": 0.0}})
    train(optimizer, num_steps=1)
    before = copy.deepcopy(optimizer.state_dict()["param"])
    optimizer.param_groups[1][name] = value
    for step in (optimizer.step, optimizer.advance, optimizer.zero_grad):
        with pytest.raises(error, match=f"^fastdmd.AdamWEMA: expected {name} "):
            step()
    assert optimizer.num_updates == 1
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state_dict()["param"].items())


def test_members_of_groups_stay():
    optimizer = AdamWEMA(network(), learning_rate=0.1)
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:1]
    with pytest.raises(ValueError, match="expected the parameters of its groups as at construction, got others"):
        optimizer.step()


def test_what_would_have_no_effect_is_refused():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=0.9)
    train(optimizer)
    for kind in ("state_dict", "load_state_dict"):
        for when in ("pre", "post"):
            with pytest.raises(NotImplementedError, match="expected hooks on step alone, got one on its state_dict"):
                getattr(optimizer, f"register_{kind}_{when}_hook")(lambda *arguments: None)
    with pytest.raises(TypeError, match="expected copy.deepcopy, got copy.copy"):
        copy.copy(optimizer)
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"expected state_dict\(\), got a look at `state`"):
        get_optimizer_state_dict(optimizer.network, optimizer)
    with pytest.raises(ValueError, match=r"expected state_dict\(\), got a look at `state`"):
        optimizer.state[optimizer.parameters[0]]
    after = optimizer.state_dict()
    assert after["num_updates"] == 2 and torch.equal(after["exp_avg"]["0.bias"], before["exp_avg"]["0.bias"])
    train(optimizer)
    assert optimizer.num_updates == 4 and loss_of(optimizer.network).isfinite()


@pytest.mark.parametrize("way", ["script", "trace"])
def test_scripted_networks_are_refused(way):
    net = torch.jit.script(network()) if way == "script" else torch.jit.trace(network(), images())
    with pytest.raises(TypeError, match="expected modules of Python, got a .*, which torch.jit made"):
        AdamWEMA(net, learning_rate=0.1)


def test_networks_of_inference_mode_are_refused():
    with torch.inference_mode():
        net = network()
    with pytest.raises(ValueError, match="expected parameters from outside of torch.inference_mode, got 0.weight from"):
        AdamWEMA(net, learning_rate=0.1)


def test_a_compiled_step_is_the_same():
    """Torch would trace it in pieces, and has lost the number of updates then."""
    optimizer, other = (AdamWEMA(network(), learning_rate=0.1, warmup_steps=4) for _ in range(2))
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(optimizer.network).backward()
        compiled()
    train(other, num_steps=3)
    assert optimizer.num_updates == 3
    for own, exact in zip(optimizer.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(own, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_state_goes_on_bit_for_bit(dtype):
    compute = None if dtype == torch.float32 else dtype
    optimizer, other = (AdamWEMA(network(), compute_dtype=compute, **OPTIONS) for _ in range(2))
    train(optimizer, num_steps=3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer), train(other)
    assert other.num_updates == 5
    for kind in ("param", "exp_avg", "exp_avg_sq", "ema"):
        for name, value in optimizer.state_dict()[kind].items():
            assert torch.equal(value, other.state_dict()[kind][name]), (kind, name)
    assert torch.equal(optimizer.network[0].weight, other.network[0].weight)


def test_state_of_another_network_is_refused():
    state = AdamWEMA(network(), **OPTIONS).state_dict()
    wider = torch.nn.Sequential(torch.nn.Conv2d(3, 9, 3), torch.nn.GroupNorm(3, 9), torch.nn.Conv2d(9, 3, 3))
    with pytest.raises(ValueError, match=r"expected param of 0.weight of shape \(9, 3, 3, 3\), got \(8, 3, 3, 3\)"):
        AdamWEMA(wider, **OPTIONS).load_state_dict(state)
    with pytest.raises(ValueError, match="expected 2 parameter groups, got 1"):
        AdamWEMA(network(), groups={"bias": {}}, **OPTIONS).load_state_dict(state)
    with pytest.raises(ValueError, match="expected the entries of this optimizer"):
        AdamWEMA(network(), learning_rate=1e-2).load_state_dict(state)
