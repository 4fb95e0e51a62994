"""conv3x3 against torch's convolution in float64, on every instruction set, and where it leaves the work to torch."""

import functools
import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastdmd import ops
from fastdmd.ops._registry import chosen
from tests.helpers import convolutions
from tests.helpers.convolutions import results

module = importlib.import_module("fastdmd.ops.conv3x3")  # behind the function of its name
# B, C_in, C_out, H, W: whole and cut tiles, one row, all widths of a panel, more than one block, one or two threads,
# weights transformed in pieces; tiles of 2x2, of 4x4 but for the gradient of the weight, of 4x4 throughout.
SHAPES = [
    (1, 48, 96, 8, 8),
    (1, 80, 112, 9, 8),
    (1, 144, 48, 8, 8),
    (64, 16, 64, 1, 3),
    (20, 96, 48, 5, 6),
    (70, 32, 16, 1, 1),
    (4, 16, 16, 8, 8),
    (3, 48, 48, 7, 7),
    (2, 16, 80, 9, 12),
    (1, 80, 32, 16, 17),
    (9, 64, 144, 14, 14),
    (40, 48, 48, 7, 7),
    (20, 32, 80, 9, 11),
    (1, 16, 32, 64, 65),
    (90, 96, 16, 3, 4),
]


inputs = functools.partial(convolutions.inputs, side=3)


def own_and_exact(shape, *, bias=True, weight_format=torch.contiguous_format, dtype=torch.float32):
    """Of ours, whether it suits or not, and of torch in float64: see `results`."""
    x, weight, bias = (None if t is None else t.to(dtype) for t in inputs(shape, bias=bias))
    weight = weight.contiguous(memory_format=weight_format)
    own = results(torch.ops.fastdmd.conv3x3, x, weight, bias, dtype=dtype)
    doubles = (None if t is None else t.double() for t in (x, weight, bias))
    exact = results(lambda *a: F.conv2d(*a, padding=1), *doubles, dtype=dtype)
    assert own[0].is_contiguous(memory_format=torch.channels_last) and own[2].stride() == weight.stride()
    assert all(o.dtype == dtype for o in own)
    return own, exact


def worst_error(shape, **options):
    own, exact = own_and_exact(shape, **options)
    return max(((o - e).abs().max() / e.abs().max()).item() for o, e in zip(own, exact, strict=True))


def assert_rounded_once(shape, **options):
    """In bfloat16 all is computed as in float32, and rounded at the end."""
    own, exact = own_and_exact(shape, dtype=torch.bfloat16, **options)
    for o, e in zip(own, exact, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=2**-8, atol=3e-6 * e.abs().max().item())


def is_native():
    return "native" in ops.implementations("conv3x3")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_float64(shape):
    assert worst_error(shape) < 3e-6
    assert worst_error(shape, weight_format=torch.channels_last) < 3e-6
    assert worst_error(shape, bias=False) < 3e-6


@pytest.mark.parametrize("sides", itertools.product(range(4, 8), repeat=2), ids=str)
def test_tiles_at_the_edges_have_the_outputs_that_are_left(sides):
    """Of enough images that each kind of tile, of 1 to 4 by 1 to 4 outputs, fills steps of its own."""
    assert worst_error((48, 16, 32, *sides)) < 2e-6
    assert worst_error((8, 16, 16, *(side - 3 for side in sides))) < 2e-6  # 2x2, or 4x4 as one


