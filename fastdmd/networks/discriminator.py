"""The head that tells real images from generated ones by an encoder's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdmd.networks.unet_blocks import GroupNormSiLU, num_groups

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
