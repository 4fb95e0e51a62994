"""Datasets of every format: a good one, how it is read, and what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.fuzz import truth
from benchmarks.fuzz.kind import Kind
from fastdmd import data
from tests.helpers import small_datasets

PICTURES = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "ppm": "PPM"}


def _dataset(path: Path, **options: Any) -> dict[str, Any]:
    found = data.load(path, **options)
    return {"images": found.images, "labels": found.labels}


def _write_pictures(folder: Path) -> None:
    """Two classes, a format a file; grey but for those that are not."""
    images = small_datasets.pixels(1, 8)
    for index, (suffix, name) in enumerate(PICTURES.items()):
        path = folder / "data" / ("ant", "bee")[index % 2] / f"{index}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index, 0]).convert("RGB").save(path, name)


def _write_table(folder: Path) -> None:
    images = small_datasets.pixels(1, 8)
    small_datasets.write_folder(
        folder / "data", {f"{index}.png": small_datasets.png(x) for index, x in enumerate(images)}
    )
    (folder / "table.csv").write_text("name,class\n" + "".join(f"{index}.png,{index % 3}\n" for index in range(7)))


def _write_idx(folder: Path, compressed: bool) -> None:
    small_datasets.write_idx(folder / "data", small_datasets.pixels(1, 8), small_datasets.LABELS, compressed=compressed)


def _write_zip(folder: Path) -> None:
    files = small_datasets.edm_files(small_datasets.pixels(3, 8), small_datasets.LABELS)
    small_datasets.write_zip(folder / "data.zip", files)


def _write_folder(folder: Path) -> None:
    small_datasets.write_folder(
        folder / "data", small_datasets.class_files(small_datasets.pixels(1, 8), small_datasets.LABELS)
    )


def _write_npz(folder: Path, name: str = "data.npz") -> None:
    small_datasets.write_npz(folder / name, images=small_datasets.pixels(1, 8), labels=small_datasets.LABELS)


def _table(path: Path) -> dict[str, Any]:
    return _dataset(path.parent / "data", labels=str(path))


PRETRAIN = ("fastdmd.pretrain", "--data", "{}", "--dry-run", "--device", "cpu", "--batch-size", "2")
KINDS = (
    Kind("npz", _write_npz, "data.npz", _dataset, truth.npz_dataset, command=PRETRAIN),
    Kind("idx", lambda folder: _write_idx(folder, False), "data", _dataset, truth.idx_dataset, command=PRETRAIN),
    Kind("idx.gz", lambda folder: _write_idx(folder, True), "data", _dataset, truth.idx_dataset, command=PRETRAIN),
    Kind("png folder", _write_folder, "data", _dataset, truth.picture_dataset, command=PRETRAIN),
    Kind("pictures", _write_pictures, "data", _dataset, truth.picture_dataset, command=PRETRAIN),
    Kind("edm zip", _write_zip, "data.zip", _dataset, truth.picture_dataset, command=PRETRAIN),
    Kind("csv", _write_table, "table.csv", _table, lambda path: truth.picture_dataset(path.parent / "data", path)),
)
