"""Samples as pictures that a page holds in itself."""

from __future__ import annotations

import base64
import dataclasses
import io

from PIL import Image

from fastdmd.report.charts import show
from fastdmd.report.reading import Run
from fastdmd.report.study import NUM_COMPARED, Copies, Rows
from fastdmd.runs.pictures import Sheet

SMALL = 48  # pixels a side, up to which an image is shown pixel by pixel


@dataclasses.dataclass(frozen=True)
class Picture:
    """For an `<img>`."""

    source: str  # data:
    alt: str
    caption: str


def are_small(sheet: Sheet) -> bool:
    return sheet.varied[0][0].width <= SMALL


def compared(run: Run, teacher_rows: Rows | None) -> list[Picture]:
    """The student's images, and the teacher's of the same noise; of all images, where those are not known."""
    if run.sheet is None:
        return []
    if teacher_rows is None:
        return [samples(run.sheet, "Samples, a row for each class if there are classes")]
    rows = [row[:NUM_COMPARED] for row in run.sheet.varied]
    return [
        _picture(_grid(rows), f"Samples of the student, {len(rows)} rows of {NUM_COMPARED}", "Student"),
        _picture(_grid(teacher_rows), "Samples of the teacher from the same noise, in the same places", "Teacher"),
    ]


def samples(sheet: Sheet, alt: str) -> Picture:
    """The last ones."""
    return _picture(_grid(sheet.varied), alt, "")


def history(sheet: Sheet | None) -> list[Picture]:
    """A picture for each snapshot, of the same noise."""
    if sheet is None or len(sheet.history[0]) < 2:
        return []
    pictures = []
    for place in range(len(sheet.history[0])):
        when = show(sheet.iterations[place]) if sheet.iterations else ""
        alt = f"After {when} iterations" if when else f"Snapshot {place + 1}"
        pictures.append(_picture(_grid([[row[place]] for row in sheet.history]), alt, when))
    return pictures


def nearest(copies: Copies | None) -> list[Picture]:
    """Each sample above its neighbours."""
    pictures = []
    for one in () if copies is None else copies.nearest:
        distance = f"{one.distance:.2f}"
        alt = f"A sample, and beneath it the real images nearest to it, at {distance}"
        pictures.append(_picture(one.picture, alt, distance))
    return pictures


def _grid(rows: Rows) -> Image.Image:
    """Images with a pixel of nothing between them."""
    width, height = rows[0][0].size
    size = len(rows[0]) * (width + 1) - 1, len(rows) * (height + 1) - 1
    grid = Image.new("LA" if rows[0][0].mode == "L" else "RGBA", size)
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            grid.paste(image.convert(grid.mode), (left * (width + 1), top * (height + 1)))
    return grid


def _picture(image: Image.Image, alt: str, caption: str) -> Picture:
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return Picture(f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}", alt, caption)
