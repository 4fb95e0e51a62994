"""What tells real images from generated ones: by an encoder's features, or by the noised images themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdmd.diffusion import per_sample
from fastdmd.networks.unet_blocks import GroupNormSiLU, num_groups

IMAGE_WIDTH, LARGEST_WIDTH = 48, 384  # channels of the first layer that sees images, and of any later one
LARGEST_MAP = 8  # pixels a side, which one convolution takes to a vector
LEAST_WIDTH = 4  # channels: GroupNorm of fewer, on a map of one pixel, leaves little or nothing of what it is given


class Discriminator(nn.Module):
    """`features [B, C, h, w] -> logit [B]`, which learns `ln(p_real / p_fake)` (Yin et al. 2024, DMD2, section 4.3).

    A convolution 4x4 of stride 2, one of stride 4, GroupNorm and SiLU after either, then 1x1 to a logit, whose mean is
    taken where the map is larger than 8x8. Padding lets every pixel of any map count, down to a single one. `random`
    draws the weights (Glorot & Bengio 2010). The weights decide the precision; the logit is float32 at least.
    """

    def __init__(self, feature_shape: tuple[int, int, int], *, random: torch.Generator | None = None):
        super().__init__()
        channels, *sizes = feature_shape
        first = [2 if size == 1 else 1 for size in sizes]  # of odd sizes, too, no pixel is left over
        halved = [(size + 2 * padding - 2) // 2 for size, padding in zip(sizes, first, strict=True)]
        second = [(-size % 4 + 1) // 2 for size in halved]
        # By itself, not by the convolutions: oneDNN's bfloat16 (torch 2.13) leaves the gradient of weights that see
        # padding alone as the memory was, NaN at times.
        self.padding0 = [first[1], first[1], first[0], first[0]]  # left, right, top, bottom
        self.padding1 = [second[1], second[1], second[0], second[0]]
        width = max(channels, LEAST_WIDTH)
        self.conv0 = nn.Conv2d(channels, width, 4, stride=2)
        self.norm0 = GroupNormSiLU(num_groups(width), width)
        self.conv1 = nn.Conv2d(width, width, 4, stride=4)
        self.norm1 = GroupNormSiLU(num_groups(width), width)
        self.conv_out = nn.Conv2d(width, 1, 1)
        for layer in (self.conv0, self.conv1, self.conv_out):
            nn.init.xavier_uniform_(layer.weight, generator=random)
            assert layer.bias is not None  # as torch makes it
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        x = features.to(self.conv0.weight.dtype)
        x = self.norm0(self.conv0(F.pad(x, self.padding0)))
        x = self.norm1(self.conv1(F.pad(x, self.padding1)))
        logit = self.conv_out(x)  # [B, 1, h / 8, w / 8]
        return logit.mean(dim=(1, 2, 3), dtype=torch.promote_types(logit.dtype, torch.float32))


class ImageDiscriminator(nn.Module):
    """`x_t [B, C, H, W], sigma [B], class_labels [B] or None -> logit [B]`: `ln(p_real / p_fake)` of noised images.

    Convolutions 4x4 of stride 2, each twice as wide, until a map is at most 8x8, then one over the whole of it, with
    SiLU between them. `x_t` is divided by its standard deviation `sqrt(sigma^2 + sigma_data^2)`; `ln(sigma) / 4` moves
    the first features. Each class has weights of its own for its logit, as in a projection discriminator (Miyato &
    Koyama 2018). `random` draws the weights (Glorot & Bengio 2010); their precision is that of the network, and the
    logit is float32 at least.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        sigma_data: float,
        width: int = IMAGE_WIDTH,
        random: torch.Generator | None = None,
    ):
        super().__init__()
        channels, *sizes = image_shape
        self.sigma_data = sigma_data
        convs: list[nn.Conv2d] = []
        while max(sizes) > LARGEST_MAP:
            kernel = [4 if size > 2 else size for size in sizes]
            padding = [1 + size % 2 if size > 2 else 0 for size in sizes]  # of odd sizes, too, no pixel is left over
            convs.append(nn.Conv2d(channels, width, _pair(kernel), stride=2, padding=_pair(padding)))
            sizes = [(size + 2 * pad - k) // 2 + 1 for size, pad, k in zip(sizes, padding, kernel, strict=True)]
            channels, width = width, min(2 * width, LARGEST_WIDTH)
        convs.append(nn.Conv2d(channels, width, _pair(sizes)))
        self.convs = nn.ModuleList(convs)
        self.noise_level = nn.Linear(1, convs[0].out_channels)
        self.logits = nn.Linear(width, max(num_classes, 1))
        layers: list[nn.Conv2d | nn.Linear] = [*convs, self.noise_level, self.logits]
        for layer in layers:
            assert layer.bias is not None  # as torch makes it
            nn.init.xavier_uniform_(layer.weight, generator=random)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        dtype = self.logits.weight.dtype
        x = (x_t * per_sample((sigma**2 + self.sigma_data**2).rsqrt())).to(dtype)
        level = self.noise_level((sigma.log() / 4).to(dtype)[:, None])  # [B, width]
        x = self.convs[0](x) + level[:, :, None, None]
        for conv in self.convs[1:]:
            x = conv(F.silu(x))
        logits = self.logits(F.silu(x).flatten(1))
        if class_labels is not None:
            logits = logits.gather(1, class_labels[:, None])
        return logits.squeeze(1).to(torch.promote_types(dtype, torch.float32))


def _pair(sizes: list[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width
