"""One page that needs nothing but itself: pictures and curves are in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from fastdmd import __version__
from fastdmd.files import write_atomically
from fastdmd.report import curves, figures, pictures
from fastdmd.report.reading import Run
from fastdmd.report.study import Study

FOLDER = Path(__file__).parent


def write(path: Path, runs: Sequence[Run], found: Study) -> None:
    """The report of a run with what was found, or the comparison of several. Raises OSError where it cannot be
    written."""
    text = _render("run.html", _of_run(runs[0], found)) if len(runs) == 1 else _render("comparison.html", _of_all(runs))
    write_atomically(path, lambda file: file.write(text.encode(errors="replace")))


def _render(template: str, content: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    style = (FOLDER / "style.css").read_text()
    return environment.get_template(template).render(style=style, version=__version__, **content)


def _of_run(run: Run, found: Study) -> dict[str, Any]:
    return {
        "run": run,
        "kind": "distillation" if run.is_distillation else "pretraining of a teacher",
        "are_small": run.sheet is not None and pictures.are_small(run.sheet),
        "headline": figures.headline(run),
        "bars": figures.bars(run),
        "alarms": run.alarms,
        "compared": pictures.compared(run, found.teacher_rows),
        "history": pictures.history(run.sheet),
        "quality": curves.quality(run),
        "measured": figures.measured(run),
        "copies": found.copies,
        "nearest": pictures.nearest(found.copies),
        "training": curves.training(run),
        "machine_charts": curves.machine(run),
        "machine": figures.machine(run),
        "settings": figures.settings(run.config),
        "missing": [*run.missing, *found.missing],
    }


def _of_all(runs: Sequence[Run]) -> dict[str, Any]:
    sheets = [(run, run.sheet) for run in runs]
    return {
        "runs": runs,
        "are_small": all(pictures.are_small(sheet) for _, sheet in sheets if sheet is not None),
        "table": figures.comparison(runs),
        "differences": figures.differences(runs),
        "samples": [
            (run, None if sheet is None else pictures.samples(sheet, f"Samples of {run.name}")) for run, sheet in sheets
        ],
        "charts": curves.comparison(runs),
        "alarms": [(run, run.alarms) for run in runs if run.alarms],
        "missing": [f"{run.name}: {text}" for run in runs for text in run.missing],
    }
