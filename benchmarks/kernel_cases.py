"""What the kernels are timed on: shapes, arguments, the bytes that must move, and who else computes the same."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import eager
from fastdmd import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEGABYTES = (64, 256)  # of a tensor
LOSSES = ("denoising_loss", "dm_loss", "fake_loss")
IMAGE_OPS = ("add_noise", "add_noise_rng", *LOSSES, "scale_gradient")
GROUP_NORM_OPS = ("group_norm_silu", "group_norm_silu_backward")
FEATURE_OPS = (*GROUP_NORM_OPS, "bias_gradient")
# Channels and size of feature maps: of ADM at ImageNet-64, whose decoder joins two of 576, and of EDM's at CIFAR-10.
FEATURE_MAPS = ((192, 64), (384, 32), (576, 16), (768, 8), (1152, 16), (128, 32), (256, 16))
REAL_IMAGES = ((40, 3, 64, 64), (64, 3, 32, 32))
REAL_FEATURE_MAPS = ((40, 384, 32, 32), (64, 256, 16, 16))
NUM_GROUPS, EPS = 32, 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """An op on random numbers; `dtype` is that of images, or of the gradients of an update."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    channels_last: bool = False
    compiled: bool = False  # is compiled eager code timed, too

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.op} {self.dtype} {'x'.join(map(str, self.shape))} {layout}"

    @property
    def implementations(self) -> list[str]:
        also = ["foreach"] if self.op == "adamw_ema_" else []
        return ["triton", "native", "eager", *also, *(["compiled"] if self.compiled else [])]


def cases() -> list[Case]:
    """Every op on large tensors and on real batches."""
    found = []
    for op in IMAGE_OPS:
        for megabytes in MEGABYTES:
            for name, dtype in DTYPES.items():
                batch = round(megabytes * 1e6 / (3 * 64 * 64 * dtype.itemsize))
                found.append(Case(op, name, (batch, 3, 64, 64), compiled=name == "float32" and megabytes == 64))
        found += [Case(op, name, shape) for shape in REAL_IMAGES for name in DTYPES]
    for megabytes in MEGABYTES:
        found += [Case("adamw_ema_", name, (megabytes * 250_000,), compiled=megabytes == 64) for name in DTYPES]
    for op in FEATURE_OPS:
        for name, dtype in DTYPES.items():
            for C, size in FEATURE_MAPS:
                batch = round(MEGABYTES[0] * 1e6 / (C * size * size * dtype.itemsize))
                found.append(Case(op, name, (batch, C, size, size), True, name == "bfloat16" and C == 384))
                if C == 384:
                    found.append(Case(op, name, (batch, C, size, size)))
        found += [Case(op, "bfloat16", shape, True) for shape in REAL_FEATURE_MAPS]
    return found


