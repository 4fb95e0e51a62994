"""What the UNet is made of: convolutions, norms, resampling, attention and the residual block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdmd import ops
from fastdmd.networks.unet_config import UNetConfig
from fastdmd.ops._registry import backends, inside
from fastdmd.ops._validate import has_tangent, laid_out, memory_format


def on_gpu(x: Tensor) -> bool:
    """Where every launch costs, and every pass over features: a bias is added in what follows the convolution."""
    return x.is_cuda


class OfBias(torch.autograd.Function):
    """Features that have a bias `[C]` already; here they meet for the sake of its gradient, one launch on a GPU."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        ctx.layout = memory_format(y)
        ctx.blocks = None if torch.compiler.is_compiling() else backends()
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1]:
            return grad, None
        if ctx.blocks is None:
            return grad, torch.ops.fastdmd.bias_gradient(laid_out(grad, ctx.layout))
        with inside(ctx.blocks):
            return grad, ops.bias_gradient(laid_out(grad, ctx.layout))


class AddBias(OfBias):
    """Features and their bias: a sum, which torch.compile fuses with others."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        OfBias.forward(ctx, y, bias)
        return y + bias.to(y.dtype)[:, None, None]  # as autocast does


def _is_trained(x: Tensor, layer: nn.Conv2d) -> bool:
    """Whether a gradient of the bias will be asked for, by a backward pass."""
    return layer.bias is not None and layer.bias.requires_grad and torch.is_grad_enabled() and not has_tangent(x)


def _convolve(convolution: Callable[..., Tensor], layer: nn.Conv2d, x: Tensor, with_bias: bool) -> Tensor:
    if with_bias and on_gpu(x) and _is_trained(x, layer):
        return AddBias.apply(convolution(x, layer.weight), layer.bias)
    return convolution(x, layer.weight, layer.bias if with_bias else None)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padded by one; with its bias, if nobody else adds that."""

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        return _convolve(ops.conv3x3, self, x, with_bias)


class Conv1x1(nn.Conv2d):
    """A convolution of pixels one by one; with its bias, if nobody else adds that."""

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        return _convolve(ops.conv1x1, self, x, with_bias)


class Product1x1(Conv1x1):
    """One that is, on a GPU, a matrix product that adds the bias by itself.

    After a convolution torch.compile adds it in what follows, and where that is nothing that it generates, in a launch
    that reads and writes all. Only there it pays: sums of products, unlike those of convolutions, lose their layout.
    """

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        is_product = with_bias and on_gpu(x) and x.is_contiguous(memory_format=torch.channels_last)
        return self.as_product(x) if is_product else super().forward(x, with_bias)

    def as_product(self, x: Tensor) -> Tensor:  # [B, C_in, H, W], channels_last -> [B, C_out, H, W], likewise
        weight = self.weight.permute(0, 2, 3, 1).flatten(0, 2)  # so that its gradient has its strides
        if not _is_trained(x, self):
            return F.linear(x.permute(0, 2, 3, 1), weight, self.bias).permute(0, 3, 1, 2)
        assert self.bias is not None
        y = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.detach()).permute(0, 3, 1, 2)
        return OfBias.apply(y, self.bias)


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int = 3,
    init_scale: float = 1.0,
    kind: type[nn.Conv2d] | None = None,  # default: Conv3x3, or Conv1x1
) -> nn.Conv2d:
    """A same-padded convolution with Xavier-uniform weights times `init_scale` and zero bias."""
    kind = kind or (Conv3x3 if kernel == 3 else Conv1x1)
    layer = kind(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(init_scale)
    assert layer.bias is not None  # as torch makes it
    nn.init.zeros_(layer.bias)
    return layer


def linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def separable_filter(taps: tuple[int, ...]) -> Tensor:
    """`taps taps^T / sum(taps)^2`, which keeps the mean of what it filters, `[len(taps), len(taps)]`."""
    weights = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(weights, weights) / weights.sum() ** 2


class Resample(nn.Module):
    """Halves ("down") or doubles ("up") a feature map with a separable filter; (1, 1) is average and repetition."""

    kernel: Tensor | None  # [taps, taps]; None for the average

    def __init__(self, direction: str, taps: tuple[int, ...]):
        super().__init__()
        self.direction = direction
        self.padding = (len(taps) - 1) // 2
        is_average = len(taps) == 2 and taps[0] == taps[1]
        kernel = separable_filter(taps) * (4 if direction == "up" else 1)
        self.register_buffer("kernel", None if is_average else kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H / 2, W / 2] or [B, C, 2 H, 2 W]
        if self.kernel is None:
            return F.avg_pool2d(x, 2) if self.direction == "down" else Repeat.apply(x)
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, *self.kernel.shape)
        convolve = F.conv2d if self.direction == "down" else F.conv_transpose2d
        return convolve(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])


