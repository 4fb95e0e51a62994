"""What happens to parts of an accelerated module, before or afterwards: hooks, settings, adapters, new children."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdmd
from tests.helpers.accelerated import assert_same
from tests.networks.test_accelerate import accelerated
from tests.networks.test_accelerate_traces import Block

X = torch.randn(2, 16, 8, 8)


def test_hooks_see_what_they_would_have_seen():
    for place in ("norm", "act"):
        for is_early in (True, False):
            block = nn.Sequential()
            block.add_module("norm", nn.GroupNorm(4, 16))
            block.add_module("act", nn.SiLU())
            expected, seen = getattr(block, place)(X if place == "act" else X), []
            if is_early:
                getattr(block, place).register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
            report = fastdmd.accelerate(block, X)
            assert report.fused == ({} if is_early else {"norms with SiLU": 1})
            if not is_early:
                getattr(block, place).register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
            seen.clear()
            output = block(X)
            assert len(seen) == 1
            expected = F.group_norm(X, 4) if place == "norm" else output
            torch.testing.assert_close(seen[0], expected)
            torch.testing.assert_close(output, F.silu(F.group_norm(X, 4)))


def test_what_a_module_is_told_later_counts():
    module, original, _ = accelerated(Block("plain"), X)
    module.factor = original.factor = 3.0  # was a number in the trace
    assert_same(module, original, X)
    module, original, _ = accelerated(Block("plain"), X)
    replaced = nn.GroupNorm(2, 16)
    module.norm, original.norm = replaced, replaced
    assert_same(module, original, X)
    module, original, _ = accelerated(nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1)), X)
    module.append(nn.Tanh()), original.append(nn.Tanh())
    assert_same(module, original, X)
    for part in (module, original):
        part[2].padding_mode, part[2]._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    assert_same(module, original, X)


class Gained(Block):
    """What it is told is called as what nobody outside should know."""

    def __init__(self):
        super().__init__("gained")
        self._gain = 1.0

    def gained(self, x):
        return F.silu(self.norm(x)) * self._gain


def test_what_it_is_told_under_any_name_counts():
    module, original, report = accelerated(Gained(), X)
    assert report.fused == {"norms with SiLU": 1}
    module._gain = original._gain = 3.0
    assert_same(module, original, X)


def test_another_padding_of_a_convolution_counts():
    """As those who want seamless textures give it to all convolutions, before or afterwards."""

    def across(self, x, weight, bias):
        return F.conv2d(F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1)), weight, bias)

    for is_early in (True, False):
        original = nn.Conv2d(16, 16, 3, padding=1)
        module = copy.deepcopy(original)
        if is_early:
            module._conv_forward = types.MethodType(across, module)
        report = fastdmd.accelerate(module, X)
        assert report.convolutions == ((0, 0) if is_early else (1, 1))
        module._conv_forward = types.MethodType(across, module)
        original._conv_forward = types.MethodType(across, original)
        assert_same(module, original, X)


class Scaled(nn.Module):
    """An activation that is traced through."""

    def __init__(self):
        super().__init__()
        self.factor = 2.0

    def forward(self, x):
        return x * torch.sigmoid(x) * (self.factor if self.training else 1.0)


def test_what_an_inlined_module_is_told_later_counts():
    def make():
        return nn.Sequential(nn.GroupNorm(4, 16), Scaled(), nn.Conv2d(16, 16, 3, padding=1)).eval()

    module, original, report = accelerated(make(), X)
    assert report.fused == {"norms with SiLU": 1} and (2.0, False) == (module[1].factor, module[1].training)
    for change in (lambda part: setattr(part, "factor", 3.0), lambda part: part.train()):
        module, original, _ = accelerated(make().train(), X)
        change(module[1]), change(original[1])
        assert_same(module, original, X)
    module, original, _ = accelerated(make(), X)
    module[1].train(), original[1].train()  # alone
    assert_same(module, original, X)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        fastdmd.unaccelerate(twin)
        assert type(twin[1]) is Scaled and not any(name.startswith("_fastdmd") for name in vars(twin[1]))


def test_a_parametrization_later_counts():
    module, original, _ = accelerated(OwnWeight(), X)
    for part in (module, original):
        torch.manual_seed(0)
        nn.utils.parametrizations.weight_norm(part, "weight")
        with torch.no_grad():
            part.parametrizations.weight.original0.mul_(2)
    assert_same(module, original, X)
    fastdmd.unaccelerate(module)
    assert_same(module, original, X)


class OwnWeight(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.weight = nn.GroupNorm(4, 16), nn.Parameter(torch.randn(16, 16, 3, 3))

    def forward(self, x):
        return F.conv2d(F.silu(self.norm(x)), self.weight, padding=1)


class LowRank(nn.Module):
    """Beside a convolution, as adapters are put into networks."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Conv2d(16, 2, 1, bias=False), nn.Conv2d(2, 16, 1, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def test_adapters_before_and_after():
    module = Block("plain")
    module.conv = LowRank(module.conv)
    module, original, report = accelerated(module, X)
    assert report.convolutions == (1, 1) and not report.reasons
    assert_same(module, original, X)
    module, original, _ = accelerated(Block("plain"), X)
    adapter = LowRank(nn.Identity())
    for block in (module, original):
        adapter.base_layer = block.conv
        block.conv = LowRank(block.conv)
        block.conv.load_state_dict(adapter.state_dict())
    assert_same(module, original, X)


def test_a_convolution_whose_weight_a_hook_computes():
    with pytest.warns(FutureWarning, match="weight_norm"):
        conv = nn.utils.weight_norm(nn.Conv2d(16, 16, 3, padding=1))
    module = nn.Sequential(conv, nn.GroupNorm(4, 16), nn.SiLU())
    expected = module(X).detach()
    report = fastdmd.accelerate(module, X)
    assert report.convolutions == (1, 1)
    torch.testing.assert_close(module(X), expected)
    module(X).sum().backward()
    assert conv.weight_g.grad is not None and conv.weight_v.grad.abs().sum() > 0
