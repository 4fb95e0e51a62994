"""AdamW with clipping to a global norm, moving average and low-precision copy of the weights, on flat buffers."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from fastdmd.ops._registry import define


def adamw_ema_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    *,
    ema: Tensor | None = None,
    shadow: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float = math.inf,
    ema_decay: float = 0.999,
    ema_warmup: float = 0.0,
    zero_grad: bool = False,
) -> Tensor:
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2) on a whole network at once, in place.

    `g = grad * min(1, max_grad_norm / (norm + 1e-6))`; AdamW with decoupled weight decay; `ema += (1 - decay) *
    (param - ema)` with `decay = min(ema_decay, t / (t + ema_warmup))` at the t-th step; `shadow = param`. If the norm
    is not finite, nothing moves: one bad batch costs one step.

    Args:
        param: the weights `[n]`, float32 or float64.
        grad: their gradients `[n]`, of the dtype of `param`, bfloat16 or float16.
        exp_avg, exp_avg_sq: the moments `[n]`, like `param`.
        step: number of steps done, int64 `[1]`; counts on the device.
        learning_rate: floating point, 0-dim, on the device, so that a captured graph sees it change.
        ema: moving average of the weights `[n]`, like `param`. Default: none is kept.
        shadow: copy of the weights `[n]` in bfloat16 or float16, for the next forward. Default: none is kept.
        zero_grad: clears `grad` in the same pass.

    `betas` are in [0, 1), `ema_decay` in [0, 1], the other numbers at least 0; all but `max_grad_norm` are finite.

    Returns the norm of `grad` before clipping, 0-dim, of the dtype of `param`.
    Raises TypeError or ValueError, naming what was expected and what came.
    """
    check_options(
        "adamw_ema_",
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        ema_decay=ema_decay,
        ema_warmup=ema_warmup,
    )
    _check(param, grad, exp_avg, exp_avg_sq, step, learning_rate, ema, shadow)
    return _adamw_ema_(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        step,
        learning_rate,
        ema,
        shadow,
        *betas,
        eps,
        weight_decay,
        max_grad_norm,
        ema_decay,
        ema_warmup,
        zero_grad,
    )


RANGES = {  # of options, as text and as a test, which NaN fails
    "betas": ("in [0, 1)", lambda value: 0 <= value < 1),
    "ema_decay": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "max_grad_norm": (">= 0", lambda value: value >= 0),
}
NOT_NEGATIVE = (">= 0 and finite", lambda value: 0 <= value < math.inf)


def check_options(place: str, **options: Any) -> None:
    """Raises TypeError or ValueError for the first that is no number, or in `betas` no pair, or out of its range."""
    for name, value in options.items():
        text, allows = RANGES.get(name, NOT_NEGATIVE)
        pair = name == "betas"
        if pair and not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise TypeError(f"fastdmd.{place}: expected betas to be a pair of numbers, got {value!r}")
        for number in value if pair else (value,):
            if isinstance(number, bool) or not isinstance(number, numbers.Real):
                raise TypeError(f"fastdmd.{place}: expected {name} to be a number {text}, got {value!r}")
            if not allows(number):
                raise ValueError(f"fastdmd.{place}: expected {name} {text}, got {value}")


def _check(param, grad, exp_avg, exp_avg_sq, step, learning_rate, ema, shadow) -> None:
    def expect(name: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"fastdmd.adamw_ema_: expected {name} of dtype {expected}, got {got}")
        if tensor.shape != shape:
            raise ValueError(f"fastdmd.adamw_ema_: expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != param.device:
            raise ValueError(f"fastdmd.adamw_ema_: expected {name} on {param.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"fastdmd.adamw_ema_: expected {name} contiguous, got strides {tensor.stride()}")

    if not isinstance(param, Tensor):
        raise TypeError(f"fastdmd.adamw_ema_: expected param to be a tensor, got {type(param).__name__}")
    if param.dim() != 1:
        raise ValueError(f"fastdmd.adamw_ema_: expected param of shape [n], got {tuple(param.shape)}")
    expect("param", param, param.shape, torch.float32, torch.float64)
    expect("grad", grad, param.shape, param.dtype, torch.bfloat16, torch.float16)
    expect("exp_avg", exp_avg, param.shape, param.dtype)
    expect("exp_avg_sq", exp_avg_sq, param.shape, param.dtype)
    expect("step", step, (1,), torch.int64)
    expect("learning_rate", learning_rate, (), torch.float32, torch.float64)
    if ema is not None:
        expect("ema", ema, param.shape, param.dtype)
    if shadow is not None:
        expect("shadow", shadow, param.shape, torch.bfloat16, torch.float16)


def reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    ema: Tensor | None,
    shadow: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    ema_decay: float,
    ema_warmup: float,
    zero_grad: bool,
) -> Tensor:
    g = grad.to(param.dtype)
    norm = g.square().sum().sqrt()
    finite = norm.isfinite()
    t = (step + 1).double()
    learning_rate = learning_rate.double()
    g = g * (max_grad_norm / (norm + 1e-6)).clamp(max=1)
    new_exp_avg = beta1 * exp_avg + (1 - beta1) * g
    new_exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g.square()
    denominator = new_exp_avg_sq.sqrt() / (1 - beta2**t).sqrt().to(param.dtype) + eps
    new_param = param * (1 - learning_rate * weight_decay).to(param.dtype)
    new_param = new_param - (learning_rate / (1 - beta1**t)).to(param.dtype) * new_exp_avg / denominator
    pairs = [(param, new_param), (exp_avg, new_exp_avg), (exp_avg_sq, new_exp_avg_sq), (step, step + 1)]
    if ema is not None:
        decay = (t / (t + ema_warmup)).clamp(max=ema_decay).to(param.dtype)
        pairs.append((ema, ema + (1 - decay) * (new_param - ema)))
    if shadow is not None:
        pairs.append((shadow, new_param.to(shadow.dtype)))
    for old, new in pairs:
        old.copy_(torch.where(finite, new, old))
    if zero_grad:
        grad.zero_()
    return norm


_adamw_ema_ = define(
    "adamw_ema_(Tensor(a!) param, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!) step,"
    " Tensor learning_rate, Tensor(f!)? ema, Tensor(g!)? shadow, float beta1, float beta2, float eps,"
    " float weight_decay, float max_grad_norm, float ema_decay, float ema_warmup, bool zero_grad) -> Tensor",
    module="adamw_ema",
    reference=reference,
    fake=lambda param, *_: param.new_empty(()),
)
