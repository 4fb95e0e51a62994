"""Small distillations with an adversarial term."""

import torch
from torch.nn import functional as F

from fastdmd.data import Dataset
from fastdmd.networks.unet import UNetConfig
from fastdmd.runs.config import TrainConfig

TINY = UNetConfig(
    image_size=8, num_classes=3, model_channels=8, channel_multipliers=(1, 1), num_blocks=1, attention_resolutions=()
)
CONFIG = TrainConfig().replace(
    batch_size=6,
    dfake_gen_update_ratio=2,
    warmup_iterations=0,
    iterations=20,
    generator_lr=1e-3,
    fake_score_lr=2e-3,
    beta1=0.9,  # without, the first updates are the signs of gradients, where those are near zero of their rounding
    ema_decay=0.9,
    gan_generator_weight=3e-2,
    gan_guidance_weight=0.1,
    gan_r1_weight=0.5,
    gan_features="fake",
    gan_translation=0.25,
    divergence="jensen-shannon",
)


def real_images(shape=(1, 8, 8), num_classes=3):
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (20, *shape), generator=generator, dtype=torch.uint8)
    return Dataset(images, torch.arange(20) % num_classes if num_classes else None, "random images")


def shifted(x, shift):
    """Each image moved by its own pixels, the plain way: out of what reflection makes larger."""
    _, _, height, width = x.shape
    above, left = shift.abs().amax(dim=0).tolist()
    larger = F.pad(x, (left, left, above, above), mode="reflect")
    places = [(above + down, left + right) for down, right in shift.tolist()]
    rows = zip(larger, places, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, (top, left) in rows])
