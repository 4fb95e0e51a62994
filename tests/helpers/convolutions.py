"""What the tests of both convolutions take and compare."""

import torch


def inputs(shape, side, bias=True):
    """Images `[B, C_in, H, W]`, channels_last, a weight and a bias, of `(B, C_in, C_out, H, W)`."""
    B, C_in, C_out, H, W = shape
    generator = torch.Generator().manual_seed(B * H)
    x = torch.randn(B, C_in, H, W, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(C_out, C_in, side, side, generator=generator) / C_in**0.5
    return x, weight, torch.randn(C_out, generator=generator) if bias else None


def results(function, *arguments, dtype=torch.float32):
    """The output and the gradients of all arguments; that of the output is one that `dtype` holds."""
    arguments = [None if a is None else a.detach().clone().requires_grad_() for a in arguments]
    y = function(*arguments)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(y.dtype)
    return [y, *torch.autograd.grad(y, [a for a in arguments if a is not None], grad_y)]
