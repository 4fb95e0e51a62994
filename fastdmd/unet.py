"""The DDPM++ UNet with EDM preconditioning: one network class for teacher, fake score and generator."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdmd import diffusion, ops

SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two unit-variance branches at one


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Everything that determines a network; stored inside every weight file.

    `num_classes = 0` means unconditional. `patch_size > 1` folds each patch of pixels into channels before
    the first convolution and unfolds it after the last: the UNet then works at `image_size / patch_size`.
    `attention_resolutions` are feature-map sizes, as the network sees them.
    """

    image_size: int = 28
    image_channels: int = 1
    num_classes: int = 10
    patch_size: int = 1
    model_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    channels_per_head: int = 0  # 0: a single head, as in DDPM++
    embedding_multiplier: int = 4
    adaptive_scale: bool = False  # the embedding scales and shifts normalised features (ADM), or is added (DDPM++)
    dropout: float = 0.0
    sigma_data: float = 0.5

    def __post_init__(self):
        def expect(condition: bool, expected: str, got) -> None:
            if not condition:
                raise ValueError(f"fastdmd.UNetConfig: expected {expected}, got {got}")

        # JSON turns tuples into lists.
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        for name in ("image_size", "image_channels", "patch_size", "num_blocks", "embedding_multiplier"):
            expect(getattr(self, name) >= 1, f"{name} >= 1", getattr(self, name))
        expect(self.num_classes >= 0, "num_classes >= 0", self.num_classes)
        expect(self.model_channels >= 4 and self.model_channels % 2 == 0,
               "an even model_channels >= 4", self.model_channels)  # fmt: skip
        expect(len(self.channel_multipliers) >= 1 and min(self.channel_multipliers) >= 1,
               "at least one channel multiplier, each >= 1", self.channel_multipliers)  # fmt: skip
        expect(self.sigma_data > 0, "sigma_data > 0", self.sigma_data)
        factor = self.patch_size * 2 ** (len(self.channel_multipliers) - 1)
        expect(self.image_size % factor == 0,
               f"image_size divisible by {factor} (patch_size * 2^(levels - 1))", self.image_size)  # fmt: skip

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image_channels, self.image_size, self.image_size