class Repeat(torch.autograd.Function):
    """Doubles a feature map by repetition; its gradient is a sum over 2x2 pixels.

    torch.compile makes of F.interpolate's own gradient atomic additions into float32 zeros, in another layout.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return F.avg_pool2d(grad, 2, divisor_override=1)


class Concatenate(torch.autograd.Function):
    """Channels of `x` and of `skip`; their gradients are dense.

    Slices of one gradient would be copied by each convolution that gets them, twice: for its input and its weights.
    """

    @staticmethod
    def forward(ctx, x: Tensor, skip: Tensor) -> Tensor:
        ctx.channels, ctx.layout = (x.shape[1], skip.shape[1]), memory_format(x)
        return torch.cat([x, skip], dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        first, second = grad.split(ctx.channels, dim=1)
        return laid_out(first, ctx.layout), laid_out(second, ctx.layout)


class ResidualInput(nn.Module):
    """NCSN++: the input, convolved and downsampled, on its way into the encoder; padded once for both."""

    kernel: Tensor  # [taps, taps]

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[int, ...]):
        super().__init__()
        self.conv = conv(in_channels, out_channels)
        self.register_buffer("kernel", separable_filter(taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] -> [B, C_out, H / 2, W / 2]
        padding = 1 + (len(self.kernel) - 1) // 2
        x = F.conv2d(x, self.conv.weight, padding=padding)
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, *self.kernel.shape)
        assert self.conv.bias is not None
        return F.conv2d(x, kernel, stride=2, groups=x.shape[1]) + self.conv.bias[:, None, None]


class GroupNormSiLU(nn.GroupNorm):
    """Normalises, scales and shifts per sample if asked to, and applies SiLU, in one pass."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, offset: Tensor | None = None
    ) -> Tensor:
        """Of `x + offset` `[B, C, H, W]`, with `scale` and `shift` or neither; see `ops.group_norm_silu`."""
        tables = {"scale": scale, "shift": shift, "offset": offset}
        return ops.group_norm_silu(x, self.weight, self.bias, num_groups=self.num_groups, eps=self.eps, **tables)


class GroupNorm(nn.GroupNorm):
    """Normalises, and keeps the layout of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.weight, self.bias, num_groups=self.num_groups, eps=self.eps)


def num_groups(channels: int) -> int:
    """Up to 32 groups of at least 4 channels; the largest such count that divides `channels`."""
    return next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)


def num_heads(channels: int, config: UNetConfig) -> int:
    """Of attention over so many channels; ADM has none, and so no attention, where they do not fill one head."""
    per_head = config.channels_per_head
    return 1 if per_head == 0 else max(0 if config.adm else 1, channels // per_head)


def norm_silu(channels: int, config: UNetConfig) -> GroupNormSiLU:
    return GroupNormSiLU(num_groups(channels), channels, eps=norm_eps(config))


def norm_eps(config: UNetConfig) -> float:
    return 1e-5 if config.adm else 1e-6


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, as a residual branch."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.num_heads = num_heads(channels, config)
        if channels % self.num_heads:
            raise ValueError(
                f"fastdmd.UNet: expected channels divisible by their {self.num_heads} heads (channels_per_head "
                f"{config.channels_per_head}), got {channels}"
            )
        self.norm = GroupNorm(num_groups(channels), channels, eps=norm_eps(config))
        self.qkv = conv(channels, 3 * channels, kernel=1, kind=Product1x1)
        self.proj = conv(channels, channels, kernel=1, init_scale=1e-5)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # [B, H, W, 3C]: a view when x is channels_last
        qkv = qkv.reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        y = attend(*qkv.unbind(0))  # [B, heads, HW, C/heads]
        y = y.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return self.proj(y).add_(x)


MAX_PIXELS = 256  # of attention by products on a CPU


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`softmax(scale q k^T) v` of `[..., N, D]`; without a scale, `1 / sqrt(D)`.

    On a CPU and for up to MAX_PIXELS, plain products were measured twice as fast as scaled_dot_product_attention in
    float32 (with the products of `fastdmd.runs.machine`, and with heads of 8 channels 13 times; as fast without) and 3
    to 5 times in bfloat16.
    """
    if q.is_cpu and q.shape[-2] <= MAX_PIXELS:
        return torch.softmax(q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, embedding, norm, SiLU, dropout, conv; optional resampling and attention."""

    def __init__(
        self, in_channels: int, out_channels: int, config: UNetConfig, *, resample: str = "", attention: bool = False
    ):
        super().__init__()
        self.resample = Resample(resample, config.resample_filter) if resample else None
        self.adaptive_scale, self.skip_scale = config.adaptive_scale, config.skip_scale
        self.embedding_channels = 2 * out_channels if config.adaptive_scale else out_channels
        self.norm0 = norm_silu(in_channels, config)
        self.conv0 = conv(in_channels, out_channels)
        self.norm1 = norm_silu(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv1 = conv(out_channels, out_channels, init_scale=1e-5)
        has_skip = in_channels != out_channels or (resample and not config.adm)
        self.skip = conv(in_channels, out_channels, kernel=1) if has_skip else None
        self.attention = Attention(out_channels, config) if attention and num_heads(out_channels, config) else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # [B, C_in, H, W], [B, embedding_channels]
        y = self.norm0(x)
        if self.resample is not None:
            x, y = self.resample(x), self.resample(y)
        scale, shift, offset = (*embedding.chunk(2, dim=1), None) if self.adaptive_scale else (None, None, embedding)
        if on_gpu(y) and type(self.conv0) is Conv3x3 and self.conv0.bias is not None:
            y, bias = self.conv0(y, with_bias=False), self.conv0.bias
            offset = bias if offset is None else offset + bias
        else:
            y = self.conv0(y)
        y = self.norm1(y, scale, shift, offset)
        x = self._scaled(self._sum(x, self.dropout(y)))
        return x if self.attention is None else self._scaled(self.attention(x))

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        """`conv1(y) + skip(x)`, in place, as no gradient needs a convolution's output."""
        if on_gpu(x) and type(self.conv1) is Conv3x3 and type(self.skip) is Conv1x1:
            if _is_trained(x, self.conv1) and _is_trained(x, self.skip):  # two biases of one gradient
                assert self.conv1.bias is not None and self.skip.bias is not None
                y = self.conv1(y, with_bias=False).add_(self.skip(x, with_bias=False))
                return AddBias.apply(y, self.conv1.bias + self.skip.bias)
        return self.conv1(y).add_(x if self.skip is None else self.skip(x))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.skip_scale == 1 else x.mul_(self.skip_scale)  # of a fresh sum, which no gradient needs