@pytest.mark.skipif(chosen("conv3x3", "cpu") is module.reference, reason="bfloat16 is torch's own here")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_rounded_once(shape):
    for weight_format in (torch.contiguous_format, torch.channels_last):
        assert_rounded_once(shape, weight_format=weight_format)
    assert_rounded_once(shape, bias=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_shows(dtype, value):
    """Where torch's has it, if not the same: infinities of a tile may cancel to NaN."""
    x, weight, bias = (t.to(dtype) for t in inputs((2, 16, 32, 12, 12)))
    x[1, 3, 5, 6] = value
    weight *= 8  # beyond the largest number
    y = torch.ops.fastdmd.conv3x3(x, weight, bias)
    expected = F.conv2d(x, weight, bias, padding=1)
    assert not y[~expected.isfinite()].isfinite().any() and y[0].isfinite().all()


@pytest.mark.parametrize(
    "shape", [(8, 48, 48, 14, 14), (64, 32, 32, 14, 14), (32, 16, 16, 28, 28), (8, 16, 16, 128, 128)]
)
def test_weight_gradients_err_no_more_than_twice_what_torch_errs(shape):
    """Of many tiles: what they add up to may not lose digits by their number."""
    x, weight, _ = inputs(shape, bias=False)
    own, plain, exact = (
        results(function, *(t.to(dtype) for t in (x, weight)))[2].double()
        for function, dtype in (
            (lambda *a: torch.ops.fastdmd.conv3x3(*a, None), torch.float32),
            (lambda *a: F.conv2d(*a, padding=1), torch.float32),
            (lambda *a: F.conv2d(*a, padding=1), torch.float64),
        )
    )
    assert (own - exact).square().mean().sqrt() < 2 * (plain - exact).square().mean().sqrt()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# few tiles: by groups of channels; both; many tiles of one group; fewer tiles, or channels, than threads; weights in
# pieces, tiles of 2x2 and of 4x4
@pytest.mark.parametrize(
    "shape",
    [
        (2, 64, 128, 8, 8),
        (20, 16, 64, 16, 16),
        (40, 48, 48, 7, 7),
        (1, 16, 112, 4, 4),
        (3, 32, 16, 20, 20),
        (1, 144, 48, 8, 8),
        (1, 80, 32, 16, 17),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit_of_outputs_and_err_no_more_in_sums(threads, shape, dtype):
    threads(1)
    one, exact = own_and_exact(shape, dtype=dtype)
    for count in (2, 3, 4, 6, 7, 16):
        threads(count)
        own, _ = own_and_exact(shape, dtype=dtype)
        assert torch.equal(own[0], one[0]) and torch.equal(own[1], one[1])
        for o, e in zip(own[2:], exact[2:], strict=True):
            torch.testing.assert_close(
                o.double(), e, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=3e-6 * e.abs().max().item()
            )


EVERYWHERE = """
import sys
import torch
from fastdmd import _native
from tests.ops.test_conv3x3 import SHAPES, assert_rounded_once, own_and_exact, worst_error
assert _native.build_facts().endswith(sys.argv[1]), _native.build_facts()
for weight_format in (torch.contiguous_format, torch.channels_last):
    for shape in SHAPES:
        assert worst_error(shape, weight_format=weight_format) < 3e-6
        assert_rounded_once(shape, weight_format=weight_format)
for shape in ((1, 144, 48, 8, 8), (1, 80, 32, 16, 17)):
    found = []
    for threads in (1, 7):
        torch.set_num_threads(threads)
        found.append(own_and_exact(shape)[0])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
"""


@pytest.mark.parametrize("allowed, name", [("default", "generic"), ("avx2", "avx2")])
def test_every_instruction_set(allowed, name):
    if not is_native():
        pytest.skip("no native library: " + ops.unavailable("conv3x3")["native"])
    if name == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("this machine has no AVX2")
    result = subprocess.run(
        [sys.executable, "-c", EVERYWHERE, name],
        capture_output=True,
        text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": allowed},
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not is_native(), reason="there is no native library to choose")
def test_where_torch_does_it():
    x, weight, bias = inputs((4, 32, 32, 14, 14))
    assert module._suits(x, weight) and module._suits(x.bfloat16(), weight.bfloat16())
    assert not module._suits(x.contiguous(), weight)
    assert module._suits(x.contiguous(), weight.contiguous(memory_format=torch.channels_last))
    assert not module._suits(x.double(), weight.double()) and not module._suits(x.half(), weight.half())
    assert not module._suits(x.bfloat16(), weight) and not module._suits(x, weight, bias.bfloat16())
    assert not module._suits(x[:, :24].contiguous(memory_format=torch.channels_last), weight[:, :24])
    assert not module._suits(x, weight[:24])
    eight, large = x[:2, :, :4, :4].contiguous(memory_format=torch.channels_last), torch.empty(4112, 32, 3, 3)
    assert module._suits(eight, weight) and not module._suits(eight[:1], weight)
    assert module._suits(x, large) and not module._suits(x.bfloat16(), large.bfloat16())
    assert not module._suits(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not module._suits(x, weight) and ops.conv3x3(x, weight, bias).dtype == torch.bfloat16
    assert torch.equal(ops.conv3x3(x.contiguous(), weight, bias), F.conv2d(x.contiguous(), weight, bias, padding=1))


def test_without_channels():
    """As torch has it: none to read make zeros and the bias, none to write are refused."""
    x, weight, bias = inputs((4, 32, 32, 14, 14))
    nothing = [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x[:, :0], weight[:, :0])]
    y = ops.conv3x3(*nothing, bias)
    assert torch.equal(y, F.conv2d(*nothing, bias, padding=1))
    assert [grad.shape for grad in torch.autograd.grad(y.sum(), nothing)] == [t.shape for t in nothing]
    with pytest.raises(RuntimeError):
        ops.conv3x3(x, weight[:0])
    if is_native():
        native = torch.ops.fastdmd_native
        for call in (
            lambda: native.conv3x3(x, weight[:0], None),
            lambda: native.conv3x3_backward(x[:, :0], x, weight[:0], True, True),
            lambda: native.conv3x3_backward(x, x[:, :0], weight[:, :0], True, True),
        ):
            with pytest.raises(RuntimeError, match="fastdmd.conv3x3: expected .* of a multiple of 16 channels"):
                call()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients(wanted):
    tensors = [t.requires_grad_(w) for t, w in zip(inputs((4, 32, 32, 8, 8)), wanted, strict=True)]
    one = [t for t in tensors if t.requires_grad]
    (grad,) = torch.autograd.grad(ops.conv3x3(*tensors).square().sum(), one)
    (expected,) = torch.autograd.grad(F.conv2d(*tensors, padding=1).square().sum(), one)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_traces_and_checks():
    x, weight, bias = inputs((4, 16, 32, 8, 8))
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.fastdmd.conv3x3.default, tensors)
    backward = (torch.randn(4, 32, 8, 8).contiguous(memory_format=torch.channels_last), x.detach(), weight.detach())
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.fastdmd.conv3x3_backward.default, (*backward, *wanted))
    compiled = torch.compile(ops.conv3x3, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), ops.conv3x3(*tensors))
    with pytest.raises(ValueError, match=r"fastdmd.conv3x3: expected weight of shape \[C_out, 16, 3, 3\], got \(32, 8"):
        ops.conv3x3(x, weight[:, :8])
    with pytest.raises(ValueError, match=r"fastdmd.conv3x3: expected bias of shape \(32,\), got \(31,\)"):
        ops.conv3x3(x, weight, bias[:31])
    with pytest.raises(ValueError, match=r"fastdmd.conv3x3: expected x of shape \[B, C, H, W\], got \(16, 8, 8\)"):
        ops.conv3x3(x[0], weight)


