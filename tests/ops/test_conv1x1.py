"""conv1x1 against torch's convolution in float64, on every instruction set, and where it leaves the work to torch."""

import functools
import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from fastdmd import ops
from tests.helpers import convolutions
from tests.helpers.convolutions import results

module = importlib.import_module("fastdmd.ops.conv1x1")  # behind the function of its name
IS_NATIVE = "native" in ops.implementations("conv1x1")
# B, C_in, C_out, H, W: fewer pixels than a step, whole and cut chunks, all widths of a panel, none
SHAPES = [
    (1, 16, 16, 1, 1),
    (1, 48, 32, 1, 5),
    (2, 64, 80, 3, 7),
    (3, 96, 16, 8, 4),
    (4, 144, 48, 7, 7),
    (1, 32, 288, 14, 15),
    (13, 112, 96, 9, 11),
    (0, 16, 32, 4, 4),
]


inputs = functools.partial(convolutions.inputs, side=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_no_more_than_rounding(shape, bias):
    given = inputs(shape, bias=bias)
    own = results(torch.ops.fastdmd.conv1x1, *given)  # whether it suits or not
    exact = results(F.conv2d, *(None if t is None else t.double() for t in given))
    assert own[0].is_contiguous(memory_format=torch.channels_last)
    for o, e in zip(own, exact, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=0, atol=1e-6 * max(1, e.abs().max().item() if e.numel() else 0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_of_many_pixels_it_errs_as_torch(layout):
    x, weight, bias = inputs((16, 48, 96, 28, 28))
    weight = weight.contiguous(memory_format=layout)
    own, plain = results(ops.conv1x1, x, weight, bias), results(F.conv2d, x, weight, bias)
    exact = results(F.conv2d, x.double(), weight.double(), bias.double())
    assert own[0].stride() == plain[0].stride()
    for o, p, e in zip(own, plain, exact, strict=True):
        assert (o - e).square().mean().sqrt() < 1.5 * (p - e).square().mean().sqrt()


def test_threads_change_no_bit():
    threads = torch.get_num_threads()
    given = inputs((20, 96, 112, 9, 9))
    try:
        torch.set_num_threads(1)
        one = results(ops.conv1x1, *given)
        for count in (2, 3, 7, 16):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(results(ops.conv1x1, *given), one, strict=True))
    finally:
        torch.set_num_threads(threads)


EVERYWHERE = """
import sys
from fastdmd import _native
from tests.ops import test_conv1x1
assert _native.build_facts().endswith(sys.argv[1]), _native.build_facts()
for shape in test_conv1x1.SHAPES:
    test_conv1x1.test_errs_no_more_than_rounding(shape, True)
"""


@pytest.mark.parametrize("allowed, name", [("default", "generic"), ("avx2", "avx2")])
def test_every_instruction_set(allowed, name):
    if not IS_NATIVE:
        pytest.skip("no native library: " + ops.unavailable("conv1x1")["native"])
    if name == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("this machine has no AVX2")
    result = subprocess.run(
        [sys.executable, "-c", EVERYWHERE, name],
        capture_output=True,
        text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": allowed},
    )
    assert result.returncode == 0, result.stderr


def test_where_torch_does_it():
    x, weight, bias = inputs((4, 32, 48, 8, 8))
    suits = lambda *given: module._convolution.can_be_ours(*given, None, module.DTYPES)  # noqa: E731
    assert suits(x, weight)
    assert not suits(x.contiguous(), weight) and not suits(x.double(), weight.double())
    assert not suits(x.bfloat16(), weight.bfloat16()) and not suits(x, weight[:24])
    assert not suits(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu"):
        assert not suits(x, weight) and ops.conv1x1(x, weight, bias).dtype == torch.bfloat16
    for given in (x.contiguous(), x[:, :, ::2], x[:, :24]):
        kernel = weight[:, : given.shape[1]]
        y, expected = ops.conv1x1(given, kernel, bias), F.conv2d(given, kernel, bias)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected)
    assert list(ops.implementations("conv1x1", "cuda")) == ["reference"]


def test_a_weight_may_lie_as_it_likes():
    x, weight, bias = inputs((4, 32, 48, 8, 8))
    turned = weight[:, :, 0, 0].t().contiguous().t()[:, :, None, None]
    for o, e in zip(results(ops.conv1x1, x, turned, bias), results(F.conv2d, x, turned, bias), strict=True):
        torch.testing.assert_close(o, e, rtol=1e-4, atol=1e-4)
    wide = torch.randn(48, 64, 1, 1)[:, ::2]
    torch.testing.assert_close(ops.conv1x1(x, wide), F.conv2d(x, wide), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients(wanted):
    tensors = [t.requires_grad_(w) for t, w in zip(inputs((4, 32, 32, 8, 8)), wanted, strict=True)]
    one = [t for t in tensors if t.requires_grad]
    (grad,) = torch.autograd.grad(ops.conv1x1(*tensors).square().sum(), one)
    (expected,) = torch.autograd.grad(F.conv2d(*tensors).square().sum(), one)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_traces_and_checks():
    tensors = [t.requires_grad_() for t in inputs((4, 16, 32, 8, 8))]
    x, weight, bias = tensors
    torch.library.opcheck(torch.ops.fastdmd.conv1x1.default, tensors)
    grad_y = torch.randn(4, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.fastdmd.conv1x1_backward.default, (grad_y, x.detach(), weight.detach(), *wanted)
        )
    compiled = torch.compile(ops.conv1x1, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), ops.conv1x1(*tensors))
    with pytest.raises(ValueError, match=r"fastdmd.conv1x1: expected weight of shape \[C_out, 16, 1, 1\], got \(32, 8"):
        ops.conv1x1(x, weight[:, :8])
    with pytest.raises(ValueError, match=r"fastdmd.conv1x1: expected weight of shape \[C_out, 16, 1, 1\], got .* 3, 3"):
        ops.conv1x1(x, weight.expand(-1, -1, 3, 3))
    with pytest.raises(ValueError, match=r"fastdmd.conv1x1: expected bias of shape \(32,\), got \(31,\)"):
        ops.conv1x1(x, weight, bias[:31])
    if IS_NATIVE:
        with pytest.raises(RuntimeError, match=r"fastdmd.conv1x1: expected .* of a multiple of 16 channels"):
            torch.ops.fastdmd_native.conv1x1(x, weight[:0], None)


@pytest.mark.skipif(not IS_NATIVE, reason="there is no native code to refuse it")
@pytest.mark.parametrize("side", [1, 3])
def test_native_code_refuses_what_it_would_misread(side):
    """Who calls the op behind the function gets an error, forward and backward, no number that means nothing."""
    x, weight, bias = convolutions.inputs((4, 32, 48, 8, 8), side)
    grad_y = torch.randn(4, 48, 8, 8).contiguous(memory_format=torch.channels_last)
    forward, backward = (getattr(torch.ops.fastdmd, f"conv{side}x{side}{suffix}") for suffix in ("", "_backward"))
    y, grads = forward(x, weight, bias), backward(grad_y, x, weight, True, True)
    assert y.shape == grad_y.shape and [g.shape for g in grads] == [x.shape, weight.shape, bias.shape]
    weights = [
        weight.double(),
        weight[:, :16],
        torch.cat([weight, weight], 1),
        weight[0],
        weight[..., :1, :1].expand(-1, -1, 5, 5),
    ]
    if side == 1:
        weights += [weight.half(), weight.bfloat16(), weight[:, :, 0, 0].t().contiguous().t()[:, :, None, None]]
    for wrong in weights:
        for call in (lambda w: forward(x, w, None), lambda w: backward(grad_y, x, w, True, True)):
            with pytest.raises(RuntimeError, match=f"fastdmd.conv{side}x{side}: expected "):
                call(wrong)
    for wrong in (bias.double(), bias[:47], bias[:, None], bias.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match=f"fastdmd.conv{side}x{side}: expected a dense bias"):
            forward(x, weight, wrong)
    for wrong in (grad_y.contiguous(), grad_y.double(), grad_y[:3], grad_y[:, :32], grad_y[..., :7], grad_y[0]):
        with pytest.raises(RuntimeError, match=f"fastdmd.conv{side}x{side}: expected "):
            backward(wrong, x, weight, True, True)
    for wrong in (x.contiguous(), x.double(), x[0], x[:, :, :, :7]):
        with pytest.raises(RuntimeError, match=f"fastdmd.conv{side}x{side}: expected "):
            backward(grad_y, wrong, weight, True, True)


def test_nothing_is_hidden():
    x, weight, bias = inputs((4, 16, 16, 12, 12))
    for value in (float("nan"), float("inf")):
        x[1, 3, 5, 6] = value
        y = ops.conv1x1(x, weight, bias)
        assert not y[1, :, 5, 6].isfinite().any()
        y[1, :, 5, 6] = 0
        assert y.isfinite().all()
