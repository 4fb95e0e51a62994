"""The error of every op, implementation and dtype against float64, beside that of plain PyTorch in the same dtype.

    TRITON_INTERPRET=1 python -m benchmarks.accuracy --out docs/ops.md

Root mean square of the error over that of the exact value, of results and of gradients. The inputs are those of the
dtype, exactly. Without TRITON_INTERPRET=1 a CPU has no Triton column.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import describe
from fastdmd import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGMA_DATA, GROUPS, NUM_STEPS = 0.5, 4, 5


class Plain:
    """What one would write without fastdmd, in the dtype at hand."""

    def add_noise(x, noise, sigma):
        return x + spread(sigma, x) * noise

    def dm_gradient(x_gen, D_real, D_fake):
        p_real, p_fake = x_gen - D_real, x_gen - D_fake
        return (p_real - p_fake) / p_real.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)

    def dm_loss(x_gen, D_real, D_fake):
        grad = Plain.dm_gradient(x_gen, D_real, D_fake).detach()
        return 0.5 * F.mse_loss(x_gen, (x_gen - grad).detach())

    def dm_loss_raw(x_gen, x_t, F_real, F_fake, sigma):
        return Plain.dm_loss(x_gen, *(Plain.denoised(x_t, F_x, sigma) for F_x in (F_real, F_fake)))

    def denoising_loss(D_x, images, weight):
        return (spread(weight, D_x) * (D_x - images).square()).mean()

    def fake_loss(D_fake, x_gen, sigma):
        return Plain.denoising_loss(D_fake, x_gen, sigma**-2 + SIGMA_DATA**-2)

    def fake_loss_raw(F_fake, x_gen, x_t, sigma):
        return Plain.fake_loss(Plain.denoised(x_t, F_fake, sigma), x_gen, sigma)

    def denoised(x_t, F_x, sigma):
        variance = sigma**2 + SIGMA_DATA**2
        return spread(SIGMA_DATA**2 / variance, x_t) * x_t + spread(sigma * SIGMA_DATA / variance.sqrt(), x_t) * F_x

    def group_norm(x, weight, bias):
        return F.group_norm(x, GROUPS, weight, bias)

    def group_norm_silu(x, weight, bias, scale, shift, offset):
        n = F.group_norm(x + offset[:, :, None, None], GROUPS, weight, bias)
        return F.silu(n * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    def bias_gradient(grad_y):
        return grad_y.sum((0, 2, 3))

    def conv1x1(x, weight, bias):
        return F.conv2d(x, weight, bias)

    def conv3x3(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1)

    def adamw_ema_(param, grad):
        parameter = torch.nn.Parameter(param.clone())
        optimizer = torch.optim.AdamW([parameter], lr=0.1, foreach=False)
        for step in range(NUM_STEPS):
            parameter.grad = grad.roll(step)
            optimizer.step()
        return parameter.detach()


class Own:
    add_noise = lambda x, noise, sigma: ops.add_noise(x, sigma, noise=noise)  # noqa: E731
    dm_gradient = ops.dm_gradient
    dm_loss = ops.dm_loss
    dm_loss_raw = lambda x_gen, x_t, F_real, F_fake, sigma: ops.dm_loss_raw(x_gen, x_t, sigma, F_real, F_fake)  # noqa: E731
    denoising_loss = ops.denoising_loss
    fake_loss = ops.fake_loss
    fake_loss_raw = ops.fake_loss_raw
    group_norm = lambda x, w, b: ops.group_norm(x, w, b, num_groups=GROUPS)  # noqa: E731
    bias_gradient = ops.bias_gradient
    conv1x1 = ops.conv1x1
    conv3x3 = ops.conv3x3

    def group_norm_silu(x, weight, bias, scale, shift, offset):
        return ops.group_norm_silu(x, weight, bias, num_groups=GROUPS, scale=scale, shift=shift, offset=offset)

    def adamw_ema_(param, grad):
        param, step, rate = param.clone(), torch.zeros(1, dtype=torch.int64), torch.tensor(0.1, dtype=param.dtype)
        moments = torch.zeros_like(param), torch.zeros_like(param)
        for k in range(NUM_STEPS):
            ops.adamw_ema_(param, grad.roll(k), *moments, step, rate)
        return param


IMAGE, LEVEL, CHANNEL, TABLE, KERNEL = (4, 16, 48, 48), (4,), (16,), (4, 16), (16, 16, 3, 3)
# The shapes of the arguments, and of how many of them the gradient is compared.
CASES = {
    "add_noise": ((IMAGE, IMAGE, LEVEL), 2),
    "dm_gradient": ((IMAGE, IMAGE, IMAGE), 0),
    "dm_loss": ((IMAGE, IMAGE, IMAGE), 1),
    "dm_loss_raw": ((IMAGE, IMAGE, IMAGE, IMAGE, LEVEL), 1),
    "denoising_loss": ((IMAGE, IMAGE, LEVEL), 1),
    "fake_loss": ((IMAGE, IMAGE, LEVEL), 1),
    "fake_loss_raw": ((IMAGE, IMAGE, IMAGE, LEVEL), 1),
    "group_norm": ((IMAGE, CHANNEL, CHANNEL), 3),
    "group_norm_silu": ((IMAGE, CHANNEL, CHANNEL, TABLE, TABLE, TABLE), 6),
    "bias_gradient": ((IMAGE,), 1),
    "conv1x1": ((IMAGE, (16, 16, 1, 1), CHANNEL), 3),
    "conv3x3": ((IMAGE, KERNEL, CHANNEL), 3),
    "adamw_ema_": (((10_000,), (10_000,)), 0),
}


def spread(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype)[:, None, None, None]


def arguments(op: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in CASES[op][0]]
    tensors = [t.abs() + 0.1 if t.shape == LEVEL else t / 12 if t.shape == KERNEL else t for t in tensors]
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.to(dtype) for t in tensors]


def results(function: Callable, tensors: list[Tensor], num_gradients: int, dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradients, for a random upstream gradient that `dtype` can hold."""
    wanted = [t.detach().clone().requires_grad_(k < num_gradients) for k, t in enumerate(tensors)]
    y = function(*wanted)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, wanted[:num_gradients], upstream.to(dtype).to(y.dtype)) if num_gradients else ()
    return [y.detach(), *grads]


