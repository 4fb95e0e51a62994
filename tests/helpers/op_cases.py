"""Arguments for every op, whatever its dtype, shape and layout, and how much error an implementation may have."""

import math

import pytest
import torch

from fastdmd import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# What an implementation may add to the error that the reference has in the same dtype, relative to the largest value.
# In float64 the reference is its own truth, and torch's group norm loses two digits by folding the mean into an offset.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Triton's interpreter adds up one by one, and cuts to bfloat16 instead of rounding.
INTERPRETER_SLACK = 8
SHAPES = [(3, 4, 17, 23), (1, 1, 1, 1), (2, 12, 1, 1), (5, 8, 4, 4), (1, 4, 150, 99), (0, 4, 8, 8)]
DTYPES = list(TOLERANCES)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


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

    def group_norm(self, adaptive, moved=0):
        """`moved`: for how many samples there is an offset, each or all."""
        B, C = self.shape[:2]
        tables = self.vector(B, 2 * C).chunk(2, dim=1) if adaptive else (None, None)
        offset = self.vector(moved, C) if moved else None
        return self.image() + 2, self.vector(C), self.vector(C), *tables, offset, math.gcd(C, 4)

    def group_norm_backward(self, adaptive, silu=True, moved=0):
        *arguments, num_groups = self.group_norm(adaptive, moved)
        _, mean, rstd = ops.implementations("group_norm_silu")["reference"](*arguments, num_groups, 1e-5, silu)
        x, *parameters = arguments
        return self.image(), x, mean, rstd, *parameters, num_groups, silu


CASES = {
    "add_noise": lambda i: (i.image(), i.level(), i.image(), None, i.dtype),
    "add_noise scaled": lambda i: (i.image(), i.level(), i.image(), i.level(), torch.bfloat16),
    "dm_gradient": lambda i: (i.image(), i.image(), i.image(), 1e-6),
    "dm_loss": lambda i: (i.image(), i.image(), i.image(), 1e-6),
    "dm_loss_raw": lambda i: (i.image(), i.image(), i.level(), i.image(), i.image(), 0.5, 1e-6),
    "denoising_loss": lambda i: (i.image(), i.image(), i.level()),
    "fake_loss": lambda i: (i.image(), i.image(), i.level(), 0.7),
    "fake_loss_raw": lambda i: (i.image(), i.image(), i.image(), i.level(), 0.7),
    "scale_gradient": lambda i: (i.image(), i.vector(1, dtype=torch.float32)[0].to(ops_wide(i.dtype)), i.dtype),
    "group_norm_silu": lambda i: (*i.group_norm(adaptive=False), 1e-5, True),
    "group_norm_silu adaptive": lambda i: (*i.group_norm(adaptive=True), 1e-5, True),
    "group_norm_silu without SiLU": lambda i: (*i.group_norm(adaptive=True), 1e-5, False),
    "group_norm_silu moved": lambda i: (*i.group_norm(adaptive=False, moved=i.shape[0]), 1e-5, True),
    "group_norm_silu moved alike": lambda i: (*i.group_norm(adaptive=True, moved=1), 1e-5, True),
    "group_norm_silu_backward": lambda i: i.group_norm_backward(adaptive=False),
    "group_norm_silu_backward adaptive": lambda i: i.group_norm_backward(adaptive=True),
    "group_norm_silu_backward without SiLU": lambda i: i.group_norm_backward(adaptive=True, silu=False),
    "group_norm_silu_backward moved": lambda i: i.group_norm_backward(adaptive=False, moved=i.shape[0]),
    "group_norm_silu_backward moved alike": lambda i: i.group_norm_backward(adaptive=True, moved=1),
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
        a.double()
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else torch.float64
        if isinstance(a, torch.dtype)
        else a
        for a in arguments
    ]


def assert_within_budget(result, same_dtype, truth, tolerance, scale=0.0, implementation=""):
    """The error may be that of the reference plus `tolerance`, relative to the largest value, or to `scale`."""
    assert result.shape == truth.shape and result.dtype == same_dtype.dtype
    if result.numel() == 0:
        return
    assert result.stride() == same_dtype.stride()
    if truth.isnan().all():
        assert result.isnan().all()
        return
    error, allowed = ((r.double() - truth).abs().max() for r in (result, same_dtype))
    limit = allowed + tolerance * max(scale, truth.abs().max())
    assert error <= limit, f"error {error:.2e}, at most {limit:.2e}, reference {allowed:.2e} {implementation}"


def assert_all_within_budget(name, arguments, device, dtype, scale=0.0):
    """Every implementation against the reference, where `dtype` or that of the result is the coarsest rounding."""
    found = ops.implementations(name, device)

    def results(implementation, arguments):
        return as_tuple(found[implementation](*arguments))

    same_dtype, truth = results("reference", arguments), results("reference", in_float64(arguments))
    scales = [scale] * len(truth)
    if name == "group_norm_silu" and truth[2].numel():  # an error of the mean is as large as in standard deviations
        scales[1] = 1 / truth[2].max().item()
    if name == "group_norm_silu_backward":
        grad_y, x, mean, rstd, *_, offset, _, _ = in_float64(arguments)
        x = x if offset is None else x + offset[:, :, None, None]
        scales[1:] = [max(scale, largest_partial_sum(grad_y, x, mean, rstd))] * (len(truth) - 1)
    for implementation in available(name, device):
        rows = list(zip(results(implementation, arguments), same_dtype, truth, scales, strict=True))
        for result, expected, exact, size in reversed(rows):  # moments before what they make: the cause fails first
            rounding = min(expected.dtype, dtype, key=lambda d: torch.finfo(d).bits)
            tolerance = slack(implementation, device) * TOLERANCES[rounding]
            assert_within_budget(result, expected, exact, tolerance, size, implementation)


def largest_partial_sum(grad_y, x, mean, rstd):
    """What the gradients of weights, which are sums, come to on the way, however they cancel: about sqrt(n) for n terms
    of about 1, or one term that is larger."""
    if x.numel() == 0:
        return 0.0
    groups = x.unflatten(1, (mean.shape[1], -1)) - mean[:, :, None, None, None]
    largest_h = (groups * rstd[:, :, None, None, None]).abs().max().item()
    return math.sqrt(x.numel() / x.shape[1]) + largest_h * grad_y.abs().max().item()


def adamw_arguments(dtype, grad_dtype, shadow_dtype, device, *, n=70_001, **options):
    i = Inputs((1,), dtype, device=device)
    param, exp_avg, ema = i.vector(n), 0.1 * i.vector(n), i.vector(n)
    tensors = {
        "param": param,
        "grad": i.vector(n).to(grad_dtype),
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg.square(),
        "step": torch.tensor([3], device=device),
        "learning_rate": torch.tensor(1e-2, device=device),
        "ema": ema if shadow_dtype else None,
        "shadow": param.to(shadow_dtype) if shadow_dtype else None,
    }
    scalars = {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 5.0,
        "ema_decay": 0.99,
        "ema_warmup": 10.0,
        "zero_grad": shadow_dtype is not None,
    }
    return tensors, {**scalars, **options}


def run_adamw(implementation, tensors, scalars, dtype=None):
    def copy(tensor):
        if tensor is None:
            return None
        return tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)

    copies = {name: copy(tensor) for name, tensor in tensors.items()}
    norm = implementation(*copies.values(), *scalars.values())
    return {**copies, "norm": norm}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
