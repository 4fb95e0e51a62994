"""Networks of somebody else, as a user's module would hold them."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.foreign_unet import ForeignUNet


class Network(nn.Module):
    """Class numbers and timesteps (or other levels) in, `[B, C, H, W]` out; convolutions share a bias."""

    def __init__(self, channels=1, num_classes=3):
        super().__init__()
        self.image_shape, self.num_classes = (channels, 8, 8), num_classes
        self.conv_in, self.conv_out = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.middle.bias = self.conv_in.bias
        self.level, self.label = nn.Linear(1, 8), nn.Embedding(max(num_classes, 1), 8)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x, level, labels=None):
        h = self.conv_in(x) + self.level(level.float().log1p()[:, None])[:, :, None, None]
        if labels is not None:
            h = h + self.label(labels)[:, :, None, None]
        return self.conv_out(F.silu(self.middle(F.silu(h))))


class NetworkWithFeatures(Network):
    """Says what a discriminator may look at."""

    feature_shape = (8, 8, 8)
    spoil = staticmethod(lambda features: features)

    def features(self, x, level, labels=None):
        return self.spoil(self.middle(self.conv_in(x)))


def with_features(spoil=NetworkWithFeatures.spoil):
    torch.manual_seed(0)
    network = NetworkWithFeatures()
    network.spoil = spoil
    return network


def with_detached_features():
    return with_features(torch.detach)


def with_small_features():
    return with_features(lambda features: features[:, :4])


def with_infinite_features():
    return with_features(lambda features: features / 0)


def with_broken_features():
    return with_features(lambda features: features.no_such_thing)


def build():
    torch.manual_seed(0)
    return Network()


def textbook():
    torch.manual_seed(0)
    return ForeignUNet(channels=(16, 16, 32), image_shape=(1, 8, 8), num_classes=3)


def unconditional():
    torch.manual_seed(0)
    return Network(channels=3, num_classes=0)


def three():
    return 3


def needs(width):
    return Network(width)


class Nested:
    instance = build()