def errors(op: str, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, float]]]:
    """For the result and each gradient: what it is called, and the error by who computed it."""
    tensors, num_gradients = arguments(op, dtype), CASES[op][1]
    exact = results(getattr(Plain, op), [t.double() for t in tensors], num_gradients, dtype)
    found = {"PyTorch": results(getattr(Plain, op), tensors, num_gradients, dtype)}
    for backend in ops.implementations(op if op != "group_norm" else "group_norm_silu"):
        with ops.use_backend(backend):
            found[backend] = results(getattr(Own, op), tensors, num_gradients, dtype)
    names = getattr(Plain, op).__code__.co_varnames
    for k, truth in enumerate(exact):
        name = "value" if k == 0 else f"gradient of {names[k - 1]}"
        yield name, {who: relative(values[k], truth) for who, values in found.items()}


def relative(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def page() -> str:
    facts = describe("cpu")
    columns = ["PyTorch", "reference", "native", "triton"]
    lines = [
        "# Accuracy of the ops",
        "",
        "Root mean square of the error against float64, over that of the exact value; channels_last images of",
        f"{' x '.join(map(str, IMAGE))} standard normals. `PyTorch` is the formula as one would write it, in the same",
        "dtype. Made by `TRITON_INTERPRET=1 python -m benchmarks.accuracy --out docs/ops.md`: Triton's kernels are",
        "interpreted on the CPU, where it cuts to bfloat16 instead of rounding. `conv3x3` is torch's own in float16,",
        "and `conv1x1` in both halves;",
        f"`adamw_ema_`, after {NUM_STEPS} steps, keeps its weights in float32.",
        "",
        f"{facts['device']}, torch {facts['torch']}, Triton {facts['triton']}; native library: {facts['native']}.",
        "",
        f"| op | of | dtype | {' | '.join(columns)} |",
        f"|---|---|---|{'---|' * len(columns)}",
    ]
    for op, dtype in itertools.product(CASES, DTYPES):
        if op == "adamw_ema_" and dtype != torch.float32:
            continue
        for name, found in errors(op, dtype):
            numbers = (f"{found[who]:.1e}" if who in found else "" for who in columns)
            lines.append(f"| `{op}` | {name} | {str(dtype)[6:]} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the page; default: to the terminal")
    out = parser.parse_args().out
    if out is None:
        print(page(), end="")
    else:
        out.write_text(page())


if __name__ == "__main__":
    main()
