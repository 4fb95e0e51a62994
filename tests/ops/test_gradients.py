"""Derivatives of the ops: of first and second order, forward mode, what is kept for them and who computes them."""

import importlib
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fastdmd import ops
from tests.helpers.op_cases import CASES, LAYOUTS, Inputs, random

BACKENDS = list(ops.implementations("dm_loss"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"])
def test_gradcheck(check, backend):
    C, H, W = (2, 2, 1) if backend == "triton" else (4, 3, 3)  # the interpreter takes its time
    with ops.use_backend(backend):
        x, noise, output = (random(2, C, H, W, seed=k).requires_grad_() for k in range(3))
        sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
        assert check(lambda x, n: ops.add_noise(x, sigma, noise=n, scale=sigma), (x, noise))
        assert check(lambda x: ops.add_noise(x, sigma, rng_key=ops.rng_key(3), scale=sigma), (x,))
        assert check(lambda x: ops.add_noise(x, sigma, rng_state=ops.rng_state(3), scale=sigma), (x,))
        assert check(lambda D: ops.denoising_loss(D, x.detach(), sigma), (output,))
        assert check(lambda D: ops.fake_loss(D, x.detach(), sigma), (output,))
        assert check(lambda F: ops.fake_loss_raw(F, x.detach(), noise.detach(), sigma), (output,))
        weight, bias, table = (random(*shape, seed=5).requires_grad_() for shape in ((C,), (C,), (2, 2 * C)))
        assert check(lambda x, w, b: ops.group_norm_silu(x, w, b, num_groups=C // 2), (x, weight, bias))
        assert check(lambda x, w, b: ops.group_norm(x, w, b, num_groups=C // 2), (x, weight, bias))
        assert check(lambda x: ops.group_norm(x, num_groups=C // 2), (x,))

        def adaptive(x, w, b, table):
            scale, shift = table.chunk(2, dim=1)
            return ops.group_norm_silu(x, w, b, num_groups=C // 2, scale=scale, shift=shift, offset=scale)

        assert check(adaptive, (x, weight, bias, table))
        channels_last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        assert check(adaptive, (channels_last, weight, bias, table))
        kernel = random(2, C, 3, 3, seed=6).requires_grad_()
        assert check(ops.conv3x3, (x, kernel, bias[:2]))
        assert check(ops.conv1x1, (x, kernel.detach()[..., :1, :1].requires_grad_(), bias[:2]))
        if backend == "reference":  # else it knows float32 alone
            assert check(torch.ops.fastdmd.conv3x3, (channels_last, kernel, bias[:2]))


def penalty(convolution, normalise, layout):
    """R1: the squared gradient of a discriminator in its input, with all its derivatives; weights are used twice."""
    x = random(4, 16, 12, 12, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
    kernel = (0.1 * random(16, 16, 3, 3, dtype=torch.float32, seed=1)).requires_grad_()
    weight, bias, table = (
        random(*shape, dtype=torch.float32, seed=2).requires_grad_() for shape in ((16,), (16,), (4, 32))
    )
    h = x
    for _ in range(2):
        scale, shift = table.chunk(2, dim=1)
        h = normalise(convolution(h, kernel, bias), weight, weight, scale, shift)
    (grad,) = torch.autograd.grad(F.softplus(h).sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), (x, kernel, weight, bias, table))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_gradient_penalties_are_those_of_torch(layout, backend):
    def normalise(x, w, b, scale, shift):
        return F.silu(F.group_norm(x, 4, w, b) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    expected = penalty(lambda x, w, b: F.conv2d(x, w, b, padding=1), normalise, layout)
    with ops.use_backend(backend):
        result = penalty(
            ops.conv3x3, lambda x, w, b, s, t: ops.group_norm_silu(x, w, b, num_groups=4, scale=s, shift=t), layout
        )
    for own, exact in zip(result, expected, strict=True):
        assert (own - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_hessian_products_of_the_losses(dtype, backend):
    D, x_gen, x_t, v = (random(2, 3, 4, 4, seed=k).to(dtype) for k in range(4))
    sigma, numel = torch.tensor([0.5, 2.0], dtype=dtype), D.numel()
    D.requires_grad_()
    # The factor stands for what makes the loss: d (a L) / dD depends on a, and on D.
    factor = torch.tensor(3.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    for loss, weight in (
        (lambda: ops.denoising_loss(D, x_gen, sigma), sigma),
        (lambda: ops.fake_loss(D, x_gen, sigma), sigma**-2 + 4),
        (lambda: ops.fake_loss_raw(D, x_gen, x_t, sigma), torch.ones_like(sigma)),
    ):
        with ops.use_backend(backend):
            (grad,) = torch.autograd.grad(factor * loss(), D, create_graph=True)
            product, of_factor = torch.autograd.grad(grad, (D, factor), v)
        assert_close(product, 3 * 2 / numel * weight[:, None, None, None] * v)
        assert_close(of_factor, (grad.double() / 3 * v.double()).sum().to(factor.dtype), rtol=2e-2, atol=1e-3)


LAST_OPS = {
    "add_noise": lambda x, w: ops.add_noise(x, torch.ones(4), noise=x, scale=torch.ones(4) / 3),
    "dm_loss": lambda x, w: ops.dm_loss(x, x.detach() + 1, x.detach() ** 2),
    "denoising_loss": lambda x, w: ops.denoising_loss(x, x.detach() ** 2, torch.ones(4)),
    "fake_loss": lambda x, w: ops.fake_loss(x, x.detach() ** 2, torch.ones(4)),
    "group_norm_silu": lambda x, w: ops.group_norm_silu(x, w[:, 0, 0, 0], w[:, 0, 0, 1], num_groups=4),
    "conv1x1": lambda x, w: ops.conv1x1(x, w[..., :1, :1]),
    "conv3x3": lambda x, w: ops.conv3x3(x, w),
}


@pytest.mark.parametrize("op", LAST_OPS)
def test_a_checkpoint_may_end_with_any_op(op):
    """The backward of that op starts the recomputation, whose graph torch needs."""
    x = random(4, 16, 12, 12, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    kernel = random(16, 16, 3, 3, dtype=torch.float32, seed=1).requires_grad_()

    def straight(x):
        return LAST_OPS[op](x.sin(), kernel)

    inputs = (x, kernel) if op in ("group_norm_silu", "conv1x1", "conv3x3") else (x,)
    expected = torch.autograd.grad(straight(x).sum(), inputs)
    checkpointed = checkpoint(straight, x, use_reentrant=False)
    assert_close(torch.autograd.grad(checkpointed.sum(), inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_second_derivative_says_so(backend):
    x, D_real, D_fake, x_t = (random(2, 4, 4, 4, seed=k) for k in range(4))
    x.requires_grad_()
    with ops.use_backend(backend):
        for name, loss in (
            ("dm_loss", ops.dm_loss(x, D_real, D_fake)),
            ("dm_loss_raw", ops.dm_loss_raw(x, x_t, torch.ones(2), D_real, D_fake)),
        ):
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            assert_close(grad, torch.autograd.grad(loss, x, retain_graph=True)[0])
            with pytest.raises(NotImplementedError, match=f"fastdmd.{name}: .* no second derivative"):
                (grad.square().sum() + x.sum()).backward()
        for case in ("dm_gradient", "scale_gradient", "group_norm_silu_backward"):
            first, *others = CASES[case](Inputs((2, 4, 4, 4)))
            result = getattr(torch.ops.fastdmd, case)(first.requires_grad_(), *others)
            with pytest.raises(NotImplementedError, match=f"fastdmd.{case}: .* no second derivative"):
                (result if isinstance(result, torch.Tensor) else result[0]).sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_forward_mode_is_right_or_refused(layout):
    x, tangent = (random(4, 16, 8, 8, dtype=torch.float32, seed=k).contiguous(memory_format=layout) for k in (0, 1))
    sigma, weight = torch.tensor([0.3, 2.0, 1.0, 5.0]), random(16, dtype=torch.float32)
    kernel, table = random(16, 16, 3, 3, dtype=torch.float32), random(4, 16, dtype=torch.float32)
    spread, factor = table[:, :, None, None], (sigma + sigma**2)[:, None, None, None]
    for own, plain in (
        (lambda x: ops.add_noise(x, sigma, noise=x, scale=sigma), lambda x: x * factor),
        (lambda x: ops.conv3x3(x, kernel, weight), lambda x: F.conv2d(x, kernel, weight, padding=1)),
        (lambda x: ops.conv1x1(x, kernel[..., :1, :1], weight), lambda x: F.conv2d(x, kernel[..., :1, :1], weight)),
        (
            lambda x: ops.group_norm_silu(x, weight, weight, num_groups=4, scale=table, shift=table),
            lambda x: F.silu(F.group_norm(x, 4, weight, weight) * (1 + spread) + spread),
        ),
    ):
        expected = torch.func.jvp(plain, (x.contiguous(),), (tangent.contiguous(),))
        assert_close(torch.func.jvp(own, (x,), (tangent,)), expected, rtol=1e-5, atol=1e-5)
    for refused in (
        lambda x: ops.fake_loss(x, x, sigma),
        lambda x: ops.fake_loss_raw(tangent, tangent, x, sigma),
        lambda x: ops.denoising_loss(tangent, tangent, x[:, 0, 0, 0]),
        lambda x: ops.dm_loss(tangent, x, x),
        lambda x: ops.dm_loss_raw(x, x, sigma, x, x),
        lambda x: ops.dm_gradient(x, x, x),
    ):
        with pytest.raises(NotImplementedError, match="expected derivatives by backward, got forward mode"):
            torch.func.jvp(refused, (x,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="fastdmd.fake_loss: "):
        ops.fake_loss(forward_ad.make_dual(x, tangent), x, sigma)


def test_a_gradient_that_is_changed_in_place_leaves_the_next_one_alone():
    x, D_real, D_fake = (random(2, 3, 4, 4, dtype=torch.float32, seed=k) for k in range(3))
    x.requires_grad_()
    for loss in (ops.dm_loss(x, D_real, D_fake), ops.fake_loss(x, D_real, torch.ones(2))):
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        kept = first.clone()
        first.zero_()
        assert torch.equal(torch.autograd.grad(loss, x)[0], kept)


def test_what_is_kept_for_backward():
    """The loss keeps its gradient, and the levels for a second one; the networks' ops keep their inputs."""
    i = Inputs((2, 16, 8, 8), layout=torch.channels_last)
    x, a, b, sigma = i.image().requires_grad_(), i.image(), i.image(), i.level()
    weight, kernel = torch.ones(16), torch.ones(16, 16, 3, 3)
    for call, expected in (
        (lambda: ops.dm_loss(x, a, b), x.numel()),
        (lambda: ops.fake_loss(x, a, sigma), x.numel() + 2),
        (lambda: ops.denoising_loss(x, a, sigma), x.numel() + 2),
        (lambda: ops.add_noise(x, sigma, rng_state=ops.rng_state(0), scale=sigma), 4),
        (lambda: ops.conv3x3(x, kernel), x.numel() + kernel.numel()),
        (lambda: ops.conv1x1(x, kernel[:, :, :1, :1]), x.numel() + 16 * 16),
        (lambda: ops.group_norm_silu(x, weight, weight, num_groups=4), x.numel() + 2 * 2 * 4 + 2 * 16),
    ):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            call()
        assert sum(kept) == expected


def test_backward_is_computed_by_what_computed_forward(monkeypatch):
    """After the block, and in another thread, as on a GPU."""
    registry = importlib.import_module("fastdmd.ops._registry")
    module, reference = registry._OPS["group_norm_silu_backward"]
    calls = []
    recorder = lambda *arguments: calls.append(threading.current_thread()) or reference(*arguments)  # noqa: E731
    monkeypatch.setitem(registry._OPS, "group_norm_silu_backward", (module, recorder))
    x = random(2, 4, 3, 3).requires_grad_()
    with ops.use_backend("reference"):
        inside = ops.group_norm_silu(x, num_groups=2).sum()
    outside = ops.group_norm_silu(x, num_groups=2).sum()
    inside.backward(retain_graph=True)
    assert calls == [threading.current_thread()]
    thread = threading.Thread(target=inside.backward)
    thread.start()
    thread.join()
    assert calls == [threading.current_thread(), thread]
    with ops.use_backend("reference"):
        outside.backward()
    assert len(calls) == 2


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


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_forward_mode_over_backward_is_that_of_torch(layout):
    """The tangent comes in behind the op, and its backward alone sees it: a Hessian product, forward over reverse."""
    x, v, t = (random(4, 16, 8, 8, dtype=torch.float32, seed=k).contiguous(memory_format=layout) for k in range(3))
    kernel, weight = random(16, 16, 3, 3, dtype=torch.float32), random(16, dtype=torch.float32)
    table, sigma = random(4, 16, dtype=torch.float32), torch.tensor([0.3, 2.0, 1.0, 5.0])
    spread, factor = table[:, :, None, None], weight[:, None, None]

    def normalised(x):  # torch's own knows no forward mode over its backward
        groups = x.unflatten(1, (4, 4))
        variance = groups.var(dim=(2, 3, 4), correction=0, keepdim=True)
        return ((groups - groups.mean(dim=(2, 3, 4), keepdim=True)) / (variance + 1e-5).sqrt()).flatten(1, 2)

    def silu(x):  # the same
        return x * x.sigmoid()

    for own, plain in (
        (lambda x: ops.add_noise(x, sigma, noise=v, scale=sigma), lambda x: x * sigma[:, None, None, None]),
        (lambda x: ops.conv3x3(x, kernel, weight), lambda x: F.conv2d(x, kernel, weight, padding=1)),
        (lambda x: ops.group_norm(x, weight, num_groups=4), lambda x: normalised(x) * factor),
        (
            lambda x: ops.group_norm_silu(x, weight, weight, num_groups=4, scale=table, shift=table),
            lambda x: silu((normalised(x) * factor + factor) * (1 + spread) + spread),
        ),
    ):
        results = []
        for function in (own, plain):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            with forward_ad.dual_level():
                (grad,) = torch.autograd.grad(y, leaf, forward_ad.make_dual(v, t))
                results.append(forward_ad.unpack_dual(grad))
        assert_close(results[0].primal, results[1].primal, rtol=1e-4, atol=1e-4)
        assert_close(results[0].tangent, results[1].tangent, rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    for loss in (
        ops.denoising_loss(x, v, sigma),
        ops.fake_loss(x, v, sigma),
        ops.fake_loss_raw(x, v, t, sigma),
        ops.dm_loss(x, v, t),
        ops.dm_loss_raw(x, v, sigma, t, v),
    ):
        (exact,) = torch.autograd.grad(loss, x, retain_graph=True)
        with forward_ad.dual_level():
            factor = forward_ad.make_dual(torch.tensor(2.0), torch.tensor(3.0))
            (grad,) = torch.autograd.grad(loss * factor, x)
            grad = forward_ad.unpack_dual(grad)
        assert_close(grad.primal, 2 * exact)
        assert_close(grad.tangent, 3 * exact)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ops.implementations("fake_loss"))
def test_batched_gradients_are_those_of_one_after_the_other(backend, layout):
    """Also where the implementation itself, called with a batch of vmap's, would know nothing of it."""
    kernel, weight = random(16, 16, 3, 3, dtype=torch.float32), random(16, dtype=torch.float32)
    sigma = torch.tensor([0.3, 2.0, 1.0, 5.0])
    for function in (
        lambda x: ops.conv3x3(x, kernel),
        lambda x: ops.group_norm_silu(x, weight, num_groups=4),
        lambda x: ops.add_noise(x, sigma, noise=x.detach(), scale=sigma),
        lambda x: ops.denoising_loss(x, x.detach() + 1, sigma),
        lambda x: ops.fake_loss(x, x.detach() + 1, sigma),
    ):
        x = random(4, 16, 8, 8, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
        with ops.use_backend(backend):
            y = function(x)
            grads = random(3, *y.shape, dtype=torch.float32, seed=1)
            (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
            for own, grad in zip(batched, grads, strict=True):
                assert_close(own, torch.autograd.grad(y, x, grad, retain_graph=True)[0])
