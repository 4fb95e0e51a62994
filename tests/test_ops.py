"""Every op x implementation x dtype x shape x layout, against the reference in float64; and the public functions."""

import math
import mmap
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from fastdmd import _native, ops
from fastdmd.ops.__main__ import main as ops_main

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# What an implementation may add to the error that the reference has in the same dtype, relative to the largest value.
# In float64 the reference is its own truth, and torch's group norm loses two digits by folding the mean into an offset.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Triton's interpreter adds up one by one, and cuts to bfloat16 instead of rounding.
INTERPRETER_SLACK = 8
SHAPES = [(3, 4, 17, 23), (1, 1, 1, 1), (2, 12, 1, 1), (5, 8, 4, 4), (1, 4, 150, 99), (0, 4, 8, 8)]
DTYPES = list(TOLERANCES)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def poison():
    """torch.empty holds NaN, so that an output that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


class Inputs:
    """Makes the arguments of the ops: the same values at every call, in the dtype, layout and device asked for."""

    def __init__(self, shape, dtype=torch.float32, layout=torch.contiguous_format, device="cpu"):
        self.shape, self.dtype, self.layout, self.device = shape, dtype, layout, device
        self.generator = torch.Generator().manual_seed(1)

    def image(self):
        normal = torch.randn(self.shape, generator=self.generator).to(self.dtype)
        return normal.to(self.device).contiguous(memory_format=self.layout)

    def level(self):
        return (torch.rand(self.shape[0], generator=self.generator) * 3 + 0.05).to(self.device)

    def vector(self, *shape, dtype=None):
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def group_norm(self, adaptive):
        B, C = self.shape[:2]
        tables = self.vector(B, 2 * C).chunk(2, dim=1) if adaptive else (None, None)
        return self.image() + 2, self.vector(C), self.vector(C), *tables, math.gcd(C, 4)

    def group_norm_backward(self, adaptive, silu=True):
        *arguments, num_groups = self.group_norm(adaptive)
        _, mean, rstd = ops.implementations("group_norm_silu")["reference"](*arguments, num_groups, 1e-5, silu)
        x, *parameters = arguments
        return self.image(), x, mean, rstd, *parameters, num_groups, silu


CASES = {
    "add_noise": lambda i: (i.image(), i.level(), i.image(), None, i.dtype),
    "add_noise scaled": lambda i: (i.image(), i.level(), i.image(), i.level(), torch.bfloat16),
    "dm_gradient": lambda i: (i.image(), i.image(), i.image(), 1e-6),
    "dm_loss": lambda i: (i.image(), i.image(), i.image(), 1e-6),
    "dm_loss_raw": lambda i: (i.image(), i.image(), i.level(), i.image(), i.image(), 0.5, 1e-6),
    "fake_loss": lambda i: (i.image(), i.image(), i.level(), 0.7),
    "fake_loss_raw": lambda i: (i.image(), i.image(), i.image(), i.level(), 0.7),
    "scale_gradient": lambda i: (i.image(), i.vector(1, dtype=torch.float32)[0].to(ops_wide(i.dtype)), i.dtype),
    "group_norm_silu": lambda i: (*i.group_norm(adaptive=False), 1e-5, True),
    "group_norm_silu adaptive": lambda i: (*i.group_norm(adaptive=True), 1e-5, True),
    "group_norm_silu without SiLU": lambda i: (*i.group_norm(adaptive=True), 1e-5, False),
    "group_norm_silu_backward": lambda i: i.group_norm_backward(adaptive=False),
    "group_norm_silu_backward adaptive": lambda i: i.group_norm_backward(adaptive=True),
    "group_norm_silu_backward without SiLU": lambda i: i.group_norm_backward(adaptive=True, silu=False),
}


def ops_wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def slack(implementation, device):
    return INTERPRETER_SLACK if implementation == "triton" and device == "cpu" else 1


def available(name, device):
    return [i for i in ops.implementations(name, device) if i != "reference"]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def in_float64(arguments):
    """The same arguments, exactly, in float64."""
    return [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else
        torch.float64 if isinstance(a, torch.dtype) else a
        for a in arguments
    ]  # fmt: skip


def assert_within_budget(result, same_dtype, truth, tolerance, scale=0.0):
    """The error may be that of the reference plus `tolerance`, relative to the largest value, or to `scale`."""
    assert result.shape == truth.shape and result.dtype == same_dtype.dtype
    if result.numel() == 0:
        return
    assert result.stride() == same_dtype.stride()
    if truth.isnan().all():
        assert result.isnan().all()
        return
    error, allowed = ((r.double() - truth).abs().max() for r in (result, same_dtype))
    assert error <= allowed + tolerance * max(scale, truth.abs().max()), f"error {error:.2e}, reference {allowed:.2e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_error_budget(case, dtype, shape, layout, device):
    name = case.split()[0]
    arguments = CASES[case](Inputs(shape, dtype, layout, device))
    reference = ops.implementations(name, device)["reference"]
    same_dtype, truth = as_tuple(reference(*arguments)), as_tuple(reference(*in_float64(arguments)))
    # In a group of so few values the terms of the gradient cancel; they are of the size of rstd.
    cancels = name == "group_norm_silu_backward" and shape[2] == 1
    scale = arguments[3].max().item() if cancels else 0.0
    for implementation in available(name, device):
        results = as_tuple(ops.implementations(name, device)[implementation](*arguments))
        assert len(results) == len(truth)
        for result, expected, exact in zip(results, same_dtype, truth, strict=True):
            rounding = min(expected.dtype, dtype, key=lambda d: torch.finfo(d).bits)
            tolerance = slack(implementation, device) * TOLERANCES[rounding]
            assert_within_budget(result, expected, exact, tolerance, scale)


def adamw_arguments(dtype, grad_dtype, shadow_dtype, device, *, n=70_001, **options):
    i = Inputs((1,), dtype, device=device)
    param, exp_avg, ema = i.vector(n), 0.1 * i.vector(n), i.vector(n)
    tensors = {
        "param": param, "grad": i.vector(n).to(grad_dtype), "exp_avg": exp_avg, "exp_avg_sq": exp_avg.square(),
        "step": torch.tensor([3], device=device), "learning_rate": torch.tensor(1e-2, device=device),
        "ema": ema if shadow_dtype else None, "shadow": param.to(shadow_dtype) if shadow_dtype else None,
    }  # fmt: skip
    scalars = {
        "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 5.0, "ema_decay": 0.99,
        "ema_warmup": 10.0, "zero_grad": shadow_dtype is not None,
    }  # fmt: skip
    return tensors, {**scalars, **options}


def run_adamw(implementation, tensors, scalars, dtype=None):
    def copy(tensor):
        if tensor is None:
            return None
        return tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)

    copies = {name: copy(tensor) for name, tensor in tensors.items()}
    norm = implementation(*copies.values(), *scalars.values())
    return {**copies, "norm": norm}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_grad_norm", [5.0, math.inf])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "shadow_dtype"),
    [
        (torch.float32, torch.float32, None), (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float16), (torch.float64, torch.float64, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
    ],
)  # fmt: skip
def test_adamw_error_budget(dtype, grad_dtype, shadow_dtype, max_grad_norm, device):
    tensors, scalars = adamw_arguments(dtype, grad_dtype, shadow_dtype, device, max_grad_norm=max_grad_norm)
    found = ops.implementations("adamw_ema_", device)
    expected = run_adamw(found["reference"], tensors, scalars)
    truth = run_adamw(found["reference"], tensors, scalars, torch.float64)
    assert expected["step"].item() == 4 and expected["norm"] > 5
    for implementation in available("adamw_ema_", device):
        results = run_adamw(found[implementation], tensors, scalars)
        for name, result in results.items():
            if result is not None:
                tolerance = slack(implementation, device) * TOLERANCES.get(result.dtype, 0)
                assert_within_budget(result, expected[name], truth[name].double(), tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_adamw_is_torch_adamw(device):
    """Clipping, three steps of AdamW and the average, on several tensors, against torch's own."""
    torch.manual_seed(0)
    flat = torch.randn(1000, device=device, dtype=torch.float64)
    parameters = [torch.nn.Parameter(part.clone()) for part in flat.split([400, 350, 250])]
    reference = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.3)
    average = [p.detach().clone() for p in parameters]
    state = [torch.zeros_like(flat) for _ in range(2)]
    step, learning_rate = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor(1e-2, device=device)
    ema = flat.clone()
    for _ in range(3):
        grad = torch.randn_like(flat) * 3
        for p, g in zip(parameters, grad.split([400, 350, 250]), strict=True):
            p.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 20.0)
        reference.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.1)
        mine = ops.adamw_ema_(
            flat, grad, *state, step, learning_rate.double(), ema=ema, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.3,
            max_grad_norm=20.0, ema_decay=0.9,
        )  # fmt: skip
        assert_close(mine, norm)
    assert_close(flat, torch.cat([p.detach() for p in parameters]))
    assert_close(ema, torch.cat(average))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_gradient_moves_nothing(bad, device):
    tensors, scalars = adamw_arguments(torch.float32, torch.float32, torch.bfloat16, device)
    tensors["grad"][12_345] = bad
    for implementation in ops.implementations("adamw_ema_", device).values():
        results = run_adamw(implementation, tensors, scalars)
        assert not results.pop("norm").isfinite()
        assert results.pop("grad").eq(0).all()
        for name, result in results.items():
            assert torch.equal(result, tensors[name]), name


