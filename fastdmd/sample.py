"""`python -m fastdmd.sample`: images from a generator or a teacher (Heun), as .png or .npz."""

from __future__ import annotations

from fastdmd.runs import startup

if __name__ == "__main__":
    startup.prepare("fastdmd.sample")

import math
import re
from typing import Any

import numpy as np
import torch

from fastdmd import quality, teachers
from fastdmd.data import to_uint8
from fastdmd.files import write_atomically
from fastdmd.memory import half, require_memory
from fastdmd.runs import cli, distributed, folder, machine, terminal
from fastdmd.runs.config import SampleConfig
from fastdmd.runs.pictures import image_grid
from fastdmd.sampling import Sampler, balanced_labels, start_noise

BYTES_PER_VALUE = 4 + 1 + 1  # an image as floats, as integers, and in the picture


@terminal.command("fastdmd.sample")
def main(arguments: list[str] | None = None) -> None:
    distributed.require_alone("fastdmd.sample")
    config = cli.parse(SampleConfig, "fastdmd.sample", arguments)
    with cli.user_errors("fastdmd.sample", "sampling", f"{half(config.batch_size)} or a smaller --num"):
        device = cli.resolve_device(config.device, seed=config.seed, deterministic=config.deterministic)
        folder.require_file(config.out)
        machine.prepare(device, batch_size=config.batch_size)
        network, metadata = teachers.read(config.weights, config.adapter, device)
        sampler = teachers.sampler_of(network, metadata, config.teacher_steps)
        num_values = config.num * math.prod(network.image_shape)
        require_memory(BYTES_PER_VALUE * num_values, torch.device("cpu"), f"--num {config.num}", "use a smaller one")
        labels = parse_labels(config.labels, config.num, network.num_classes)
        images = sample(sampler, labels, config, device)
        if num_broken := int((~images.isfinite().flatten(1).all(1)).sum()):
            raise ValueError(f"expected finite images of {config.weights}, got NaN or infinity in {num_broken} of them")
        write_images(config, images, labels)
    print(f"{config.out}: {config.num} images")


def parse_labels(text: str | None, num_images: int, num_classes: int) -> torch.Tensor | None:
    """`"3,5"` -> 3, 5, 3, 5, ...; without text, all classes in turn. int64 `[num_images]`, None if unconditional."""
    if text is None:
        return balanced_labels(num_images, num_classes)
    if num_classes == 0:
        raise ValueError(f"expected no --labels for an unconditional network, got {text}")
    words = text.split(",")
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", word) and int(word) < num_classes for word in words):
        raise ValueError(f"expected --labels from 0 to {num_classes - 1}, separated by commas, got {text:.80}")
    labels = torch.tensor([int(word) for word in words])
    return labels.repeat(-(-num_images // len(labels)))[:num_images]


def sample(sampler: Sampler, labels: torch.Tensor | None, config: SampleConfig, device: torch.device) -> torch.Tensor:
    """`[num, C, H, W]` in [-1, 1] on the CPU; noise is a function of seed and number, not of the batch size."""
    shape = sampler.network.image_shape
    images = torch.empty(config.num, *shape)
    for start in range(0, config.num, config.batch_size):
        part = slice(start, min(start + config.batch_size, config.num))
        noise, step_noise = start_noise(part, shape, sampler.num_step_noises, config.seed, device)
        class_labels = None if labels is None else labels[part].to(device)
        images[part] = quality.sample(sampler, noise, class_labels, step_noise).cpu()
    return images


def write_images(config: SampleConfig, images: torch.Tensor, labels: torch.Tensor | None) -> None:
    """Images `[num, C, H, W]` in [-1, 1], and int64 labels `[num]` if there are any, in the format of `--out`."""
    if config.out.suffix == ".png":
        picture = image_grid(images, math.ceil(math.sqrt(config.num)))
        write_atomically(config.out, lambda file: picture.save(file, format="PNG"))
    else:
        arrays: dict[str, Any]
        if images.shape[1] in (1, 3):
            arrays = {"images": to_uint8(images).permute(0, 2, 3, 1).numpy()}  # [N, H, W, C], as --data reads it
        else:  # of a latent space, which ends nowhere
            arrays = {"latents": images.numpy()}  # [N, C, H, W]
        if labels is not None:
            arrays["labels"] = labels.numpy()
        write_atomically(config.out, lambda file: np.savez(file, **arrays))


if __name__ == "__main__":
    main()
