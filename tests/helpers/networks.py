"""A small network of ours, as a teacher would be."""

import torch

from fastdmd.networks.unet import UNet, UNetConfig

SMALL = UNetConfig(
    image_size=28,
    num_classes=10,
    patch_size=2,
    model_channels=8,
    channel_multipliers=(1, 2),
    num_blocks=1,
    attention_resolutions=(7,),
)


def make_network(config: UNetConfig = SMALL, seed: int = 0) -> UNet:
    """A network whose zero-initialised convolutions are random too, so that every part matters."""
    torch.manual_seed(seed)
    network = UNet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