# Random numbers


KNOWN_ANSWERS = [  # Salmon et al. 2011, kat_vectors of Random123
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("device", DEVICES)
def test_philox_gives_the_published_answers(device):
    def words(text):
        return torch.tensor([int(word, 16) for word in text.split()], device=device)

    for implementation in ops.implementations("philox", device).values():
        for counter, key, answer in KNOWN_ANSWERS:
            assert torch.equal(implementation(words(counter)[None], words(key))[0], words(answer))


@pytest.mark.parametrize("device", DEVICES)
def test_philox_is_the_same_integers_everywhere(device):
    torch.manual_seed(0)
    counter, key = torch.randint(2**32, (50_001, 4), device=device), torch.randint(2**32, (2,), device=device)
    found = ops.implementations("philox", device)
    expected = found["reference"](counter, key)
    for name in available("philox", device):
        assert torch.equal(found[name](counter, key), expected)


def standard_normals(implementation, n, state, device="cpu", shape=None):
    x = torch.zeros(shape or (1, 1, 1, n), device=device)
    return implementation(x, torch.ones(x.shape[0], device=device), state, None, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_normals_are_normal(device):
    n = 10_000_000
    for implementation in ops.implementations("add_noise_rng", device).values():
        z = standard_normals(implementation, n, ops.rng_state(7, device=device), device).flatten().cpu().double()
        # Five standard errors of each estimate.
        assert abs(z.mean()) < 5 / n**0.5
        assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs(z.pow(4).mean() / z.var() ** 2 - 3) < 5 * (24 / n) ** 0.5
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
        assert abs((z[0::2] * z[1::2]).mean()) < 5 / (n / 2) ** 0.5  # the two of a pair
        assert 5 < z.max() < 6.7 and -6.7 < z.min() < -5


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_a_function_of_seed_call_and_place(device):
    reference = ops.implementations("add_noise_rng", device)["reference"]
    for implementation in ops.implementations("add_noise_rng", device).values():
        state = ops.rng_state(2**62 + 3, device=device)
        first, second = (standard_normals(implementation, 1001, state, device) for _ in range(2))
        assert state.tolist() == [2**62 + 3, 2 << 32]
        assert (first - second).abs().min() < 1 < (first - second).abs().max()
        saved = torch.tensor([2**62 + 3, 1 << 32], device=device)  # a resumed run draws what it would have drawn
        assert torch.equal(standard_normals(implementation, 1001, saved, device), second)
        assert_close(standard_normals(reference, 1001, ops.rng_state(2**62 + 3, device=device), device), first)
        # The place in memory counts, not the shape, and no block or thread begins anew.
        longer = standard_normals(implementation, 0, ops.rng_state(2**62 + 3, device=device), device, (7, 3, 101, 97))
        assert torch.equal(longer.flatten()[:1001], first.flatten())
        assert not torch.equal(standard_normals(implementation, 1001, ops.rng_state(4, device=device), device), first)
        empty = ops.rng_state(1, device=device)
        standard_normals(implementation, 0, empty, device, (0, 1, 2, 2))
        assert empty.tolist() == [1, 1 << 32]


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


# Golden values, special values, large indices


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
        y, _, _ = implementation(torch.zeros_like(x), torch.ones(1, device=device), torch.zeros(1, device=device),
                                 torch.zeros(5, 1, device=device), x.view(5, 1), 1, 1e-5, True)  # fmt: skip
        assert_close(y, torch.nn.functional.silu(x), equal_nan=True)


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
    """Rows of scale and shift lie 2^31 elements apart; no page between them exists."""
    stride = 2**31 + 16
    pages = unbacked(4 * (stride + 16))
    table = torch.frombuffer(pages, dtype=torch.float32).as_strided((2, 4), (stride, 1))
    table[0], table[1] = 1.0, 3.0
    x, weight = torch.randn(2, 4, 3, 3), torch.ones(4)
    for implementation in ops.implementations("group_norm_silu").values():
        far = implementation(x, weight, weight, table, table, 2, 1e-5, True)
        near = implementation(x, weight, weight, table.clone(), table.clone(), 2, 1e-5, True)
        assert_close(far[0], near[0], rtol=0, atol=0)


# Gradients, torch.compile, layouts


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_gradcheck():
    x, noise, output = (random(2, 4, 3, 3, seed=k).requires_grad_() for k in range(3))
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda x, n: ops.add_noise(x, sigma, noise=n, scale=sigma), (x, noise))
    assert check(lambda x: ops.add_noise(x, sigma, rng_state=ops.rng_state(3), scale=sigma), (x,))
    assert check(lambda D: ops.fake_loss(D, x.detach(), sigma), (output,))
    assert check(lambda F: ops.fake_loss_raw(F, x.detach(), noise.detach(), sigma), (output,))
    weight, bias, table = (random(*shape, seed=5).requires_grad_() for shape in ((4,), (4,), (2, 8)))
    assert check(lambda x, w, b: ops.group_norm_silu(x, w, b, num_groups=2), (x, weight, bias))
    assert check(lambda x, w, b: ops.group_norm(x, w, b, num_groups=2), (x, weight, bias))

    def adaptive(x, w, b, table):
        scale, shift = table.chunk(2, dim=1)
        return ops.group_norm_silu(x, w, b, num_groups=2, scale=scale, shift=shift)

    assert check(adaptive, (x, weight, bias, table))
    channels_last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert check(adaptive, (channels_last, weight, bias, table))


def test_the_derivative_of_dm_loss_is_its_gradient():
    x_gen, D_real, D_fake, x_t = (random(2, 4, 3, 3, seed=k) for k in range(4))
    x_gen.requires_grad_()
    (3 * ops.dm_loss(x_gen, D_real, D_fake)).backward()
    assert_close(x_gen.grad, 3 * ops.dm_gradient(x_gen, D_real, D_fake) / x_gen.numel())
    # The raw form is the same loss, with the preconditioning folded in.
    sigma, sigma_data = torch.tensor([0.3, 2.0], dtype=torch.float64)[:, None, None, None], 0.6
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    F_real, F_fake = (D_real - c_skip * x_t) / c_out, (D_fake - c_skip * x_t) / c_out
    raw = ops.dm_loss_raw(x_gen, x_t, sigma.flatten(), F_real, F_fake, sigma_data=sigma_data)
    assert_close(raw, ops.dm_loss(x_gen, D_real, D_fake))
    assert_close(torch.autograd.grad(raw, x_gen)[0], x_gen.grad / 3)
    fake_raw = ops.fake_loss_raw(F_fake, x_gen, x_t, sigma.flatten(), sigma_data=sigma_data)
    assert_close(fake_raw, ops.fake_loss(D_fake, x_gen, sigma.flatten(), sigma_data=sigma_data))


@pytest.mark.parametrize("case", [*CASES, "add_noise_rng", "philox", "adamw_ema_"])
def test_opcheck(case):
    name = case.split()[0]
    if case == "add_noise_rng":
        arguments = (random(2, 3, 4, 4), torch.ones(2), ops.rng_state(1), None, torch.float32)
    elif case == "philox":
        arguments = (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    elif case == "adamw_ema_":
        tensors, scalars = adamw_arguments(torch.float32, torch.float32, torch.bfloat16, "cpu", n=100)
        arguments = (*tensors.values(), *scalars.values())
    else:
        arguments = CASES[case](Inputs((3, 4, 5, 6), layout=torch.channels_last))
    differentiable = not name.endswith(("_", "_rng", "_backward")) and name not in ("philox", "dm_gradient")
    if differentiable and name != "scale_gradient":
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    torch.library.opcheck(getattr(torch.ops.fastdmd, name).default, arguments)


def one_of_each(x, sigma, D_real, D_fake, noise, weight, table, state):
    x_t = ops.add_noise(x, sigma, noise=noise, scale=sigma)
    x_s = ops.add_noise(x.detach(), sigma, rng_state=state, dtype=torch.float32)
    scale, shift = table.chunk(2, dim=1)
    y = ops.group_norm_silu(x_t + x_s, weight, weight, num_groups=2, scale=scale, shift=shift)
    return (
        ops.dm_loss(y, D_real, D_fake) + ops.dm_loss_raw(y, x_t, sigma, D_real, D_fake)
        + ops.fake_loss(y, D_real, sigma) + ops.fake_loss_raw(y, x, x_t, sigma)
        + ops.dm_gradient(x, D_real, D_fake).mean()
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_graph_break(backend):
    def inputs():
        x, D_real, D_fake, noise = (random(2, 4, 6, 6, dtype=torch.float32, seed=k) for k in range(4))
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        weight, table = random(4, dtype=torch.float32).requires_grad_(), random(2, 8, dtype=torch.float32)
        leaves = (x, weight)
        return leaves, (x, torch.tensor([0.3, 2.0]), D_real, D_fake, noise, weight, table, ops.rng_state(5))

    results = []
    torch._dynamo.reset()
    for function in (one_of_each, torch.compile(one_of_each, fullgraph=True, backend=backend)):
        leaves, arguments = inputs()
        loss = function(*arguments)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves), arguments[-1]])
    assert_close(*results, rtol=1e-5, atol=1e-5)


