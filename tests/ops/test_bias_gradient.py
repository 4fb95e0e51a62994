"""The gradient of a bias: what autograd makes of one, in every layout and precision, again and again the same."""

import pytest
import torch

from fastdmd import ops
from tests.helpers.op_cases import DEVICES

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(2, 64, 8, 8), (3, 5, 7, 9), (1, 1, 3, 3), (4, 130, 1, 1), (2, 300, 5, 3), (0, 4, 2, 2), (2, 3, 0, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
def test_layouts_and_budget(layout, dtype, device):
    for shape in SHAPES if device == "cpu" else [*SHAPES, (40, 192, 64, 64), (3, 1152, 31, 17)]:
        grad_y = torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=LAYOUTS[layout])
        bias = torch.zeros(shape[1], dtype=torch.float64, device=device, requires_grad=True)
        (grad_y.double() + bias[:, None, None]).backward(grad_y.double())
        found = ops.bias_gradient(grad_y)
        assert found.shape == bias.shape and found.dtype == dtype
        scale = grad_y.double().square().sum((0, 2, 3)).sqrt() + found.double().abs()
        assert (found.double() - bias.grad).abs().le(8 * torch.finfo(dtype).eps * scale).all()
        assert torch.equal(ops.bias_gradient(grad_y), found)


def test_not_dense_and_infinite():
    grad_y = torch.randn(3, 8, 6, 6)[:, ::2, :, 1:]
    torch.testing.assert_close(ops.bias_gradient(grad_y), grad_y.sum((0, 2, 3)))
    grad_y = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    grad_y[1, 1, 2, 3], grad_y[0, 2, 0, 0], grad_y[1, 2, 3, 3] = torch.nan, torch.inf, -torch.inf
    assert ops.bias_gradient(grad_y).isnan().tolist() == [False, True, True]


def test_gradcheck():
    grad_y = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.bias_gradient, grad_y)
    assert torch.autograd.gradgradcheck(lambda x: ops.bias_gradient(x).square(), grad_y)


def test_forward_mode_and_derivative():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    with torch.autograd.forward_ad.dual_level():
        dual = ops.bias_gradient(torch.autograd.forward_ad.make_dual(x, x.cos()))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, x.cos().sum((0, 2, 3)))


def test_opcheck_and_compile():
    grad_y = torch.randn(2, 16, 4, 5).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fastdmd.bias_gradient.default, (grad_y.requires_grad_(),))
    compiled = torch.compile(ops.bias_gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(grad_y), ops.bias_gradient(grad_y))


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"bias_gradient: expected grad_y of shape \[B, C, H, W\], got \(2, 3\)"):
        ops.bias_gradient(torch.randn(2, 3))
    with pytest.raises(TypeError, match="bias_gradient: expected grad_y to be floating point, got torch.int64"):
        ops.bias_gradient(torch.ones(1, 2, 3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="bias_gradient: expected grad_y to be a tensor, got list"):
        ops.bias_gradient([1.0])
