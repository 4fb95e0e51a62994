"""Networks of others, as fastdmd finds them: a UNet as a textbook has it, in plain PyTorch, and one of diffusers."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels, time_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.skip(x)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3 * C, H * W).chunk(3, dim=1)
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * C**-0.5, dim=-1)
        h = torch.bmm(v, weights.transpose(1, 2)).reshape(B, C, H, W)
        return x + self.out(h)


class ForeignUNet(nn.Module):
    """19 million parameters: 18 convolutions of 3x3 and 18 GroupNorms; takes `x, timestep, labels`."""

    def __init__(self, channels=(128, 240, 480), image_shape=(1, 28, 28), num_classes=10):
        super().__init__()
        self.image_shape, self.num_classes = image_shape, num_classes
        first, second, third = channels
        time_channels = 4 * first
        self.time = nn.Sequential(nn.Linear(first, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels))
        self.label = nn.Embedding(num_classes, time_channels)
        self.enter = nn.Conv2d(image_shape[0], first, 3, padding=1)
        self.down1 = ResidualBlock(first, first, time_channels)
        self.down2 = ResidualBlock(first, second, time_channels)
        self.down3 = ResidualBlock(second, third, time_channels)
        self.middle1 = ResidualBlock(third, third, time_channels)
        self.attention = Attention(third)
        self.middle2 = ResidualBlock(third, third, time_channels)
        self.up3 = ResidualBlock(2 * third, second, time_channels)
        self.up2 = ResidualBlock(2 * second, first, time_channels)
        self.up1 = ResidualBlock(2 * first, first, time_channels)
        self.norm = nn.GroupNorm(8, first)
        self.leave = nn.Conv2d(first, image_shape[0], 3, padding=1)

    def forward(self, x, t, labels=None):
        half = self.time[0].in_features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
        angles = t[:, None].float() * frequencies[None]
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        if labels is not None:
            embedding = embedding + self.label(labels)
        h1 = self.down1(self.enter(x), embedding)
        h2 = self.down2(F.avg_pool2d(h1, 2), embedding)
        h3 = self.down3(F.avg_pool2d(h2, 2), embedding)
        h = self.middle2(self.attention(self.middle1(h3, embedding)), embedding)
        h = self.up3(torch.cat([h, h3], dim=1), embedding)
        h = self.up2(torch.cat([F.interpolate(h, scale_factor=2, mode="nearest"), h2], dim=1), embedding)
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2, mode="nearest"), h1], dim=1), embedding)
        return self.leave(F.silu(self.norm(h)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return ForeignUNet()


def build_diffusers() -> nn.Module:
    """A `UNet2DModel` of 32x32 colour images, with its own defaults but for widths."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(96, 192, 384),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
