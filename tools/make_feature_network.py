"""Trains the embedded digit classifier and writes it with its reference statistics to fastdmd/assets.

python tools/make_feature_network.py --data <folder with the four IDX files of MNIST>
"""

import json
import math
import time
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from tqdm import tqdm

from fastdmd.data import Dataset, load
from fastdmd.quality.metrics import (
    ASSETS,
    DigitClassifier,
    dataset_batches,
    evaluate,
    feature_statistics,
    load_feature_network,
)

BATCH_SIZE = 250
MAX_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
EMA_SHARE = 1 / 8  # of all batches: time constant of the averaged weights
MAX_ROTATION = 0.2  # radians
MAX_STRETCH = 0.12  # of the image's width
MAX_SHEAR = 0.1
MAX_SHIFT = 0.15  # of half the image's width: two pixels


def main(data: str, seed: int = 0, num_epochs: int = 16, output: Path = ASSETS) -> None:
    """Trains on the training digits, writes both assets, prints accuracy and floor on the test digits.

    The result is the same for a seed on one machine with one number of threads.

    Args:
        data: folder with the four IDX files of MNIST.
        seed: of the first weights, the order of the digits and their distortions.
        num_epochs: passes over the training digits.
        output: folder for the two assets.
    """
    train, test = load(data, split="train"), load(data, split="test")
    start = time.perf_counter()
    classifier = train_classifier(train, seed=seed, num_epochs=num_epochs)
    seconds = time.perf_counter() - start
    accuracy = evaluate(dataset_batches(test), load_feature_network(classifier), None).class_accuracy

    record = {
        "kind": "feature_network",
        "test_accuracy": accuracy,
        "seed": seed,
        "num_epochs": num_epochs,
        "command": f"tools/make_feature_network.py --data DATA --seed {seed} --num-epochs {num_epochs}",
        "torch": torch.__version__,
    }
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(weights, output / "feature_network.safetensors", metadata={"fastdmd": json.dumps(record)})
    statistics = feature_statistics(dataset_batches(train), load_feature_network(classifier))
    statistics.save_npz(output / "reference_statistics.npz")

    start = time.perf_counter()
    quality = evaluate(dataset_batches(test), load_feature_network(classifier), statistics)
    num_parameters = sum(parameter.numel() for parameter in classifier.parameters())
    print(f"{num_parameters} parameters, trained in {seconds:.0f} s with {torch.get_num_threads()} threads")
    print(f"class accuracy on {quality.num_images} test digits: {quality.class_accuracy:.2%}")
    print(f"floor, test digits against training digits: {quality.frechet_distance:.4f}")
    print(f"evaluation took {time.perf_counter() - start:.1f} s")


def train_classifier(dataset: Dataset, *, seed: int, num_epochs: int) -> DigitClassifier:
    """Trains with AdamW under a one-cycle learning rate; returns the moving average of the weights."""
    torch.manual_seed(seed)  # the first weights
    generator = torch.Generator().manual_seed(seed)
    classifier = DigitClassifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=MAX_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    num_batches = num_epochs * math.ceil(len(dataset) / BATCH_SIZE)
    decay = 1 - 1 / (EMA_SHARE * num_batches)
    average = torch.optim.swa_utils.AveragedModel(
        classifier, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LEARNING_RATE, total_steps=num_batches, pct_start=0.2)
    with tqdm(total=num_batches, unit="batch", mininterval=5) as progress:
        for epoch in range(num_epochs):
            for indices in torch.randperm(len(dataset), generator=generator).split(BATCH_SIZE):
                images, labels = dataset.batch(indices)
                _, logits = classifier(distort(images, generator))
                loss = torch.nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                average.update_parameters(classifier)
                progress.update()
            progress.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.4f}")
    return average.module.eval()


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotates, stretches, shears and shifts [B, 1, 28, 28] at random; what comes in is background, -1."""
    B = len(images)
    limits = torch.tensor([MAX_ROTATION, MAX_STRETCH, MAX_STRETCH, MAX_SHEAR, MAX_SHIFT, MAX_SHIFT])
    draws = (2 * torch.rand(B, 6, generator=generator) - 1) * limits
    angle, stretch_x, stretch_y, shear, shift_x, shift_y = draws.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * (1 + stretch_x), shear - sin, shift_x], 1),
        torch.stack([sin + shear, cos * (1 + stretch_y), shift_y], 1),
    ]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    ink = torch.nn.functional.grid_sample(images + 1, grid, align_corners=False)  # outside: 0
    return ink - 1


if __name__ == "__main__":
    tyro.cli(main)