def arguments(case: Case, device: str, seed: int = 0) -> tuple:
    """Of the op, in the order of its schema; the same for a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, dtype=torch.float32) -> Tensor:
        return torch.randn(shape or case.shape, generator=generator, device=device).to(dtype)

    def image() -> Tensor:
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        return normal(dtype=dtype).contiguous(memory_format=layout)

    if case.op == "adamw_ema_":
        param, grad, exp_avg = normal(), normal(dtype=dtype), 0.1 * normal()
        step, learning_rate = torch.tensor([3], device=device), torch.tensor(1e-4, device=device)
        shadow = param.to(dtype) if dtype != torch.float32 else None
        return (
            param,
            grad,
            exp_avg,
            exp_avg.square() + 0.1,
            step,
            learning_rate,
            normal(),
            shadow,
            0.9,
            0.999,
            1e-8,
            0.01,
            1.0,
            0.999,
            0.0,
            False,
        )
    B, C = case.shape[:2]
    sigma = torch.rand(B, generator=generator, device=device) * 3 + 0.05
    if case.op in GROUP_NORM_OPS:
        x, weight, bias = image() + 1, normal(C, dtype=dtype), normal(C, dtype=dtype)
        if case.op == "group_norm_silu":
            return x, weight, bias, None, None, None, NUM_GROUPS, EPS, True
        _, mean, rstd = reference("group_norm_silu")(x, weight, bias, None, None, None, NUM_GROUPS, EPS, True)
        return image(), x, mean, rstd, weight, bias, None, None, None, NUM_GROUPS, True
    return {
        "add_noise": lambda: (image(), sigma, image(), None, dtype),
        "add_noise_rng": lambda: (image(), sigma, ops.rng_key(seed, device=device), None, dtype),
        "dm_loss": lambda: (image(), image(), image(), 1e-6),
        "denoising_loss": lambda: (image(), image(), sigma),
        "fake_loss": lambda: (image(), image(), sigma, 0.5),
        "scale_gradient": lambda: (image(), normal(1)[0], dtype),
        "bias_gradient": lambda: (image(),),
    }[case.op]()


def reference(op: str) -> Callable:
    return ops.implementations(op)["reference"]


def results(op: str, given: tuple, returned) -> tuple[Tensor, ...]:
    """What a call computed: what it returned, or what it wrote in place."""
    if op == "adamw_ema_":
        param, _, *moments, _, _, ema, shadow = given[:8]
        return tuple(t for t in (param, *moments, ema, shadow) if t is not None)
    return returned if isinstance(returned, tuple) else (returned,)


def bytes_moved(op: str, given: tuple, returned: tuple[Tensor, ...]) -> int:
    """Each input read once and each result written once; an update reads its gradients twice, to clip before it moves.

    So `add_noise` 3 values of its dtype an element and `add_noise_rng` 2, `dm_loss` 4, `fake_loss` and `denoising_loss`
    3 (with their gradients), `scale_gradient` 2, `group_norm_silu` 2 and its backward 3, `bias_gradient` 1, and small
    tables; `adamw_ema_` 8 of float32 and 2 of the gradient's dtype, and the copy written.
    """

    def total(tensors) -> int:
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    if op == "adamw_ema_":
        param, grad, *moments, step, learning_rate, ema, shadow = given[:8]
        return 2 * total([param, grad, *moments, step, ema]) + total([learning_rate, shadow])
    return total(given) + total(returned)


def bind(case: Case, implementation: str, given: tuple, device: str) -> Callable:
    """A call without arguments. Raises RuntimeError for an implementation that is not there."""
    if implementation in ("eager", "foreach"):
        return _eager(case, given, implementation)
    if implementation == "compiled":
        return functools.partial(_compiled(case.op), *given)
    found = ops.implementations(case.op, device)
    if implementation not in found:
        raise RuntimeError(ops.unavailable(case.op, device)[implementation])
    return functools.partial(found[implementation], *given)


def _add_noise_rng(x, sigma, rng_key, scale, dtype):
    return eager.add_noise(x, sigma)


@functools.cache
def _compiled(op: str) -> Callable:
    return torch.compile(_add_noise_rng if op == "add_noise_rng" else reference(op), dynamic=False)


def _eager(case: Case, given: tuple, implementation: str) -> Callable:
    """What one would write; results in the layout of the first argument."""
    if case.op == "adamw_ema_":
        adamw = eager.AdamW(*given[:8], **({"fused": True} if implementation == "eager" else {"foreach": True}))
        return lambda: adamw(1.0)
    if case.op in LOSSES:
        x = given[0].detach().requires_grad_()
        function = functools.partial(getattr(eager, case.op), x, *(t for t in given[1:] if isinstance(t, Tensor)))
        return lambda: _loss_and_gradient(function, x)
    if case.op == "group_norm_silu":
        return lambda: (_group_norm_silu(*given[:3]),)
    if case.op == "group_norm_silu_backward":
        grad_y, x, _, _, weight, bias = given[:6]
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        with torch.enable_grad():
            y = _group_norm_silu(*inputs)
        return lambda: torch.autograd.grad(y, inputs, grad_y, retain_graph=True)
    function = {"add_noise": _add_noise, "add_noise_rng": _add_noise_rng}.get(case.op, reference(case.op))
    return lambda: function(*given)


def _add_noise(x, sigma, noise, scale, dtype):
    return x + sigma.to(dtype)[:, None, None, None] * noise


def _group_norm_silu(x, weight, bias):
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return eager.group_norm_silu(x, weight, bias, NUM_GROUPS).contiguous(memory_format=layout)


def _loss_and_gradient(function: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        loss = function()
        return loss.detach(), *torch.autograd.grad(loss, x)


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative L2 distance of a result; NaN for other shapes."""
    worst = 0.0
    for a, b in zip(found, expected, strict=False):  # eager code returns no moments
        if a.shape != b.shape:
            return math.nan
        if b.numel() > 0:
            error = float((a.double() - b.double()).norm() / b.double().norm())
            worst = error if math.isnan(error) else max(worst, error)
            if math.isnan(worst):
                return worst
    return worst