def test_layouts_are_kept_and_what_is_not_dense_is_copied():
    sigma, state = torch.tensor([0.3, 2.0]), ops.rng_state(1)
    dense = [random(2, 4, 6, 5, dtype=torch.float32, seed=k) for k in range(3)]
    strided = [torch.randn(2, 9, 6, 10)[:, 1::2, :, ::2].copy_(x) for x in dense]
    assert not strided[0].is_contiguous()
    mixed = [dense[0].to(memory_format=torch.channels_last), dense[1], strided[2]]
    weight = torch.ones(4)
    for x, a, b in (strided, mixed):
        assert_close(ops.add_noise(x, sigma, noise=a), ops.add_noise(dense[0], sigma, noise=dense[1]))
        assert_close(ops.dm_gradient(x, a, b), ops.dm_gradient(*dense))
        assert_close(ops.fake_loss(x, a, sigma), ops.fake_loss(*dense[:2], sigma))
        normalised = ops.group_norm_silu(x, weight, weight, num_groups=2)
        assert_close(normalised, ops.group_norm_silu(dense[0], weight, weight, num_groups=2))
        x.requires_grad_()
        ops.dm_loss(x, a, b).backward()
        assert_close(x.grad, ops.dm_gradient(*dense) / x.numel())
    for result in (
        ops.add_noise(mixed[0], sigma, noise=a), ops.dm_gradient(mixed[0], a, b),
        ops.group_norm_silu(mixed[0], weight, weight, num_groups=2),
        ops.add_noise(mixed[0].detach(), sigma, rng_state=state, dtype=torch.bfloat16),
    ):  # fmt: skip
        assert result.is_contiguous(memory_format=torch.channels_last) and not result.is_contiguous()


