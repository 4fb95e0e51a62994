"""What networks of others have around our ops: copies and divisions by one, and questions how many axes there are."""

import pytest
import torch
from torch.nn import functional as F

from fastdmd.networks.accelerate.fusions import fuse
from fastdmd.networks.accelerate.tracing import Call, trace
from tests.helpers.accelerated import assert_same
from tests.networks.test_accelerate import accelerated
from tests.networks.test_accelerate_traces import Block

X = torch.randn(2, 16, 8, 8)


class Copies(Block):
    """Passes over memory that change nothing, and some that may."""

    def before_a_convolution(self, x):
        return F.silu(self.norm(self.conv(x.contiguous())))

    def before_two(self, x):
        h = self.norm(x).contiguous()
        return self.conv(h) + F.conv2d(h, self.conv.weight, padding=1)

    def of_a_sum(self, x):
        return F.silu(self.norm((x + self.table) / 1.0)) * 1

    def read_as_it_lies(self, x):
        h = x.contiguous()
        return self.conv(h) + h.view(2, 8, 8, 16).permute(0, 3, 1, 2)

    def laid_out_otherwise(self, x):
        return self.conv(x.contiguous(memory_format=torch.channels_last))

    def changed_before_it_is_read(self, x):
        x = x * 2
        h = x.contiguous()
        x += 1
        return self.conv(h) + x

    def of_a_sum_that_is_changed(self, x):
        h = x + self.table
        y = h / 1
        y += 1
        return F.silu(self.norm(h)) + y

    def halved(self, x):
        return F.silu(self.norm((x + self.table) / 2))


@pytest.mark.parametrize(
    ("way", "num_copies"),
    {
        "before_a_convolution": 1,
        "before_two": 1,
        "of_a_sum": 1,
        "read_as_it_lies": 0,
        "laid_out_otherwise": 0,
        "changed_before_it_is_read": 0,
        "of_a_sum_that_is_changed": 0,
        "halved": 0,
    }.items(),
)
def test_passes_for_nothing(way, num_copies):
    block = Copies(way)
    graph, _ = trace(block, Call.of((X,), {}), training=True)
    counts, expected = fuse(graph, block)
    assert counts.get("passes", 0) == num_copies
    assert ("conv" in expected) == way.startswith("before")  # how it is found then
    module, original, report = accelerated(Copies(way), X.contiguous(memory_format=torch.channels_last))
    assert "passes" not in report.fused
    assert_same(module, original, X)
    assert_same(module, original, X.contiguous(memory_format=torch.channels_last))


def test_a_hook_on_a_convolution_sees_the_copy_before_it():
    x, seen = X.contiguous(memory_format=torch.channels_last), []
    module, *_ = accelerated(Copies("before_a_convolution"), x)
    module(x)
    module.conv.register_forward_pre_hook(lambda conv, given: seen.append(given[0].is_contiguous()))
    module(x)
    assert seen == [True, False]  # then by the block around it, as always


class ByAxes(Block):
    """As diffusers' attention, which takes images or sequences."""

    def forward(self, x):
        h = x.reshape(x.shape[0], x.shape[1], -1) if x.ndim == 4 and x.dim() == 4 else x
        return F.silu(self.norm(h)).reshape(x.shape)


def test_how_many_axes_an_argument_has_is_part_of_how_it_is_called():
    module, original, report = accelerated(ByAxes(None), X)
    assert report.fused == {"norms with SiLU": 1}
    assert_same(module, original, X)
    assert_same(module, original, X.flatten(2))  # by its own forward
