"""The report of a run that has just ended, by the process that trained."""

from __future__ import annotations

from pathlib import Path

import torch

from fastdmd.data import Dataset
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.networks.user_code import reason
from fastdmd.report import page
from fastdmd.report.reading import read_run
from fastdmd.report.study import Study, Subject, features_for, study
from fastdmd.runs import terminal
from fastdmd.runs.config import CommandConfig
from fastdmd.runs.folder import REPORT
from fastdmd.shards import is_cut

COMMAND = "python -m fastdmd.report"


def write(
    folder: Path,
    config: CommandConfig,
    device: torch.device,
    *,
    teacher: DenoisingNetwork | None,
    real: Dataset | None,
    is_complete: bool,
) -> None:
    """`report.html`; of a run that was ended without what takes time to compute. What fails is said, and ends nothing:
    the run has all of its results."""
    try:
        run = read_run(folder)
        found = Study(missing=[f"images of the teacher and neighbours of samples: {COMMAND} {folder} makes them"])
        if is_complete:
            features = features_for(config.evaluation.feature_network, real, device)
            missing = []
            if teacher is not None and is_cut(teacher):  # other processes, which it would take, do not come here
                missing = [f"images of the teacher, which processes share: {COMMAND} {folder} makes them"]
                teacher = None
            found = study(run, Subject(teacher, real, features, config.seed, config.evaluation.teacher_steps, missing))
        page.write(folder / REPORT, [run], found)
    except Exception as error:
        terminal.say(f"no {REPORT}: {reason(error)}")