def test_nothing_is_hidden():
    """NaN and infinity of a pixel reach the outputs around it, and those alone."""
    x, weight, _ = inputs((4, 16, 16, 12, 12))
    for value in (float("nan"), float("inf")):
        x[1, 3, 5, 6] = value
        y = ops.conv3x3(x, weight)
        assert not y[1, :, 4:7, 5:8].isfinite().any() and y[[0, 2, 3]].isfinite().all()
        assert y[1, :, :4].isfinite().all() and y[1, :, 8:].isfinite().all()  # the tiles around it, no other


def test_the_layout_of_either_is_that_of_the_output():
    """As with torch's convolution, whose output is channels_last where image or weight is."""
    x, weight, bias = inputs((4, 32, 32, 14, 14))
    last = weight.contiguous(memory_format=torch.channels_last)
    for one, other in ((x, weight), (x.contiguous(), last), (x.contiguous(), weight), (x[:, :, ::2], last)):
        one = one.detach().requires_grad_()
        y, expected = ops.conv3x3(one, other, bias), F.conv2d(one, other, bias, padding=1)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        (grad,) = torch.autograd.grad(y.square().sum(), one)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), one)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4 * expected_grad.abs().max().item())


def test_a_gpu_leaves_it_to_torch():
    assert list(ops.implementations("conv3x3", "cuda")) == ["reference"]
    assert "native code for CPUs alone" in ops.unavailable("conv3x3", "cuda")["triton"]


def test_its_flops_are_those_of_the_definition():
    x, weight, bias = inputs((4, 32, 16, 14, 14))
    with FlopCounterMode(display=False) as counter:
        ops.conv3x3(x.requires_grad_(), weight.requires_grad_(), bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 14 * 14 * weight.numel()


def test_what_is_traced_has_the_strides_of_what_runs():
    """Where a size is 1, more than one set of strides is channels_last."""
    for shape in ((80, 16, 1, 1), (80, 16, 1, 3), (1, 16, 32, 32)):
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        weight = torch.randn(16, 16, 3, 3)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            traced = ops.conv3x3(mode.from_tensor(x), mode.from_tensor(weight))
        assert traced.stride() == ops.conv3x3(x, weight).stride()
