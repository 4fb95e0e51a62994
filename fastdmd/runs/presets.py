"""Presets of distillation: settings, and the published teacher that they are for."""

from __future__ import annotations

import dataclasses
from typing import Literal

from fastdmd.distill.gan import TRANSLATION_OF_BEST, GANSettings
from fastdmd.distill.optimization import OptimizerSettings
from fastdmd.networks.unet_config import UNetConfig
from fastdmd.quality.settings import EvaluationSettings
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.precision import ComputeSettings


@dataclasses.dataclass(frozen=True)
class Preset:
    """Defaults of every flag, the network that the teacher should be, and the file that holds it."""

    config: TrainConfig
    summary: str  # of a few words, for the help
    network: UNetConfig | None = None  # None: whatever the teacher is
    teacher_file: str | None = None


# EDM's networks (Karras et al. 2022, table 7). Their augmentation labels are left out in distillation.
DDPMPP = UNetConfig(
    image_size=32,
    image_channels=3,
    num_classes=10,
    model_channels=128,
    channel_multipliers=(2, 2, 2),
    num_blocks=4,
    attention_resolutions=(16,),
    embedding="ddpmpp",
    augment_dim=9,
    dropout=0.13,
)
DDPMPP_64 = dataclasses.replace(DDPMPP, image_size=64, num_classes=0, channel_multipliers=(1, 2, 2, 2), dropout=0.05)
ADM = UNetConfig(
    image_size=64,
    image_channels=3,
    num_classes=1000,
    model_channels=192,
    channel_multipliers=(1, 2, 3, 4),
    num_blocks=3,
    attention_resolutions=(32, 16, 8),
    channels_per_head=64,
    adaptive_scale=True,
    adm=True,
    dropout=0.1,
)

# `TrainConfig()` suits any teacher; with the embedded one come real digits, and how it was made.
MNIST = TrainConfig(label_emphasis=None, gan=GANSettings(gan_guidance_weight=None))
# Gradients of more images are less noise. A discriminator that sees each of the 10,000 digits fifty times comes to know
# them by heart, unless they are moved by a pixel (docs/quality.md).
MNIST_BEST = dataclasses.replace(
    MNIST,
    preset="mnist-best",
    batch_size=192,
    iterations=4000,
    gan=dataclasses.replace(MNIST.gan, gan_translation=TRANSLATION_OF_BEST),
)
# DMD2 on ImageNet-64 (Yin et al. 2024): learning rates, ratio, batch (there 40 on each of 7 GPUs, here in 7 parts),
# AdamW, clipping and warm-up are published. The number of iterations and the average of the weights, which DMD2 does
# without, are ours.
IMAGENET64 = TrainConfig(
    preset="imagenet64",
    teacher=None,
    iterations=200_000,
    batch_size=280,
    dfake_gen_update_ratio=5,
    clamp_images=False,
    optimizer=OptimizerSettings(
        generator_lr=2e-6,
        fake_score_lr=2e-6,
        lr_schedule="constant",
        beta1=0.9,
        warmup_iterations=500,
        max_grad_norm=10.0,
        ema_decay=0.999,
    ),
    compute=ComputeSettings(accumulation_steps=7),
    evaluation=EvaluationSettings(num_samples=50_000),
    log_every=100,
    snapshots=50,
)
# The settings of the published re-implementation.
MNIST_REFERENCE = TrainConfig(
    preset="mnist-reference",
    iterations=20_000,
    batch_size=128,
    dfake_gen_update_ratio=10,
    clamp_images=False,
    optimizer=OptimizerSettings(
        generator_lr=2e-4,
        fake_score_lr=2e-4,
        lr_schedule="constant",
        beta1=0.9,
        warmup_iterations=500,
        max_grad_norm=1.0,
        ema_decay=0.999,
    ),
)


def small(preset: Literal["cifar10-cond", "cifar10-uncond", "afhqv2-64", "ffhq-64"]) -> TrainConfig:
    """No settings are published for the smaller data sets. Ours, not validated: ImageNet's, with learning rates for
    networks of a fifth of its size and a batch that one GPU holds."""
    return dataclasses.replace(
        IMAGENET64,
        preset=preset,
        iterations=100_000,
        batch_size=128,
        optimizer=dataclasses.replace(IMAGENET64.optimizer, generator_lr=1e-5, fake_score_lr=1e-5),
        compute=ComputeSettings(),
    )


CIFAR10_UNCONDITIONAL = dataclasses.replace(DDPMPP, num_classes=0)
AFHQ = dataclasses.replace(DDPMPP_64, dropout=0.25)
PRESETS = {
    "mnist": Preset(MNIST, "the embedded digits: within ten minutes on two cores"),
    "mnist-best": Preset(MNIST_BEST, "the same with three times the batch: within an hour"),
    "mnist-reference": Preset(MNIST_REFERENCE, "the same, as a published re-implementation has it"),
    "cifar10-cond": Preset(small("cifar10-cond"), "CIFAR-10, ten classes", DDPMPP, "edm-cifar10-32x32-cond-vp.pkl"),
    "cifar10-uncond": Preset(
        small("cifar10-uncond"), "CIFAR-10, no classes", CIFAR10_UNCONDITIONAL, "edm-cifar10-32x32-uncond-vp.pkl"
    ),
    "imagenet64": Preset(
        IMAGENET64, "ImageNet at 64x64, DMD2's published settings", ADM, "edm-imagenet-64x64-cond-adm.pkl"
    ),
    "afhqv2-64": Preset(small("afhqv2-64"), "animal faces at 64x64", AFHQ, "edm-afhqv2-64x64-uncond-vp.pkl"),
    "ffhq-64": Preset(small("ffhq-64"), "faces at 64x64", DDPMPP_64, "edm-ffhq-64x64-uncond-vp.pkl"),
}
