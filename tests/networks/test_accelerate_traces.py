"""Forwards in which something is other than it looks: what is fused, what is not, and always the same numbers."""

import contextlib
import gc
import os
import pathlib
import random
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdmd.networks.accelerate.fusions import fuse
from fastdmd.networks.accelerate.layers import GroupNorm
from fastdmd.networks.accelerate.tracing import Call, trace
from tests.helpers.accelerated import WrongGradient, assert_same
from tests.networks.test_accelerate import accelerated

X = torch.randn(2, 16, 8, 8)


class Block(nn.Module):
    """A norm, and what `way` makes of it."""

    def __init__(self, way, **attributes):
        super().__init__()
        self.norm, self.conv, self.way = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1), way
        self.act, self.dropout, self.table = nn.SiLU(), nn.Dropout(0.5), nn.Parameter(torch.randn(1, 16, 1, 1))
        self.kept, self.factor = None, 1.0
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.conv(getattr(self, self.way)(x))

    def plain(self, x):
        return F.silu(self.norm(x)) * self.factor

    def used_twice(self, x):
        h = self.norm(x)
        return F.silu(h) + h

    def sigmoid_used_twice(self, x):
        h = self.norm(x)
        s = h.sigmoid()
        return h * s + s

    def sigmoid_of_another(self, x):
        h = self.norm(x)
        return h * torch.sigmoid(self.conv(x))

    def silu_in_place_and_read(self, x):
        h = self.norm(x)
        F.silu(h, inplace=True)
        return h

    def dropped_out_between(self, x):
        return F.silu(self.dropout(self.norm(x)))

    def scaled_in_place(self, x):
        h = self.norm(x)
        h *= 1 + self.table
        h += self.table
        return F.silu(h)

    def shifted_alone(self, x):
        return F.silu(self.norm(x) + self.table)

    def added_with_alpha(self, x):
        return F.silu(torch.add(self.norm(x) * (1 + self.table), self.table, alpha=2))

    def scaled_by_itself(self, x):
        h = self.norm(x)
        return F.silu(h * h + self.table)

    def changed_between(self, x):
        x = x * 1
        h = self.norm(x)
        x.add_(1)
        h = h * (1 + x.mean((2, 3), keepdim=True)) + self.table.expand(x.shape[0], -1, -1, -1)
        return F.silu(h)

    def gain_of_what_changes(self, x):
        table = self.table.expand(x.shape[0], -1, -1, -1) * 1
        gain = 1 + table
        table.mul_(2)
        return F.silu(self.norm(x) * gain + self.table)

    def summed_in_place(self, x):
        h = x * 1
        skip = h
        h += 1
        return F.silu(self.norm(h)) + skip

    def both(self, x):
        return F.silu(self.norm(x)) + self.norm(x)

    def one_plus(self, x):
        table = self.table.expand(x.shape[0], -1, -1, -1)
        return self.act(self.norm(x) * (table + 1) + table)

    def gain(self, x):
        table = self.table.expand(x.shape[0], -1, -1, -1)
        return self.act(torch.addcmul(table, self.norm(x), table))


@pytest.mark.parametrize(
    ("way", "num_fused"),
    {
        "plain": 1,
        "used_twice": 0,
        "sigmoid_used_twice": 0,
        "sigmoid_of_another": 0,
        "silu_in_place_and_read": 0,
        "dropped_out_between": 0,
        "scaled_in_place": 0,
        "shifted_alone": 0,
        "added_with_alpha": 0,
        "scaled_by_itself": 0,
        "summed_in_place": 1,
        "both": 1,
        "one_plus": 1,
        "gain": 1,
    }.items(),
)
def test_what_follows_a_norm(way, num_fused):
    module, original, report = accelerated(Block(way), X)
    assert report.fused.get("norms with SiLU", 0) == num_fused and report.norms == (1, 1)
    assert_same(module.eval(), original.eval(), X)
    assert_same(module.double(), original.double(), X[:1].double())


