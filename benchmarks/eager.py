"""What one would write without fastdmd: the ops in eager PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def add_noise(x, sigma):
    return x + sigma.to(x.dtype)[:, None, None, None] * torch.randn_like(x)


def dm_loss(x_gen, D_real, D_fake):
    with torch.no_grad():
        p_real, p_fake = x_gen - D_real, x_gen - D_fake
        grad = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(dim=(1, 2, 3), keepdim=True))
    return 0.5 * F.mse_loss(x_gen, (x_gen - grad).detach())


def denoising_loss(D_x, images, weight):
    return (weight.to(images.dtype)[:, None, None, None] * (D_x - images) ** 2).mean()


def fake_loss(D_fake, x_gen, sigma):
    return denoising_loss(D_fake, x_gen, sigma**-2 + 4)


def group_norm_silu(x, weight, bias, num_groups=16):
    return F.silu(F.group_norm(x, num_groups, weight, bias, 1e-5))


class AdamW:
    """torch's AdamW on views of flat buffers, clipping and averaging, and a low-precision copy if there is one."""

    def __init__(
        self, param, grad, exp_avg, exp_avg_sq, step, learning_rate, ema, shadow, *, num_tensors=200, **options
    ):
        def parts(flat):
            return list(flat.tensor_split(min(num_tensors, flat.numel())))

        self.parameters = [torch.nn.Parameter(part) for part in parts(param)]
        self.grads, self.average = parts(grad), parts(ema)
        self.shadow = None if shadow is None else parts(shadow)
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=float(learning_rate), weight_decay=0.01, capturable=param.is_cuda, **options
        )
        for p, g, m, v in zip(self.parameters, self.grads, parts(exp_avg), parts(exp_avg_sq), strict=True):
            p.grad = g.to(p.dtype)
            self.adamw.state[p] = {"step": step[0].float(), "exp_avg": m, "exp_avg_sq": v}

    @torch.no_grad()
    def __call__(self, max_grad_norm):
        if self.shadow is not None:  # then gradients are narrow, too
            torch._foreach_copy_([p.grad for p in self.parameters], self.grads)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        self.adamw.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 0.001)
        if self.shadow is not None:
            torch._foreach_copy_(self.shadow, [p.detach() for p in self.parameters])
        return norm


def with_gradient(function, differentiated):
    """Forward, and backward to the first arguments, as one call; nothing is accumulated."""

    def call(*arguments):
        result = function(*arguments)
        grad = None if result.dim() == 0 else torch.ones_like(result)
        return torch.autograd.grad(result, arguments[:differentiated], grad)

    return call
