"""Diffusion noising: an image plus noise at a given level, with the noise given or made in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdmd.ops._math import per_sample, wide_dtype
from fastdmd.ops._recompute import check_first_run, drawn_before, replay
from fastdmd.ops._registry import compose, define
from fastdmd.ops._validate import (
    DTYPES,
    check_constant,
    check_images,
    check_no_tangent,
    has_tangent,
)
from fastdmd.ops.philox import CALL, check_rng_state, reference_normals


def add_noise(
    x: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    rng_state: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Noises images to the level `sigma`: `x_t = scale * (x + sigma * noise)` (Karras et al. 2022, section 2).

    Args:
        x: images `[B, C, H, W]`, floating point.
        sigma: noise level of each image `[B]`, in units of pixel values; a constant.
        noise: standard normal `[B, C, H, W]`, of the dtype and device of `x`; or else
        rng_state: state of `ops.rng_state`, from which the noise is made on the fly, never touching memory. It is
            advanced. The noise is a function of seed, call and the element's place in the memory of `x`: a
            checkpointed function sees the same again when it is recomputed, and the state is advanced once.
        scale: factor of each image `[B]`, such as EDM's `c_in`; a constant. Default: 1.
        dtype: of the result. Default: that of `x`.

    Returns `x_t`, laid out like `x`. Differentiable in `x` and `noise`, as often as you like.
    Raises TypeError or ValueError, naming what was expected and what came; RuntimeError for a draw from rng_state
    in a backward pass that is no recomputation of a known one.
    """
    if noise is not None and rng_state is None:
        x, noise = check_images("add_noise", x=x, noise=noise)
        dtype = _check(x, sigma, scale, dtype)
        compute = reference if has_tangent(x, sigma, noise, scale) else _add_noise
        return compute(x, sigma, noise, scale, dtype)
    if rng_state is not None and noise is None:
        (x,) = check_images("add_noise", x=x)
        dtype = _check(x, sigma, scale, dtype)
        check_rng_state("add_noise", rng_state, x)
        check_no_tangent("add_noise", x, sigma, scale)
        return _draw(x, sigma, rng_state, scale, dtype)
    got = "neither" if noise is None else "both"
    raise ValueError(f"fastdmd.add_noise: expected either noise or rng_state, got {got}")


def _check(x: Tensor, sigma: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the result, where all is as it should be."""
    check_constant("add_noise", "sigma", sigma, x)
    if scale is not None:
        check_constant("add_noise", "scale", scale, x)
    dtype = dtype or x.dtype
    if dtype not in DTYPES:
        raise TypeError(f"fastdmd.add_noise: expected a floating point dtype, got {dtype}")
    return dtype


def _draw(x: Tensor, sigma: Tensor, rng_state: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    drawn = drawn_before(rng_state)
    if drawn is not None:
        return replay(_add_noise_drawn, x, sigma, drawn, scale, dtype)
    if torch.is_grad_enabled() and x.requires_grad:  # torch differentiates no op that also changes an argument
        x_t = _add_noise_drawn(x, sigma, rng_state, scale, dtype)
        rng_state[1].add_(CALL)
        return x_t
    return _add_noise_rng(x, sigma, rng_state, scale, dtype)


def reference(x: Tensor, sigma: Tensor, noise: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    x_t = x.to(wide_dtype(x)) + per_sample(sigma, x) * noise.to(wide_dtype(x))
    return (x_t if scale is None else per_sample(scale, x) * x_t).to(dtype)


def reference_rng(x: Tensor, sigma: Tensor, rng_state: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    noise = reference_normals(x, rng_state)
    rng_state[1] += CALL
    return reference(x, sigma, noise, scale, dtype)


def _drawn(x: Tensor, sigma: Tensor, rng_state: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _add_noise_rng(x, sigma, rng_state.clone(), scale, dtype)


def _fake(x: Tensor, sigma: Tensor, source: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _fake_draw(x: Tensor, sigma: Tensor, rng_state: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    check_first_run()
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
    "add_noise_rng(Tensor x, Tensor sigma, Tensor(a!) rng_state, Tensor? scale, ScalarType dtype) -> Tensor",
    module="add_noise",
    reference=reference_rng,
    fake=_fake_draw,
    before=check_first_run,
)
_add_noise_drawn = compose(
    "add_noise_drawn(Tensor x, Tensor sigma, Tensor rng_state, Tensor? scale, ScalarType dtype) -> Tensor",
    function=_drawn,
    fake=_fake_draw,
    setup_context=_setup_context,
    backward=_backward,
)