class Hidden(Block):
    """What a graph would not show."""

    def by_value(self, x):
        return F.silu(self.norm(x)) if x.sum() > -1e9 else x

    def by_size(self, x):
        return F.silu(self.norm(x)) if len(x) < 64 else x

    def by_kind(self, x):
        h = F.silu(self.norm(x))
        return h if isinstance(x, torch.Tensor) and x.std() > 0 else -h

    def by_chance(self, x):
        return F.silu(self.norm(x)) * (1 if random.random() < 2 else 0)

    def by_a_file(self, x):
        return F.silu(self.norm(x)) if pathlib.Path("/").exists() else x

    def by_the_environment(self, x):
        return F.silu(self.norm(x)) if os.environ.get("NOWHERE") is None else x

    def by_the_clock(self, x):
        return F.silu(self.norm(x)) if time.monotonic() > 0 else x

    def kept_in_itself(self, x):
        self.kept = F.silu(self.norm(x))
        return self.kept

    def without_gradient(self, x):
        with torch.no_grad():
            table = F.silu(self.norm(x))
        return table + x

    def in_full_precision(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.silu(self.norm(x))

    def in_a_context(self, x):
        with contextlib.nullcontext():
            return F.silu(self.norm(x))

    def recomputed(self, x):
        return checkpoint(lambda x: F.silu(self.norm(x)), x, use_reentrant=False)

    def of_a_constant(self, x):
        return F.silu(self.norm(x)) * CONSTANT

    def by_an_object_that_counts(self, x):
        return COUNTER(F.silu(self.norm(x)))

    def of_somebodys_function(self, x):
        return WrongGradient.apply(F.silu(self.norm(x)), 2)


CONSTANT = torch.tensor(2.0)


class Counter:
    """As somebody's attention processor that keeps maps."""

    def __init__(self):
        self.seen = []

    def __call__(self, x):
        self.seen.append(x.shape)
        return x


COUNTER = Counter()


@pytest.mark.parametrize(
    ("way", "reason"),
    {
        "by_value": "TraceError",
        "by_size": "'len' is not supported",
        "by_kind": "it calls isinstance",
        "by_chance": "it draws random numbers itself",
        "by_a_file": "it calls __new__ of pathlib",
        "by_the_environment": "it calls __getitem__ of os",
        "by_the_clock": "it calls monotonic of time",
        "kept_in_itself": "it keeps something of what it computes",
        "without_gradient": "it calls _set_grad_enabled",
        "in_full_precision": "it calls autocast",
        "in_a_context": "it calls nullcontext",
        "recomputed": "it calls torch.utils.checkpoint",
        "of_a_constant": "it computes with a tensor that is none of its",
        "by_an_object_that_counts": "it calls a Counter with attributes",
        "of_somebodys_function": "it calls torch.autograd.Function",
    }.items(),
)
def test_what_a_graph_does_not_show_stays(way, reason):
    """Norm and convolution are ours there, too, and a line says why SiLU is apart."""
    state = random.getstate()
    module, original, report = accelerated(Hidden(way), X)
    assert reason in report.reasons["norm"] and report.reasons["norm"].startswith("SiLU apart, for ")
    assert report.fused == {} and (report.norms, report.convolutions) == ((1, 1), (1, 1))
    assert way == "by_chance" or random.getstate() == state
    assert all(type(shape) is torch.Size for shape in COUNTER.seen)
    module.kept = original.kept = None
    assert_same(module, original, X)


def test_what_collects_garbage_meanwhile_is_not_the_module():
    """As hypothesis does, whose callback asks the clock."""
    asked = []
    gc.callbacks.append(lambda phase, info: asked.append(time.perf_counter()))
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        *_, report = accelerated(Block("plain"), X)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.pop()
    assert asked and gc.isenabled() and report.fused == {"norms with SiLU": 1}


def test_what_changes_between_norm_and_silu_is_not_read_late():
    """No gradient goes through such a block, so it is asked of the graph."""
    for way in ("changed_between", "gain_of_what_changes"):
        block = Block(way)
        graph, _ = trace(block, Call.of((X,), {}), training=False)
        assert fuse(graph, block) == ({}, {})
    graph, _ = trace(Block("one_plus"), Call.of((X,), {}), training=False)
    assert fuse(graph, block) == ({"norms with SiLU": 1}, {"act": nn.SiLU, "norm": GroupNorm})


class WithoutGradient(Block):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


def test_a_module_that_gives_no_gradient_gives_none():
    module, original, report = accelerated(WithoutGradient("plain"), X)
    assert report.reasons == {"norm": "SiLU apart, for it calls inference_mode"} and report.norms == (1, 1)
    output = module(X)
    assert not output.requires_grad and output.is_inference()
    torch.testing.assert_close(output, original(X), rtol=1e-4, atol=1e-5)


def test_a_norm_without_a_trace_says_why():
    _, _, report = accelerated(Block("used_twice"), X)
    assert report.reasons == {"norm": "SiLU apart, for its output has other uses"}


def test_what_is_called_in_several_ways_is_traced_for_none():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Optional()

        def forward(self, x):
            return self.inner(self.inner(x), x)

    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(4, 16)

        def forward(self, x, skip=None):
            return F.silu(self.norm(x)) if skip is None else F.silu(self.norm(x)) + skip

    module, original, report = accelerated(Twice(), X)
    assert report.reasons == {"inner.norm": "SiLU apart, for it is called in several ways"}
    assert_same(module, original, X)
    module, original, report = accelerated(Twice().inner, X)
    assert report.fused == {"norms with SiLU": 1}
    assert_same(module, original, X, X)  # called in another way than it was traced
