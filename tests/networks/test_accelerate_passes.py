"""What networks of others have around our ops: copies for convolutions, and questions how many axes there are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdmd.networks.accelerate.fusions import fuse
from fastdmd.networks.accelerate.layers import channels_last
from fastdmd.networks.accelerate.tracing import Call, trace
from fastdmd.networks.accelerate.watched import Untraceable
from tests.helpers.accelerated import assert_same
from tests.networks.test_accelerate import accelerated
from tests.networks.test_accelerate_traces import Block

X = torch.randn(2, 16, 8, 8)
LAST = X.contiguous(memory_format=torch.channels_last)


def test_a_copy_is_one_where_a_contiguous_one_is():
    """Of an image in channels_last, whatever came in; what is that already, and contiguous, is itself."""
    for x in (X, LAST, X[:, ::2], X[:1].expand(3, -1, -1, -1), X.mT):
        y = channels_last(x)
        assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
        assert y.is_contiguous(memory_format=torch.channels_last)
    for x in (X[:, :1].contiguous(), X[0]):
        assert channels_last(x) is x
    assert channels_last(X[0].mT).is_contiguous()


@pytest.mark.parametrize("example", [X, LAST], ids=["contiguous", "channels_last"])
def test_torch_func_takes_copies(example):
    """Whose transforms know contiguous ones alone."""
    module, original, _ = accelerated(Copies("before_a_convolution"), example)
    for x in (X, LAST):
        found, expected = (torch.func.vmap(network)(torch.stack([x, x])) for network in (module, original))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found, expected = (torch.func.jvp(network, (x,), (x,)) for network in (module, original))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Copies(Block):
    """Copies that convolutions alone read, and others."""

    def __init__(self, way):
        super().__init__(way)
        self.one, self.relu = nn.Conv2d(16, 16, 1), nn.ReLU(inplace=True)

    def before_a_convolution(self, x):
        return F.silu(self.norm(self.one(x.contiguous())))

    def before_two(self, x):
        h = self.norm(x).contiguous()
        return self.one(h) + F.conv2d(h, self.conv.weight, padding=1)

    def read_as_it_lies(self, x):
        h = x.contiguous()
        return self.one(h) + h.view(2, 8, 8, 16).permute(0, 3, 1, 2)

    def laid_out_otherwise(self, x):
        return self.one(x.contiguous(memory_format=torch.channels_last))

    def for_a_norm(self, x):
        return F.silu(self.norm(x.contiguous()))

    def changed_before(self, x):
        x = x * 2
        h = x.contiguous()
        x += 1
        return self.one(h) + x

    def a_view_changed_before(self, x):
        x = x * 2
        h = x.contiguous()
        self.relu(x[:, :8])
        return self.one(h) + x

    def viewed(self, x):
        return self.one(x.contiguous()).view(x.shape[0], 1024).view(x.shape)

    def changed_after(self, x):
        x = x * 2
        y = self.one(x.contiguous())
        x += 1
        return y * x


@pytest.mark.parametrize(
    ("way", "num_copies"),
    {
        "before_a_convolution": 1,
        "before_two": 1,
        "read_as_it_lies": 0,
        "laid_out_otherwise": 0,
        "for_a_norm": 0,
        "changed_before": 0,
        "a_view_changed_before": 0,
        "viewed": 1,
        "changed_after": 1,
    }.items(),
)
def test_copies_for_convolutions_are_channels_last(way, num_copies):
    """And are copies still: of what is changed later, its gradient has what it was."""
    block = Copies(way)
    graph, _ = trace(block, Call.of((X,), {}), training=True)
    counts, expected = fuse(graph, block)
    assert counts.get("copies", 0) == num_copies and ("one" in expected) == (num_copies > 0)
    layouts = (LAST,) if way == "changed_after" else (X, LAST)  # of what is no copy torch refuses the gradient then
    for example in layouts:
        module, original, report = accelerated(Copies(way), example)
        assert "copies" not in report.fused
        for x in layouts:
            assert_same(module, original, x)


def test_a_convolution_that_is_told_something_sees_a_contiguous_image():
    """By hooks, forwards of its own and other classes, later."""

    class Other(nn.Conv2d):
        def forward(self, x):
            seen.append(x.is_contiguous())
            return super().forward(x)

    def hook(module):
        module.one.register_forward_pre_hook(lambda conv, given: seen.append(given[0].is_contiguous()))

    def own_forward(module):
        module.one.forward = lambda x: (seen.append(x.is_contiguous()), nn.Conv2d.forward(module.one, x))[1]

    def other_class(module):
        module.one = Other(16, 16, 1)

    for tell in (hook, own_forward, other_class):
        seen = []
        module, *_ = accelerated(Copies("before_a_convolution"), LAST)
        tell(module)
        module(LAST)
        assert seen == [True], tell


def test_an_activation_with_a_forward_of_its_own_is_called():
    for way in ("before", "after"):
        block = Block("one_plus")
        if way == "before":
            block.act.forward = torch.tanh
        module, original, report = accelerated(block, X)
        module.act.forward = original.act.forward = torch.tanh
        assert report.fused == ({} if way == "before" else {"norms with SiLU": 1})
        assert_same(module, original, X)


class ByAxes(Block):
    """As diffusers' attention, which takes images or sequences."""

    def forward(self, x):
        return getattr(self, self.way)(x)

    def asked_once(self, x):
        h = x.reshape(x.shape[0], x.shape[1], -1) if x.ndim == 4 and x.dim() == 4 else x
        return F.silu(self.norm(h)).reshape(x.shape)

    def asked_after_a_change(self, x):
        x = x.squeeze_(0) if self.training else x
        return F.silu(self.norm(x[None] if x.ndim == 3 else x))


def test_how_many_axes_an_argument_has_is_part_of_how_it_is_called():
    module, original, report = accelerated(ByAxes("asked_once"), X)
    assert report.fused == {"norms with SiLU": 1}
    assert_same(module, original, X)
    assert_same(module, original, X.flatten(2))  # by its own forward


def test_what_changes_its_axes_is_not_asked_before():
    block = ByAxes("asked_after_a_change").train()
    with pytest.raises(Untraceable, match="control flow"):
        trace(block, Call.of((X,), {}), training=True)
    module, original, _ = accelerated(block, X)
    assert module(X[:1].clone()).shape == original(X[:1].clone()).shape == (1, 16, 8, 8)
