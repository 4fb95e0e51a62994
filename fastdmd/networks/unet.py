"""One denoising UNet that is DDPM++, NCSN++ or ADM by configuration: teacher, fake score, generator."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdmd import diffusion
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.networks.unet_blocks import Block, Concatenate, GroupNormSiLU, ResidualInput, conv, linear, norm_silu
from fastdmd.networks.unet_config import UNetConfig

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GroupNormSiLU", "UNet", "UNetConfig"]

NUM_TIMESTEPS = 1000  # that the time of flow matching, in [0, 1], is scaled to before its embedding


class Encoded(NamedTuple):
    """What the decoder takes of a batch."""

    features: Tensor  # [B, C, h, w], of the middle
    skips: list[Tensor]  # of the encoder, the finest first
    embeddings: list[Tensor]  # of the decoder's blocks

    def first(self, num_rows: int) -> Encoded:
        skips, embeddings = ([x[:num_rows] for x in tensors] for tensors in (self.skips, self.embeddings))
        return Encoded(self.features[:num_rows], skips, embeddings)


class UNet(DenoisingNetwork):
    """A denoiser `D(x, sigma, class_labels) -> D_x`; see `diffusion.Denoiser`.

    `D_x = c_skip * x + c_out * F_x(c_in * x, c_noise, class_labels)` (Karras et al. 2022, eq. 7) where `F_x` is a
    UNet (Song et al. 2021; Dhariwal & Nichol 2021; Karras et al. 2022, table 7) and the coefficients are EDM's, or
    those that make a velocity of flow matching a denoiser. One-hot labels of all zeros mean no class.
    """

    frequencies: Tensor

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.image_shape = config.image_shape
        self.num_classes = config.num_classes
        self.sigma_data = config.sigma_data
        self.dynamics = self.parameterization = config.dynamics
        self.feature_shape = config.model_channels * config.channel_multipliers[-1], config.sizes[-1], config.sizes[-1]
        embedding_channels = config.model_channels * config.embedding_multiplier
        noise_channels = config.model_channels * config.noise_multiplier
        self.map_label = None
        if config.num_classes:
            width = embedding_channels if config.adm else noise_channels
            self.map_label = nn.Linear(config.num_classes, width, bias=not config.adm)
            nn.init.normal_(self.map_label.weight, std=config.num_classes**-0.5)
        if config.augment_dim:  # of images as they are, EDM leaves it out (ibid., appendix F.2)
            self.map_augment = nn.Linear(config.augment_dim, noise_channels, bias=False)
        if config.embedding == "fourier":
            self.register_buffer("frequencies", 16 * torch.randn(noise_channels // 2))
        self.map_noise = nn.Sequential(
            linear(noise_channels, embedding_channels), nn.SiLU(), linear(embedding_channels, embedding_channels)
        )

        # EDM's ADM enters at the width of its finest level.
        channels = config.model_channels * (config.channel_multipliers[0] if config.adm else 1)
        resolution = config.image_size // config.patch_size
        folded_channels = config.image_channels * config.patch_size**2
        self.conv_in = conv(folded_channels, channels)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        self.residual_inputs = nn.ModuleList()
        residual_channels = folded_channels
        skip_channels = [channels]

        def block(in_channels: int, out_channels: int, **options) -> Block:
            attention = options.pop("attention", resolution in config.attention_resolutions)
            return Block(in_channels, out_channels, config, attention=attention, **options)

        for level, multiplier in enumerate(config.channel_multipliers):
            if level > 0:
                resolution //= 2
                self.encoder.append(block(channels, channels, resample="down", attention=False))
                skip_channels.append(channels)
                if config.encoder == "residual":
                    self.residual_inputs.append(ResidualInput(residual_channels, channels, config.resample_filter))
                    residual_channels = channels
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
                last = index == config.num_blocks or config.adm
                attention = last and resolution in config.attention_resolutions
                in_channels = channels + skip_channels.pop()
                channels = config.model_channels * multiplier
                self.decoder.append(block(in_channels, channels, attention=attention))
        self.norm_out = norm_silu(channels, config)
        self.conv_out = conv(channels, folded_channels, init_scale=1e-5)
        # One matrix product makes the embeddings of all blocks.
        self.block_embeddings = [b.embedding_channels for b in (*self.encoder, *self.middle, *self.decoder)]
        self.map_blocks = linear(embedding_channels, sum(self.block_embeddings))

    @classmethod
    def blueprint(cls, config: UNetConfig, num_tensors: int) -> UNet:
        """The network on the meta device, to be compared with a state of so many tensors before it takes memory.

        Raises ValueError, without looping over them, if that state cannot hold all blocks.
        """
        if config.num_blocks * len(config.channel_multipliers) > num_tensors:
            raise ValueError(f"fastdmd.teachers: expected the tensors of every block, got {num_tensors} tensors")
        with torch.device("meta"):
            return cls(config)

    def describe(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    def in_best_layout(self) -> Self:
        """channels_last, which was measured faster for every width tried (16 to 192)."""
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """`D_x` `[B, C, H, W]` of images with noise of that shape, levels `[B]`, and labels, int64 `[B]` or one-hot."""
        c_skip, c_out, c_in, c_noise = self._coefficients(sigma)
        F_x = self.raw(diffusion.per_sample(c_in) * x, c_noise, class_labels)
        return diffusion.per_sample(c_skip) * x + diffusion.per_sample(c_out) * F_x

    def raw(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network before preconditioning, `F_x`: `[B, C, H, W]`, `[B]`, labels -> `[B, C, H, W]`."""
        return self._decode(self._encode(x, c_noise, class_labels))

    def with_features(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, num_denoised: int
    ) -> tuple[Tensor, Tensor]:
        """See `DenoisingNetwork.with_features`; the features are those of the middle blocks."""
        c_skip, c_out, c_in, c_noise = (diffusion.per_sample(c) for c in self._coefficients(sigma))
        encoded = self._encode(c_in * x, c_noise.flatten(), class_labels)
        if num_denoised == 0:
            return x.new_empty((0, *x.shape[1:])), encoded.features
        rows = slice(num_denoised)
        return c_skip[rows] * x[rows] + c_out[rows] * self._decode(encoded.first(num_denoised)), encoded.features

    @property
    def level_embedding(self) -> nn.Module:
        return self.map_noise

    def _coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`c_skip, c_out, c_in, c_noise`, each `[B]`."""
        if self.dynamics == "flow":
            c_skip, c_out, c_in, t = diffusion.velocity_preconditioning(sigma)
            return c_skip, c_out, c_in, NUM_TIMESTEPS * t
        return diffusion.preconditioning(sigma, self.sigma_data)

    def _encode(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None) -> Encoded:
        embeddings = iter(self._embed(c_noise, class_labels).split(self.block_embeddings, dim=1))
        x = x.to(self.conv_in.weight.dtype)  # the weights decide the precision of the network
        residual = F.pixel_unshuffle(x, self.config.patch_size).contiguous(memory_format=self._memory_format)
        x = self.conv_in(residual)
        skips, residual_inputs = [x], iter(self.residual_inputs)
        for block in self.encoder:
            x = block(x, next(embeddings))
            if block.resample is not None and self.residual_inputs:
                x = residual = (x + next(residual_inputs)(residual)) * self.config.skip_scale
            skips.append(x)
        for block in self.middle:
            x = block(x, next(embeddings))
        return Encoded(x, skips, list(embeddings))

    def _decode(self, encoded: Encoded) -> Tensor:
        x, skips = encoded.features, list(encoded.skips)
        for block, embedding in zip(self.decoder, encoded.embeddings, strict=True):
            if block.resample is None:
                x = Concatenate.apply(x, skips.pop())
            x = block(x, embedding)
        x = self.conv_out(self.norm_out(x))
        return F.pixel_shuffle(x, self.config.patch_size)

    def _embed(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """The embeddings of all blocks, `[B, sum of block_embeddings]`."""
        config = self.config
        if config.embedding == "fourier":
            embedding = fourier_embedding(c_noise, self.frequencies)
        else:
            width = config.model_channels * config.noise_multiplier
            embedding = positional_embedding(c_noise, width, ddpmpp=config.embedding == "ddpmpp")
        embedding = embedding.to(self.map_blocks.weight.dtype)
        labels = self._embed_labels(class_labels)
        if labels is not None and not config.adm:
            embedding = embedding + labels
        embedding = self.map_noise(embedding)
        if labels is not None and config.adm:
            embedding = embedding + labels
        return self.map_blocks(F.silu(embedding))

    def _embed_labels(self, class_labels: Tensor | None) -> Tensor | None:
        if self.map_label is None:
            return None
        if class_labels is None:
            raise ValueError(f"fastdmd.UNet: expected class_labels for {self.config.num_classes} classes, got None")
        table = self.map_label.weight.t()
        labels = F.embedding(class_labels, table) if class_labels.dim() == 1 else class_labels.to(table.dtype) @ table
        return labels if self.config.adm else labels * self.config.num_classes**0.5 + self.map_label.bias

    @torch.no_grad()
    def emphasize_labels(self, factor: float) -> None:
        """Moves the class embeddings away from their mean, `e_c = mean + factor * (e_c - mean)`, in place.

        Guidance without a second evaluation: classes become more distinct, variety less. Measured on the embedded MNIST
        teacher: 97.6 % class accuracy and a Fréchet distance of 0.25 at factor 1, 99.2 % and 0.15 at 1.3 (10,000
        samples); at 1.7 99.7 % and twice the distance (1,500 samples). Raises ValueError for an unconditional network.
        """
        if self.map_label is None:
            raise ValueError("fastdmd.UNet: expected a class-conditional network, got an unconditional one")
        weight = self.map_label.weight  # [width, num_classes]
        weight.copy_(weight.mean(dim=1, keepdim=True).lerp(weight, factor))

    @property
    def _memory_format(self) -> torch.memory_format:
        """The layout of the weights decides the layout of the activations."""
        weight = self.conv_in.weight
        channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return torch.channels_last if channels_last else torch.contiguous_format


def positional_embedding(
    c_noise: Tensor, num_channels: int, *, ddpmpp: bool = False, max_positions: float = 10000
) -> Tensor:
    """Sinusoidal embedding of the noise level, `[B] -> [B, num_channels]` (Vaswani et al. 2017).

    Cosines before sines; with `ddpmpp` sines first, and the last frequency is `1 / max_positions`.
    """
    half = num_channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - 1 if ddpmpp else half)
    angle = c_noise.float()[:, None] * max_positions**-exponent
    return torch.cat([angle.sin(), angle.cos()] if ddpmpp else [angle.cos(), angle.sin()], dim=1)


def fourier_embedding(c_noise: Tensor, frequencies: Tensor) -> Tensor:
    """Random Fourier features of the noise level, sines first, `[B] -> [B, 2 len(frequencies)]` (Song et al. 2021)."""
    angle = c_noise.float()[:, None] * (2 * math.pi * frequencies)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
