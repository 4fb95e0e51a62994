"""A data set that anybody can make: coloured shapes, 32x32 RGB, with a feature network that measures samples of them.

`python examples/shapes.py shapes` writes into the folder `shapes`, as a function of the seed alone:

    train.npz, test.npz  images uint8 [N, 32, 32, 3], labels int64 [N]: places in CLASSES
    features.pt          TorchScript of a classifier: images in [-1, 1] to features [B, 64] and logits [B, 8]
"""

from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from fastdmd import data
from fastdmd.data import Dataset
from fastdmd.files import write_atomically
from fastdmd.quality.metrics import dataset_batches, evaluate, load_feature_network
from fastdmd.runs.cli import user_errors

CLASSES = ("circle", "ring", "square", "triangle", "cross", "star", "crescent", "bar")
SPLITS = ("train", "test")
SIZE = 32
SUBPIXELS = 4  # per side of a pixel: 17 steps from background to shape
CHUNK = 500  # images drawn at once: 33 MB an array
NUM_FEATURES = 64


def inside(label: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points [B, S, S] a shape covers that fits the unit circle; v points down before it is turned."""
    r = np.hypot(u, v)
    name = CLASSES[label]
    if name == "circle":
        return r < 0.9
    if name == "ring":
        return (r > 0.55) & (r < 1)
    if name == "square":
        return np.maximum(abs(u), abs(v)) < 0.75
    if name == "triangle":
        return np.maximum(v, 0.866 * abs(u) - 0.5 * v) < 0.5
    if name == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.26) & (np.maximum(abs(u), abs(v)) < 0.95)
    if name == "star":  # five times the wedge between a tip at radius 1 and a notch at radius 0.42
        angle = abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        notch_x, notch_y = 0.42 * np.cos(np.pi / 5), 0.42 * np.sin(np.pi / 5)
        return r * (np.cos(angle) * notch_y + np.sin(angle) * (1 - notch_x)) < notch_y
    if name == "crescent":
        return (r < 1) & (np.hypot(u - 0.5, v) > 0.75)
    return (abs(u) < 0.95) & (abs(v) < 0.3)  # bar


def draw(num: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [num, 32, 32, 3] and labels [num], each class as often as the others, in random order.

    A shape near the middle, upright within 17 degrees, of a random size, in one colour; behind it one colour or, half
    of the time, two that shade into each other along a random direction.
    """
    labels = generator.permutation(np.arange(num) % len(CLASSES))
    images = np.empty((num, SIZE, SIZE, 3), np.uint8)
    for label in range(len(CLASSES)):
        members = np.flatnonzero(labels == label)
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            images[chunk] = _draw_class(label, len(chunk), generator)
    return images, labels


def _draw_class(label: int, num: int, generator: np.random.Generator) -> np.ndarray:
    radius = generator.uniform(8, 12, (num, 1, 1))
    x, y = SIZE / 2 + generator.uniform(-4, 4, (2, num, 1, 1))
    angle = generator.uniform(-0.3, 0.3, (num, 1, 1))
    points = (np.arange(SIZE * SUBPIXELS) + 0.5) / SUBPIXELS
    dx, dy = ((points - x) / radius).astype(np.float32), ((points[:, None] - y) / radius).astype(np.float32)
    cos, sin = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
    covered = inside(label, cos * dx + sin * dy, cos * dy - sin * dx)
    blocks = covered.reshape(num, SIZE, SUBPIXELS, SIZE, SUBPIXELS)
    coverage = blocks.mean((2, 4), dtype=np.float32)[..., None]  # [num, 32, 32, 1]

    first, second = generator.uniform(0, 255, (2, num, 3)).astype(np.float32)
    second = np.where(generator.random((num, 1)) < 0.5, first, second)
    direction = generator.uniform(0, 2 * np.pi, (num, 1, 1))
    centers = (np.arange(SIZE) + 0.5) / SIZE - 0.5
    way = np.cos(direction) * centers + np.sin(direction) * centers[:, None]  # [num, 32, 32]
    share = (0.5 + way / np.sqrt(2)).astype(np.float32)[..., None]
    behind = first[:, None, None] * (1 - share) + second[:, None, None] * share

    candidates = generator.uniform(0, 255, (6, num, 3))  # the one that stands out most is the shape's
    contrast = np.minimum(*(abs(candidates - color).sum(-1) for color in (first, second)))
    color = candidates[contrast.argmax(0), np.arange(num)].astype(np.float32)[:, None, None]
    return np.rint(behind + coverage * (color - behind)).astype(np.uint8)


class ShapeClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        layers = []
        for num_in, num_out, size, stride in ((3, 24, 5, 2), (24, 32, 3, 1), (32, 48, 3, 2), (48, 64, 3, 2)):
            layers.append(nn.Conv2d(num_in, num_out, size, stride, padding=size // 2, bias=False))
            layers += [nn.BatchNorm2d(num_out), nn.SiLU()]
        layers += [nn.Flatten(), nn.Linear(64 * (SIZE // 8) ** 2, NUM_FEATURES, bias=False)]
        self.body = nn.Sequential(*layers, nn.BatchNorm1d(NUM_FEATURES), nn.SiLU())
        self.head = nn.Linear(NUM_FEATURES, len(CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 32, 32] in [-1, 1] to features [B, 64] and logits [B, 8]."""
        features = self.body(images)
        return features, self.head(features)


def train_classifier(dataset: Dataset, *, iterations: int, seed: int, batch_size: int = 128) -> ShapeClassifier:
    torch.manual_seed(seed)  # the first weights
    classifier = ShapeClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=iterations)
    for step in range(iterations):
        images, labels = dataset.random_batch(batch_size, seed=seed, step=step, device="cpu")
        loss = F.cross_entropy(classifier(images)[1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def main(
    out: tyro.conf.Positional[Path],
    num_train: int = 20_000,
    num_test: int = 5_000,
    iterations: int = 1_500,
    seed: int = 0,
) -> float:
    """Draws coloured shapes and trains a feature network on them; returns its accuracy on the test images.

    Args:
        out: folder for train.npz, test.npz and features.pt.
        num_train: images to train on.
        num_test: images of other draws, to measure with.
        iterations: updates of the feature network, of 128 images each.
        seed: of every draw.
    """
    least = {"num-train": len(CLASSES), "num-test": len(CLASSES), "iterations": 1, "seed": 0}
    with user_errors("examples/shapes.py"):
        for (name, bound), value in zip(least.items(), (num_train, num_test, iterations, seed), strict=True):
            if value < bound:
                raise ValueError(f"expected --{name} of at least {bound}, got {value}")
        out.mkdir(parents=True, exist_ok=True)
    for split, num in enumerate((num_train, num_test)):
        images, labels = draw(num, np.random.default_rng([seed, split]))
        arrays = {"images": images, "labels": labels}
        write_atomically(out / f"{SPLITS[split]}.npz", lambda file, arrays=arrays: np.savez_compressed(file, **arrays))
    train, test = (data.load(out / f"{split}.npz") for split in SPLITS)
    classifier = train_classifier(train, iterations=iterations, seed=seed)
    script = torch.jit.trace(classifier, torch.zeros(2, *train.image_shape))
    write_atomically(out / "features.pt", lambda file: torch.jit.save(script, file))
    share = evaluate(dataset_batches(test), load_feature_network(out / "features.pt"), None).class_accuracy
    print(f"{out}: {num_train} and {num_test} images; the classifier knows {share:.2%} of the test images")
    return share


if __name__ == "__main__":
    tyro.cli(main)
