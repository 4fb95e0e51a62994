"""Modules as others write them, and whether what `accelerate` made of them gives the same."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 4e-2}


def numbers(module, *inputs):
    """Its output, and gradients of its inputs and parameters, by name."""
    module = copy.deepcopy(module).requires_grad_(True)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(0)
    output = module(*inputs)
    output = getattr(output, "sample", output)
    generator = torch.Generator().manual_seed(1)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    leaves = dict(module.named_parameters()) | {f"input {i}": x for i, x in enumerate(inputs)}
    return {"output": output.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def assert_same(module, original, *inputs):
    """Outputs and gradients of both, beside the greatest number of each tensor."""
    expected, found = numbers(original, *inputs), numbers(module, *inputs)
    assert expected.keys() == found.keys() and len(expected) > 2
    scale = max(value.abs().max() for name, value in expected.items() if name != "output")
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        size = value.abs().max() if name == "output" else max(value.abs().max(), scale * 1e-2)
        error = (found[name] - value).abs().max() / size
        assert error < TOLERANCES[value.dtype], (name, error)


class Norm(nn.Module):
    """EDM's: a GroupNorm that is none of PyTorch's."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return F.group_norm(x, 4, weight=self.weight.to(x.dtype), bias=self.bias.to(x.dtype), eps=1e-6)


class AdaptiveBlock(nn.Module):
    """EDM's: scale and shift between norm and SiLU, a dropout as a function."""

    def __init__(self, norm=Norm):
        super().__init__()
        self.norm0, self.norm1 = norm(16), norm(16)
        self.conv0, self.conv1 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.affine = nn.Linear(8, 32)

    def forward(self, x, embedding):
        skip = x
        x = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(embedding).unsqueeze(2).unsqueeze(3).to(x.dtype).chunk(chunks=2, dim=1)
        x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        x = self.conv1(F.dropout(x, p=0.5, training=self.training))
        return (x + skip) * 0.5**0.5


class TimesBlock(AdaptiveBlock):
    """The same, written as ADM has it."""

    def forward(self, x, embedding):
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(h) * (1 + scale) + shift
        return x + self.conv1(h * torch.sigmoid(h))


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is `factor` times what it should be."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class GroupNorm32(nn.GroupNorm):
    """In float32 whatever comes, as that of ADM and its many descendants."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def sequential(*, norm=nn.GroupNorm, activation=nn.SiLU):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        norm(4, 16),
        activation(),
        nn.Conv2d(16, 16, 3, padding=1),
        norm(4, 16),
        activation(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 3, 3, padding=1),
    )
