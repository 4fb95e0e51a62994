"""EDM's published networks, narrower and shallower ones of each, and inputs for them."""

import torch

# As published (Karras et al. 2022, table 7 and the training script's defaults).
DDPMPP = {
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "model_channels": 128,
    "dropout": 0.13,
    "use_fp16": False,
    "augment_dim": 9,
}
NCSNPP = DDPMPP | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
CIFAR10 = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "channel_mult": [2, 2, 2]}
FACES = {"img_resolution": 64, "img_channels": 3, "label_dim": 0, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}
PUBLISHED = {
    "cifar10-32x32-cond-vp": DDPMPP | CIFAR10,
    "cifar10-32x32-cond-ve": NCSNPP | CIFAR10,
    "cifar10-32x32-uncond-vp": DDPMPP | CIFAR10 | {"label_dim": 0},
    "cifar10-32x32-uncond-ve": NCSNPP | CIFAR10 | {"label_dim": 0},
    "ffhq-64x64-uncond-vp": DDPMPP | FACES,  # as is AFHQv2, but for its dropout of 0.25
    "ffhq-64x64-uncond-ve": NCSNPP | FACES,
    "imagenet-64x64-cond-adm": {
        "model_type": "DhariwalUNet",
        "img_resolution": 64,
        "img_channels": 3,
        "label_dim": 1000,
        "use_fp16": True,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "dropout": 0.1,
    },
}


def small(name):
    """The published variant, narrower and shallower, on smaller images."""
    config = dict(PUBLISHED[name])
    resolution = config["img_resolution"] // 4
    config |= {"img_resolution": resolution, "num_blocks": 1, "attn_resolutions": [resolution // 2]}
    if config["label_dim"] > 10:
        config["label_dim"] = 5
    if config["model_type"] == "DhariwalUNet":  # heads are 64 channels wide
        return config | {"model_channels": 32, "channel_mult": [1, 2, 4], "augment_dim": 4}
    return config | {"model_channels": 16}


def inputs(config, dtype):
    generator = torch.Generator().manual_seed(7)
    shape = (3, config["img_channels"], config["img_resolution"], config["img_resolution"])
    x, cotangent = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    sigma = torch.tensor([0.02, 0.7, 40.0], dtype=dtype)
    label_dim = config.get("label_dim", 0)
    labels = torch.eye(label_dim, dtype=dtype)[[1, 0, 4]] if label_dim else None
    return x, sigma, labels, cotangent
