"""Folders as diffusers saves its networks."""

import pytest
import torch

WEIGHTS = "diffusion_pytorch_model"


def diffusers_unet(num_class_embeds=None):
    """For 3x8x8 images, seeded."""
    diffusers = pytest.importorskip("diffusers", reason="the extra fastdmd[diffusers] is not installed")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=num_class_embeds,
    )


def diffusers_folder(path, prediction_type="epsilon", num_class_embeds=None, **schedule):
    network = diffusers_unet(num_class_embeds)
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type, clip_sample=False, **schedule)
    network.save_pretrained(path / "unet")
    scheduler.save_pretrained(path / "scheduler")
    return network.eval(), scheduler
