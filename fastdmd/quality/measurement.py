"""What is known of the quality of some images, and how it is shown."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of the table; fields that could not be measured, or that an older weight file lacks, are None.

    `dataclasses.asdict` of it can be written as JSON.
    """

    frechet_distance: float | None  # to the reference statistics
    class_accuracy: float | None  # share of images whose largest logit is their label, in [0, 1]
    images_per_second: float | None = None
    evaluations: int | None = None  # of the network, per image
    num_images: int = 0
    recorded: bool = False  # what is known of the images comes from the weight file, the speed was measured now
    frechet_means: float | None = None  # the two parts whose sum the distance is
    frechet_covariances: float | None = None
    precision: float | None = None  # these three of `num_compared` images and as many real ones
    recall: float | None = None
    kernel_distance: float | None = None
    num_compared: int | None = None
    classifier_score: float | None = None
    class_variance: float | None = None


# Of the second table: a line each, by what stands before it, the field, the factor and the format.
DETAILS = (
    ("Fréchet distance: of means", "frechet_means", 1, ".3f"),
    ("    of covariances", "frechet_covariances", 1, ".3f"),
    ("precision", "precision", 1, ".2%"),
    ("recall", "recall", 1, ".2%"),
    ("kernel distance × 1000", "kernel_distance", 1000, ".4g"),
    ("    real images of these three", "num_compared", 1, "d"),
    ("classifier score", "classifier_score", 1, ".3f"),
    ("variance within classes", "class_variance", 1, ".3f"),
)
DETAIL_WIDTH = 32


def table(rows: dict[str, Measurement]) -> str:
    """The rows as aligned text, one line each; below, what more is known of them, one column each."""
    first = max(24, 2 + max(map(len, rows), default=0))
    lines = [f"{'':<{first}}{'evaluations':>12}{'Fréchet distance':>18}{'class accuracy':>16}{'images/s':>12}"]
    for name, row in rows.items():
        lines.append(
            f"{name:<{first}}{_show(row.evaluations, 'd'):>12}{_show(row.frechet_distance, '.3f'):>18}"
            f"{_show(row.class_accuracy, '.2%'):>16}{_show(row.images_per_second, '.0f'):>12}"
        )
    widths = [max(12, len(name) + 2) for name in rows]
    details = []
    for title, field, factor, pattern in DETAILS:
        values = [getattr(row, field) for row in rows.values()]
        if any(value is not None for value in values):
            shown = [_show(None if value is None else value * factor, pattern) for value in values]
            details.append((title, shown))
    if details:
        lines.append("")
        for title, texts in [("", list(rows)), *details]:
            cells = (f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))
            lines.append(f"{title:<{DETAIL_WIDTH}}{''.join(cells)}")
    return "\n".join(lines)


def _show(value: float | None, pattern: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, pattern)
