"""Diffusion noising: an image plus noise at a given level, with the noise given or made in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdmd.ops._math import per_sample, wide_dtype
from fastdmd.ops._recompute import check_first_run, drawn_before
from fastdmd.ops._registry import compose, define
from fastdmd.ops._validate import DTYPES, check_constant, check_images, has_tangent
from fastdmd.ops.philox import check_rng_key, reference_normals


def add_noise(
    x: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    rng_key: Tensor | None = None,
    rng_state: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Noises images to the level `sigma`: `x_t = scale * (x + sigma * noise)` (Karras et al. 2022, section 2).

    Args:
        x: images `[B, C, H, W]`, floating point.
        sigma: noise level of each image `[B]`, in units of pixel values; a constant.
        noise: standard normal `[B, C, H, W]`, of the dtype and device of `x`; or else
        rng_key: key of `ops.rng_key`, of which the noise is a function. It is made on the fly, never touching memory,
            and is the same at every call and in every memory format; or else
        rng_state: state of `ops.rng_state`: the same with a fresh key for every call. A checkpointed function sees the
            same noise again when it is recomputed, and the state is advanced once.
        scale: factor of each image `[B]`, such as EDM's `c_in`; a constant. Default: 1.
        dtype: of the result. Default: that of `x`.

    Returns `x_t`, laid out like `x`. Differentiable in `x` and `noise`, as often as you like.
    Raises TypeError or ValueError, naming what was expected and what came; RuntimeError for a draw from rng_state
    in a backward pass that is no recomputation of a known one.
    """
    sources = {"noise": noise, "rng_key": rng_key, "rng_state": rng_state}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ValueError(f"fastdmd.add_noise: expected one of noise, rng_key and rng_state, got {got}")
    if noise is not None:
        x, noise = check_images("add_noise", x=x, noise=noise)
        dtype = _check(x, sigma, scale, dtype)
        compute = reference if has_tangent(x, sigma, noise, scale) else _add_noise
        return compute(x, sigma, noise, scale, dtype)
    (x,) = check_images("add_noise", x=x)
    dtype = _check(x, sigma, scale, dtype)
    key = rng_key if rng_state is None else rng_state
    assert key is not None
    check_rng_key("add_noise", given[0], key, x)
    if rng_state is not None:
        drawn = drawn_before(rng_state)
        key = _take_rng_key(rng_state) if drawn is None else drawn
    compute = reference_rng if has_tangent(x, sigma, scale) else _add_noise_rng
    return compute(x, sigma, key, scale, dtype)


def _check(x: Tensor, sigma: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the result, where all is as it should be."""
    check_constant("add_noise", "sigma", sigma, x)
    if scale is not None:
        check_constant("add_noise", "scale", scale, x)
    dtype = dtype or x.dtype
    if dtype not in DTYPES:
        raise TypeError(f"fastdmd.add_noise: expected a floating point dtype, got {dtype}")
    return dtype


def reference(x: Tensor, sigma: Tensor, noise: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    x_t = x.to(wide_dtype(x)) + per_sample(sigma, x) * noise.to(wide_dtype(x))
    return (x_t if scale is None else per_sample(scale, x) * x_t).to(dtype)


def reference_rng(x: Tensor, sigma: Tensor, rng_key: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return reference(x, sigma, reference_normals(x, rng_key), scale, dtype)


def _take(rng_state: Tensor) -> Tensor:
    """The key of a call, after which the state is that of the next one."""
    check_first_run()
    key = rng_state.clone()
    rng_state[2].add_(1)
    return key


def _fake_take(rng_state: Tensor) -> Tensor:
    check_first_run()
    return torch.empty_like(rng_state)


def _fake(x: Tensor, sigma: Tensor, source: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, sigma, source, scale, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(sigma, scale)


def _backward(ctx, saved: tuple[Tensor, ...], grad: Tensor):
    sigma, scale = saved
    grad_x = grad if scale is None else per_sample(scale, grad) * grad
    grad_noise = per_sample(sigma, grad) * grad_x if ctx.needs_input_grad[2] else None
    return (
        grad_x.to(ctx.dtype) if ctx.needs_input_grad[0] else None,
        None,
        None if grad_noise is None else grad_noise.to(ctx.dtype),
        None,
        None,
    )


_add_noise = define(
    "add_noise(Tensor x, Tensor sigma, Tensor noise, Tensor? scale, ScalarType dtype) -> Tensor",
    module="add_noise",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_add_noise_rng = define(
    "add_noise_rng(Tensor x, Tensor sigma, Tensor rng_key, Tensor? scale, ScalarType dtype) -> Tensor",
    module="add_noise",
    reference=reference_rng,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_take_rng_key = compose(
    "take_rng_key(Tensor(a!) rng_state) -> Tensor",
    function=_take,
    fake=_fake_take,
)
