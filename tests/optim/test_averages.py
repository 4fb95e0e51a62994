"""Several averages of one network: each is the recurrence of its own decay, in states and copies too."""

import copy
import math

import pytest
import torch

from fastdmd.optim import AdamWEMA
from tests.helpers.optimizers import assert_alike, network, train
from tests.optim.test_copies import COPIES

DECAYS = (0.3, 0.9, 0.5, 1.0)
GROUPS = {"bias": {"weight_decay": 0.0}}


def bad_step(optimizer):
    for parameter in optimizer.network.parameters():
        parameter.grad.fill_(math.nan)
    optimizer.step()


@pytest.mark.parametrize("warmup", [0.0, 2.0])
@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.bfloat16}, {"groups": GROUPS}], ids=str)
def test_each_average_follows_its_own_decay(options, warmup):
    """From the first update that moves something; one whose gradient is not finite counts for none of them."""
    optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=DECAYS, ema_warmup=warmup, **options)
    expected = [copy.deepcopy(dict(optimizer.ema_network.named_parameters())) for _ in DECAYS]
    bad_step(optimizer)
    for number in range(1, 5):
        train(optimizer, num_steps=1)
        weights = optimizer.state_dict()["param"]
        for average, decay in zip(expected, DECAYS, strict=True):
            decay = min(decay, number / (number + warmup))
            for name, value in average.items():
                value.mul_(decay).add_(weights[name], alpha=1 - decay)
        bad_step(optimizer)
    for average, found in zip(expected, optimizer.ema_networks, strict=True):
        for name, value in found.named_parameters():
            torch.testing.assert_close(value, average[name], rtol=1e-6, atol=1e-7)
    distances = {float(abs(found[0].weight - weights["0.weight"]).max()) for found in optimizer.ema_networks}
    assert len(distances) == len(DECAYS) - (warmup > 0)  # beyond 4 / (4 + warmup), two are alike


def test_further_averages_change_nothing_else():
    """Weights and first average are those of an optimizer that keeps one, bit for bit."""
    one, several = (AdamWEMA(network(), learning_rate=0.1, ema_decay=decay) for decay in (0.9, (0.9, 0.99)))
    train(one, num_steps=3), train(several, num_steps=3)
    assert_alike(one.network, several.network, rtol=0, atol=0)
    assert_alike(one.ema_network, several.ema_network, rtol=0, atol=0)


def test_one_average_costs_what_it_did():
    """No launch beside those of the op and of the buffers that averages copy."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = {}
    for decays in (0.9, (0.9, 0.99), (0.9, 0.99, 0.999)):
        optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=decays)
        with Counted() as names[decays]:
            optimizer.update()
    counts = {decays: mode.names.count("aten.lerp_.Tensor") for decays, mode in names.items()}
    assert list(counts.values()) == [0, 1, 2] and sum("adamw_ema_" in name for name in names[0.9].names) == 1
    assert not any("isfinite" in name or "where" in name for name in names[0.9].names)


@pytest.mark.parametrize("way", COPIES)
def test_copies_have_averages_of_their_own(way):
    optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=(0.9, 0.5))
    train(optimizer)
    start = copy.deepcopy(optimizer.ema_networks[1])
    other = COPIES[way](optimizer)
    train(other)
    assert_alike(optimizer.ema_networks[1], start, rtol=0, atol=0)
    train(optimizer)
    for own, copied in zip(optimizer.ema_networks, other.ema_networks, strict=True):
        assert own is not copied
        assert_alike(own, copied, rtol=0, atol=0)


def test_states_hold_all_averages_and_no_other_number_of_them():
    optimizer, other = (AdamWEMA(network(), learning_rate=0.1, ema_decay=(0.9, 0.5)) for _ in range(2))
    train(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    assert {"ema", "ema_2"} <= state.keys()
    other.load_state_dict(state)
    train(optimizer), train(other)
    for own, loaded in zip(optimizer.ema_networks, other.ema_networks, strict=True):
        assert_alike(own, loaded, rtol=0, atol=0)
    fewer = AdamWEMA(network(), learning_rate=0.1, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"expected the entries of this optimizer, got others: \['ema_2'\]"):
        fewer.load_state_dict(state)
    del state["ema_2"]  # as states of one average have always been
    fewer.load_state_dict(state)
    assert torch.equal(fewer.ema_network[0].weight, state["ema"]["0.weight"])
    with pytest.raises(ValueError, match=r"expected the entries of this optimizer, got others: \['ema_2'\]"):
        other.load_state_dict(state)


def test_further_averages_are_watched():
    optimizer = AdamWEMA(network(), learning_rate=0.1, ema_decay=(0.9, 0.5))
    optimizer.ema_networks[1].double()
    with pytest.raises(ValueError, match=r"expected 0.weight of ema_networks\[1\] where the optimizer put it, got it"):
        train(optimizer)


@pytest.mark.parametrize("bad", [(), [], (0.9, 1.5), (0.9, -0.1), (math.nan, 0.9)])
def test_decays_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match="^fastdmd.AdamWEMA: expected ema_decay .*got "):
        AdamWEMA(network(), learning_rate=0.1, ema_decay=bad)
