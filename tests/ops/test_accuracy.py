"""Every op x implementation x dtype x shape x layout, against the reference in float64; what is special or large."""

import math
import mmap

import pytest
import torch
from torch.testing import assert_close

from fastdmd import ops
from tests.helpers.op_cases import (
    CASES,
    DEVICES,
    DTYPES,
    LAYOUTS,
    SHAPES,
    Inputs,
    as_tuple,
    assert_all_within_budget,
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_error_budget(case, dtype, shape, layout, device):
    name = case.split()[0]
    arguments = CASES[case](Inputs(shape, dtype, layout, device))
    # In a group of so few values the terms of the gradient cancel, or x + offset and the mean; they are of the size of
    # rstd.
    scale = 0.0
    if shape[2] == 1:
        scale = arguments[3].max().item() if name == "group_norm_silu_backward" else 1e-5**-0.5 * ("moved" in case)
    assert_all_within_budget(name, arguments, device, dtype, scale)


def test_results_do_not_depend_on_the_number_of_threads():
    i = Inputs((3, 8, 150, 99))
    images, level = [i.image() for _ in range(3)], i.level()
    threads = torch.get_num_threads()

    def all_results():
        noised = ops.add_noise(images[0], level, rng_state=ops.rng_state(1))
        losses = torch.ops.fastdmd.dm_loss(*images, 1e-6), torch.ops.fastdmd.fake_loss(*images[:2], level, 0.5)
        norm = torch.ops.fastdmd.group_norm_silu(*Inputs((2, 64, 40, 40)).group_norm(adaptive=True), 1e-5, True)
        return [noised, *losses[0], *losses[1], *norm]

    try:
        torch.set_num_threads(1)
        one = all_results()
        torch.set_num_threads(3)
        three = all_results()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_golden_values_through_every_implementation(golden_losses, device):
    g = {name: value.to(device) for name, value in golden_losses.items()}

    def check(name, arguments, *expected):
        for implementation in ops.implementations(name, device).values():
            for result, value in zip(as_tuple(implementation(*arguments)), expected, strict=True):
                assert (result - value).norm() / value.norm() < 1e-6

    x_gen, sigma_data = g["x_gen"], g["sigma_data"].item()
    check("add_noise", (x_gen, g["dm_sigma"], g["dm_noise"], None, torch.float32), g["dm_noisy"])
    check("dm_gradient", (x_gen, g["D_real"], g["D_fake"], 1e-6), g["dm_grad"])
    check("dm_loss", (x_gen, g["D_real"], g["D_fake"], 1e-6), g["loss_dm"], g["grad_x_gen"])
    fake = g["fake_D"], x_gen, g["fake_sigma"], sigma_data
    check("fake_loss", fake, g["loss_fake"], g["grad_fake_D"])


@pytest.mark.parametrize("device", DEVICES)
def test_special_values(device):
    x_gen = torch.zeros(4, 1, 2, 2, device=device)
    D_fake, D_real = torch.ones_like(x_gen), torch.full_like(x_gen, 2.0)
    D_real[0, 0, 0, 0], D_real[1, 0, 0, 0] = math.nan, -math.inf
    D_real[2] = x_gen[2]  # the teacher reproduces the sample: weight factor 0, clamped
    expected = torch.zeros_like(x_gen)
    expected[2], expected[3] = 1 / 1e-3, -0.5
    for name in ("dm_gradient", "dm_loss"):
        for implementation in ops.implementations(name, device).values():
            *loss, grad = as_tuple(implementation(x_gen, D_real, D_fake, 1e-3))
            assert_close(grad * (grad.numel() if loss else 1), expected)
            assert all(math.isclose(value, 0.5 * (1e6 + 0.25) / 4, rel_tol=1e-6) for value in loss)
    # In the raw form, too: c_skip = 0.5, c_out = sqrt(0.125) at sigma = sigma_data.
    sigma, F_fake, F_real = torch.full((4,), 0.5, device=device), torch.ones_like(x_gen), torch.zeros_like(x_gen)
    F_real[0, 0, 0, 0], F_real[1, 0, 0, 0] = math.nan, math.inf
    for implementation in ops.implementations("dm_loss_raw", device).values():
        _, grad = implementation(x_gen, x_gen, sigma, F_real, F_fake, 0.5, 1e-3)
        expected[2:], expected[:2] = 0.125**0.5 / 1e-3, 0
        assert_close(grad * grad.numel(), expected)
    # SiLU of large arguments, and of NaN.
    x = torch.tensor([-1e4, -90.0, 90.0, 1e4, math.nan], device=device).view(5, 1, 1, 1)
    for implementation in ops.implementations("group_norm_silu", device).values():
        y, _, _ = implementation(
            torch.zeros_like(x),
            torch.ones(1, device=device),
            torch.zeros(1, device=device),
            torch.zeros(5, 1, device=device),
            x.view(5, 1),
            None,
            1,
            1e-5,
            True,
        )
        assert_close(y, torch.nn.functional.silu(x), equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_special_weights_of_the_denoising_loss(device):
    """Any weight of any dtype and stride does as the formula says, EDM's as in fake_loss; NaN and infinity stay."""
    D_x, images = torch.ones(4, 1, 2, 2, device=device), torch.full((4, 1, 2, 2), 3.0, device=device)
    weight = torch.tensor([0.0, 2.0, -1.0, 0.5], device=device)
    exact = -4 / 16 * weight[:, None, None, None].expand(D_x.shape)
    spoiled, infinite = D_x.clone(), weight.clone()
    spoiled[3, 0, 0, 0], infinite[2] = math.nan, math.inf
    for backend, implementation in ops.implementations("denoising_loss", device).items():
        for given in (weight, weight.half(), weight.bfloat16(), weight.double(), weight.repeat_interleave(2)[::2]):
            assert_close(implementation(D_x, images, given), (torch.tensor(1.5, device=device), exact))
        loss, grad = implementation(spoiled, images, infinite)
        assert loss.isnan() and grad[3, 0, 0, 0].isnan() and grad[2].eq(-math.inf).all()
        assert torch.equal(grad[:2], exact[:2]) and torch.equal(grad[3, 0, 1], exact[3, 0, 1])
        sigma = Inputs(D_x.shape, device=device).level()
        karras = ops.implementations("fake_loss", device)[backend](D_x, images, sigma, 0.7)
        assert_close(implementation(D_x, images, sigma**-2 + 0.7**-2), karras)


def unbacked(num_bytes):
    """Address space that takes memory only where it is written."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)


def test_indices_beyond_2_to_31():
    """A gradient of 2^31 + 64 zeros that no memory stands behind: the pages are never written."""
    n = 2**31 + 64
    pages = unbacked(4 * n)
    zeros = torch.frombuffer(pages, dtype=torch.float32, count=n)
    grad = torch.frombuffer(pages, dtype=torch.bfloat16, count=n)
    grad[-1] = math.inf  # found only by an index that does not wrap around; and then nothing else is written
    if "native" not in ops.implementations("adamw_ema_"):
        pytest.skip("the reference would allocate: " + ops.unavailable("adamw_ema_")["native"])
    native = ops.implementations("adamw_ema_")["native"]
    step, learning_rate = torch.zeros(1, dtype=torch.int64), torch.tensor(1e-3)
    norm = native(zeros, grad, zeros, zeros, step, learning_rate, None, None, 0.9, 0.999, 1e-8, 0, 1.0, 0.9, 0, False)
    assert norm.item() == math.inf and step.item() == 0


def test_tables_far_apart_in_memory():
    """Rows of scale, shift and offset lie 2^31 elements apart; no page between them exists."""
    stride = 2**31 + 16
    pages = unbacked(4 * (stride + 16))
    table = torch.frombuffer(pages, dtype=torch.float32).as_strided((2, 4), (stride, 1))
    table[0], table[1] = 1.0, 3.0
    x, weight = torch.randn(2, 4, 3, 3), torch.ones(4)
    for implementation in ops.implementations("group_norm_silu").values():
        far = implementation(x, weight, weight, table, table, table, 2, 1e-5, True)
        near = implementation(x, weight, weight, table.clone(), table.clone(), table.clone(), 2, 1e-5, True)
        assert_close(far[0], near[0], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_an_infinite_sigma_data_is_the_limit(device):
    """D = x_t + sigma * F, and the weight is sigma^-2. At infinite sigma D = sigma_data * F."""
    i = Inputs((2, 3, 4, 5), device=device)
    x_gen, x_t, F_real, F_fake, sigma = i.image(), i.image(), i.image(), i.image(), i.level()
    wide = sigma[:, None, None, None]
    expected = (
        *as_tuple(ops.implementations("dm_loss")["reference"](x_gen, x_t + wide * F_real, x_t + wide * F_fake, 1e-6)),
        (((x_t + wide * F_fake - x_gen) / wide) ** 2).mean(),
        ((F_fake - x_gen) ** 2 / wide**2).mean(),
    )
    for backend in ops.implementations("dm_loss_raw", device):
        names = "dm_loss_raw", "fake_loss_raw", "fake_loss"
        found = {name: ops.implementations(name, device)[backend] for name in names}
        loss, grad = found["dm_loss_raw"](x_gen, x_t, sigma, F_real, F_fake, math.inf, 1e-6)
        raw, _ = found["fake_loss_raw"](F_fake, x_gen, x_t, sigma, math.inf)
        karras, _ = found["fake_loss"](F_fake, x_gen, sigma, math.inf)
        assert_close((loss, grad, raw, karras), expected, rtol=1e-5, atol=1e-6)
        infinite = torch.full_like(sigma, math.inf)
        raw, grad = found["fake_loss_raw"](F_fake, x_gen, x_t, infinite, 0.7)
        assert_close(raw, (F_fake - x_gen / 0.7).square().mean(), rtol=1e-5, atol=1e-6)
        assert found["fake_loss"](F_fake, x_gen, 0 * sigma, 0.7)[0] == math.inf  # as the formula says


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_may_leave_the_range_of_float16(device):
    x_gen, D_fake = torch.zeros(1, 1, 2, 2, device=device).half(), torch.ones(1, 1, 2, 2, device=device).half()
    for implementation in ops.implementations("dm_gradient", device).values():
        grad = implementation(x_gen, x_gen, D_fake, 1e-6)
        assert_close(grad, torch.full((1, 1, 2, 2), 1e6, device=device))


def test_tensors_that_are_not_dense_or_aligned():
    """Strided, expanded, sliced, flipped, and from the middle of a buffer: as their dense copies."""
    dense = torch.randn(2, 4, 6, 5)
    sigma, weight = torch.tensor([0.3, 2.0]), torch.randn(4)
    strided = torch.randn(2, 9, 6, 10)[:, 1::2, :, ::2]
    offset = torch.randn(3 + dense.numel())[3:].view_as(dense)
    sliced = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)[:, 3:7]
    expanded = torch.randn(2, 1, 6, 1).expand(2, 4, 6, 5)
    level, table = sigma[:1].expand(2), torch.randn(4, 4)[::2]
    functions = (
        lambda x: ops.add_noise(x, level, noise=x, scale=level),
        lambda x: ops.dm_gradient(x, 2 * x, x.sin()),
        lambda x: ops.dm_loss(x, x.cos(), x.sin()),
        lambda x: ops.fake_loss(x, x.sin(), level),
        lambda x: ops.denoising_loss(x, x.sin(), level),
        lambda x: ops.group_norm_silu(x, weight, weight, num_groups=2, scale=table, shift=table.flip(1)),
        lambda x: ops.conv3x3(x, torch.ones(1, 4, 3, 3).expand(8, 4, 3, 3)),
    )
    for x in (strided, offset, sliced, expanded, dense.flip(3)):
        for function in functions:
            assert_close(function(x), function(x.clone(memory_format=torch.contiguous_format)))


def test_empty_batches_have_zero_gradients():
    x = torch.zeros(0, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3)
    for implementation in ops.implementations("conv3x3_backward").values():
        grad_x, *grads = implementation(x, x, weight, True, True)
        assert grad_x.shape == x.shape and all(grad.eq(0).all() for grad in grads)
    for y, parameters in (
        (ops.conv3x3, (weight, torch.ones(16))),
        (lambda x, *p: ops.group_norm_silu(x, *p, num_groups=4), (torch.ones(16), torch.ones(16))),
    ):
        parameters = [p.clone().requires_grad_() for p in parameters]
        y(x, *parameters).sum().backward()
        assert all(p.grad.eq(0).all() for p in parameters)
    levels = torch.zeros(0)
    for loss in (ops.dm_loss(x, x, x), ops.fake_loss(x, x, levels), ops.denoising_loss(x, x, levels)):
        assert loss.isnan()  # the mean of nothing, as in PyTorch