def _conv(in_channels: int, out_channels: int, kernel: int = 3, init_scale: float = 1.0) -> nn.Conv2d:
    """A same-padded convolution with Xavier-uniform weights times `init_scale` and zero bias."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    with torch.no_grad():
        conv.weight.mul_(init_scale)
        conv.bias.zero_()
    return conv


def _linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class GroupNormSiLU(nn.GroupNorm):
    """Normalises, scales and shifts per sample if asked to, and applies SiLU, in one pass."""

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(
            x, self.weight, self.bias, num_groups=self.num_groups, scale=scale, shift=shift, eps=self.eps
        )


def _num_groups(channels: int) -> int:
    """Up to 32 groups of at least 4 channels; the largest such count that divides `channels`."""
    return next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)


def _norm_silu(channels: int) -> GroupNormSiLU:
    return GroupNormSiLU(_num_groups(channels), channels, eps=1e-6)


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, as a residual branch."""

    def __init__(self, channels: int, channels_per_head: int):
        super().__init__()
        self.num_heads = 1 if channels_per_head == 0 else max(1, channels // channels_per_head)
        self.norm = nn.GroupNorm(_num_groups(channels), channels, eps=1e-6)
        self.qkv = _conv(channels, 3 * channels, kernel=1)
        self.proj = _conv(channels, channels, kernel=1, init_scale=1e-5)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # [B, H, W, 3C]: a view when x is channels_last
        qkv = qkv.reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))  # [B, heads, HW, C/heads]
        y = y.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return self.proj(y) + x


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, embedding, norm, SiLU, dropout, conv; optional resampling and attention."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig, *, resample: str = "",
                 attention: bool = False):  # fmt: skip
        super().__init__()
        self.resample = resample
        self.adaptive_scale = config.adaptive_scale
        self.embedding_channels = 2 * out_channels if config.adaptive_scale else out_channels
        self.norm0 = _norm_silu(in_channels)
        self.conv0 = _conv(in_channels, out_channels)
        self.norm1 = _norm_silu(out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv1 = _conv(out_channels, out_channels, init_scale=1e-5)
        has_skip = in_channels != out_channels or resample
        self.skip = _conv(in_channels, out_channels, kernel=1) if has_skip else None
        self.attention = Attention(out_channels, config.channels_per_head) if attention else None

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # [B, C_in, H, W], [B, embedding_channels]
        y = self.conv0(self._resample(self.norm0(x)))
        if self.adaptive_scale:
            y = self.norm1(y, *embedding.chunk(2, dim=1))
        else:
            y = self.norm1(y + embedding[:, :, None, None])
        y = self.conv1(self.dropout(y))
        x = self._resample(x)
        x = (y + (x if self.skip is None else self.skip(x))) * SKIP_SCALE
        return x if self.attention is None else self.attention(x) * SKIP_SCALE


class UNet(nn.Module):
    """EDM-preconditioned denoiser `D(x, sigma, class_labels) -> D_x`.

    `D_x = c_skip * x + c_out * F_x(c_in * x, c_noise, class_labels)` (Karras et al. 2022, eq. 7) where `F_x`
    is a DDPM++ UNet (Song et al. 2021; Karras et al. 2022, table 7). `x` is `[B, C, H, W]`, `sigma` `[B]`,
    `class_labels` int64 `[B]` or one-hot `[B, num_classes]`, or None for an unconditional network.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        embedding_channels = config.model_channels * config.embedding_multiplier
        self.map_label = (
            nn.Parameter(torch.randn(config.num_classes, config.model_channels)) if config.num_classes else None
        )
        self.map_noise = nn.Sequential(
            _linear(config.model_channels, embedding_channels), nn.SiLU(),
            _linear(embedding_channels, embedding_channels), nn.SiLU(),
        )  # fmt: skip

        channels = config.model_channels
        resolution = config.image_size // config.patch_size
        folded_channels = config.image_channels * config.patch_size**2
        self.conv_in = _conv(folded_channels, channels)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        skip_channels = [channels]

        def block(in_channels: int, out_channels: int, **options) -> Block:
            attention = options.pop("attention", resolution in config.attention_resolutions)
            return Block(in_channels, out_channels, config, attention=attention, **options)

        for level, multiplier in enumerate(config.channel_multipliers):
            if level > 0:
                resolution //= 2
                self.encoder.append(block(channels, channels, resample="down", attention=False))
                skip_channels.append(channels)
            for _ in range(config.num_blocks):
                self.encoder.append(block(channels, config.model_channels * multiplier))
                channels = config.model_channels * multiplier
                skip_channels.append(channels)

        self.middle = nn.ModuleList(
            [block(channels, channels, attention=True), block(channels, channels, attention=False)]
        )
        for level, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            if level < len(config.channel_multipliers) - 1:
                resolution *= 2
                self.decoder.append(block(channels, channels, resample="up", attention=False))
            for index in range(config.num_blocks + 1):
                attention = index == config.num_blocks and resolution in config.attention_resolutions
                in_channels = channels + skip_channels.pop()
                channels = config.model_channels * multiplier
                self.decoder.append(block(in_channels, channels, attention=attention))
        self.norm_out = _norm_silu(channels)
        self.conv_out = _conv(channels, folded_channels, init_scale=1e-5)
        # One matrix product makes the embeddings of all blocks.
        self.block_embeddings = [b.embedding_channels for b in (*self.encoder, *self.middle, *self.decoder)]
        self.map_blocks = _linear(embedding_channels, sum(self.block_embeddings))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in, c_noise = diffusion.preconditioning(sigma, self.config.sigma_data)
        F_x = self.raw(diffusion.per_sample(c_in) * x, c_noise, class_labels)
        return diffusion.per_sample(c_skip) * x + diffusion.per_sample(c_out) * F_x

    def raw(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network before preconditioning, `F_x`: `[B, C, H, W]`, `[B]`, labels -> `[B, C, H, W]`."""
        embeddings = iter(self._embed(c_noise, class_labels).split(self.block_embeddings, dim=1))
        x = self.conv_in(F.pixel_unshuffle(x, self.config.patch_size).contiguous(memory_format=self._memory_format))
        skips = [x]
        for block in self.encoder:
            x = block(x, next(embeddings))
            skips.append(x)
        for block in self.middle:
            x = block(x, next(embeddings))
        for block in self.decoder:
            if block.resample != "up":
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, next(embeddings))
        x = self.conv_out(self.norm_out(x))
        return F.pixel_shuffle(x, self.config.patch_size)

    def _embed(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        embedding = positional_embedding(c_noise, self.config.model_channels)
        if self.map_label is not None:
            if class_labels is None:
                raise ValueError(f"fastdmd.UNet: expected class_labels for {self.config.num_classes} classes, got None")
            if class_labels.dim() == 1:
                label_embedding = self.map_label[class_labels]
            else:
                label_embedding = class_labels.to(self.map_label.dtype) @ self.map_label
            embedding = embedding + label_embedding
        return self.map_blocks(self.map_noise(embedding))  # [B, sum of block_embeddings]

    @property
    def _memory_format(self) -> torch.memory_format:
        """The layout of the weights decides the layout of the activations."""
        weight = self.conv_in.weight
        channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return torch.channels_last if channels_last else torch.contiguous_format


def positional_embedding(c_noise: Tensor, num_channels: int, max_positions: float = 10000) -> Tensor:
    """Sinusoidal embedding of the noise level, `[B] -> [B, num_channels]` (Vaswani et al. 2017)."""
    exponent = torch.arange(num_channels // 2, dtype=torch.float32, device=c_noise.device) / (num_channels // 2)
    angle = c_noise.float()[:, None] * max_positions**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=1)