# What a user sees


X, SIGMA = torch.zeros(4, 3, 32, 32), torch.ones(4)
W = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.dm_gradient(X, X[:, :, :16, :16], X), ValueError,
         "fastdmd.dm_gradient: expected D_real of shape (4, 3, 32, 32), got (4, 3, 16, 16)"),
        (lambda: ops.dm_loss(X, X, X.half()), TypeError,
         "fastdmd.dm_loss: expected D_fake of dtype torch.float32, got torch.float16"),
        (lambda: ops.dm_loss(X, X, X, eps=0), ValueError, "fastdmd.dm_loss: expected eps > 0, got 0"),
        (lambda: ops.dm_loss_raw(X, X, SIGMA[:3], X, X), ValueError,
         "fastdmd.dm_loss_raw: expected sigma of shape (4,), got (3,)"),
        (lambda: ops.fake_loss(X, X, 1.0), TypeError,
         "fastdmd.fake_loss: expected sigma to be a floating point tensor, got float"),
        (lambda: ops.fake_loss_raw(X, X, X, SIGMA, sigma_data=-1), ValueError,
         "fastdmd.fake_loss_raw: expected sigma_data > 0, got -1"),
        (lambda: ops.add_noise(X, SIGMA), ValueError,
         "fastdmd.add_noise: expected either noise or rng_state, got neither"),
        (lambda: ops.add_noise(X, SIGMA, noise=X, rng_state=ops.rng_state(0)), ValueError,
         "fastdmd.add_noise: expected either noise or rng_state, got both"),
        (lambda: ops.add_noise(X, SIGMA, rng_state=torch.zeros(2)), ValueError,
         "fastdmd.add_noise: expected rng_state of ops.rng_state, int64 (2,), got torch.float32 (2,)"),
        (lambda: ops.add_noise(X, SIGMA, noise=X, dtype=torch.int8), TypeError,
         "fastdmd.add_noise: expected a floating point dtype, got torch.int8"),
        (lambda: ops.add_noise(X.int(), SIGMA, noise=X), TypeError,
         "fastdmd.add_noise: expected x to be floating point, got torch.int32"),
        (lambda: ops.add_noise(X[0], SIGMA, noise=X), ValueError,
         "fastdmd.add_noise: expected x of shape [B, C, H, W], got (3, 32, 32)"),
        (lambda: ops.group_norm_silu(X, W, W), ValueError,
         "fastdmd.group_norm_silu: expected num_groups that divides C = 3, got 32"),
        (lambda: ops.group_norm(X, W, W[:2], num_groups=1), ValueError,
         "fastdmd.group_norm: expected bias of shape (3,), got (2,)"),
        (lambda: ops.group_norm_silu(X, W[:2], W, num_groups=1), ValueError,
         "fastdmd.group_norm_silu: expected weight of shape (3,), got (2,)"),
        (lambda: ops.group_norm_silu(X, W, W, num_groups=1, scale=torch.ones(4, 3)), ValueError,
         "fastdmd.group_norm_silu: expected scale and shift together, got scale alone"),
        (lambda: ops.adamw_ema_(W, W, W, W, torch.zeros(1), torch.tensor(1e-3)), TypeError,
         "fastdmd.adamw_ema_: expected step of dtype torch.int64, got torch.float32"),
        (lambda: ops.adamw_ema_(W, W[:2], W, W, torch.zeros(1).long(), torch.tensor(1e-3)), ValueError,
         "fastdmd.adamw_ema_: expected grad of shape (3,), got (2,)"),
        (lambda: ops.philox(torch.zeros(3), torch.zeros(2).long()), TypeError,
         "fastdmd.philox: expected counter of dtype int64, got torch.float32"),
        (lambda: ops.rng_state(-1), ValueError, "fastdmd.rng_state: expected seed in [0, 2^63), got -1"),
        (lambda: ops.implementations("dm_los"), ValueError, "expected an op out of"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


USE = "import torch; from fastdmd import ops; x = torch.ones(1, 1, 2, 2); print(ops.dm_gradient(x, 0 * x, x / 2)[0, 0])"


def test_a_forced_backend_is_used_or_refused():
    assert run_python(USE, FASTDMD_BACKEND="reference").returncode == 0
    absent = run_python(USE, FASTDMD_BACKEND="triton", TRITON_INTERPRET="0")
    assert absent.returncode != 0 and "Triton has no cpu backend" in absent.stderr
    off = run_python(USE, FASTDMD_BACKEND="native", FASTDMD_NATIVE="0")
    assert off.returncode != 0 and "switched off by FASTDMD_NATIVE=0" in off.stderr
    wrong = run_python(USE, FASTDMD_BACKEND="fast")
    assert "expected a backend out of reference, triton, native, got fast" in wrong.stderr
    with pytest.raises(RuntimeError, match="Triton has no cpu backend"), ops.use_backend("triton"):
        pass


def test_the_environment_is_checked_at_once(monkeypatch, capsys):
    monkeypatch.setenv("FASTDMD_BACKEND", "")  # as if it were not set
    ops.require_environment()
    for backend, message in (
        ("fast", "expected a backend out of .*, got fast"),
        ("triton", "expected FASTDMD_BACKEND=triton to be there, got none: Triton has no cpu"),
    ):
        monkeypatch.setenv("FASTDMD_BACKEND", backend)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match=message):
            ops.require_environment()
        with pytest.raises(SystemExit) as stop:
            ops_main([])
        assert stop.value.code == 2 and re.fullmatch(f"fastdmd.ops: error: .*{message}.*\n", capsys.readouterr().err)
    load = _native.load.__wrapped__  # without its memory
    for mode, expected in (("", None), ("auto", None), ("1", None), ("0", "switched off by FASTDMD_NATIVE=0")):
        monkeypatch.setenv("FASTDMD_NATIVE", mode)
        assert load("cpu") == (expected or _native.load("cpu"))
    for mode in ("maybe", "2", "false"):
        monkeypatch.setenv("FASTDMD_NATIVE", mode)
        with pytest.raises(ValueError, match=f"expected FASTDMD_NATIVE out of auto, 0, 1, got '{mode}'"):
            load("cpu")


def test_a_broken_library_warns_with_its_cause_and_the_reference_works(tmp_path, monkeypatch):
    broken = tmp_path / "libfastdmd_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setitem(_native.LIBRARIES, "cpu", str(broken))
    _native.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="is there but does not load: .*(invalid ELF header|file too short)"):
            assert next(iter(ops.implementations("dm_loss"))) == "reference"
        assert "does not load" in ops.unavailable("dm_loss")["native"]
    finally:
        _native.load.cache_clear()


def test_the_overview_names_every_op_and_says_why():
    run = run_python("import runpy; runpy.run_module('fastdmd.ops', run_name='__main__')", FASTDMD_NATIVE="0")
    assert run.returncode == 0, run.stderr
    for name in ops.names():
        assert f"{name} " in run.stdout
    assert "no native: switched off by FASTDMD_NATIVE=0" in run.stdout
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        active = next(iter(ops.implementations("dm_loss")))
    assert f"{active}" in run_python("import runpy; runpy.run_module('fastdmd.ops', run_name='__main__')").stdout
