"""Which numbers of a line of the log belong together, in one picture."""

from __future__ import annotations

from fastdmd.distill.statistics import COMPARISONS, IMAGE_STATISTICS

PARTS = {  # of names, the first that fits
    "loss": "losses",
    "grad_norm": "gradient norms",
    "disagreement_": "disagreement",
    "fake_error_": "fake error",
    "classes_": "classes",
    "class_": "spread of classes",
    "gan_": "discriminator",
    "_bytes": "memory",
    "images_per_second": "speed",
}
IMAGES = (*IMAGE_STATISTICS, "average_spread")


def group(name: str) -> str:
    """The values of `PARTS`, or `images`; `other` where nothing is known of the name."""
    if name in IMAGES:
        return "images"
    return next((found for part, found in PARTS.items() if part in name), "other")


def level(name: str) -> str:
    """The bin of noise levels of a comparison, in words; any other name as it is."""
    if name not in COMPARISONS:
        return name
    place = name.removeprefix("disagreement_").removeprefix("fake_error_")
    return f"sigma {place.replace('_', ' ' if place[0].isalpha() else ' to ')}"
