"""What a report computes anew: the teacher's images of the student's noise, and the real images nearest to samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastdmd import teachers
from fastdmd.data import Dataset
from fastdmd.data.settings import DataSettings
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.networks.options import TeacherOptions
from fastdmd.networks.user_code import reason
from fastdmd.quality import neighbours, sample
from fastdmd.quality.features import FeatureNetwork, is_script, load_feature_network
from fastdmd.quality.settings import EvaluationSettings
from fastdmd.randomness import RANDOM_NUMBERS
from fastdmd.report.reading import Run
from fastdmd.runs.pictures import NUM_COLUMNS, SampleSheet, Sheet, image_grid
from fastdmd.sampling import HeunSampler

MOST_REAL = 10_000  # images that samples are compared with, drawn at random
NUM_COMPARED = 5  # columns of teacher and student
NUM_NEIGHBOURS = 3
REAL = "real images"

Rows = Sequence[Sequence[Image.Image]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What it takes besides the folder: the teacher that was distilled, real images, what sees their features. What is
    None is not to be had, and `missing` says why."""

    teacher: DenoisingNetwork | None
    real: Dataset | None
    features: FeatureNetwork | None
    seed: int
    teacher_steps: int
    missing: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Nearest:
    """A sample above its neighbours, the nearest first."""

    picture: Image.Image
    distance: float  # to the nearest, in what is usual among real images


@dataclasses.dataclass(frozen=True)
class Copies:
    """How near samples are to real images."""

    ratio: float  # see `neighbours.Neighbours`
    nearest: Sequence[Nearest]  # of each row the sample that is nearest to any
    num_samples: int
    compared_with: str
    compared_in: str


@dataclasses.dataclass(frozen=True)
class Study:
    teacher_rows: Rows | None = None  # [rows][NUM_COMPARED], of the sheet's noise
    copies: Copies | None = None
    missing: Sequence[str] = ()


def study(run: Run, subject: Subject) -> Study:
    """Whatever of it can be had; `missing` says what cannot, a line each."""
    if run.sheet is None:
        return Study(missing=subject.missing)
    missing = [*subject.missing]
    parts: dict[str, Any] = {}
    for name, what, compute in (
        ("teacher_rows", "images of the teacher", _teacher_rows),
        ("copies", "neighbours of samples", _copies),
    ):
        try:
            parts[name] = compute(run.sheet, subject)
        except Exception as error:  # of networks and data that nobody has to have any more
            missing.append(f"{what}: {_why(error)}")
    if subject.real is None and not any(text.startswith(REAL) for text in missing):
        missing.append(f"{REAL} near to samples: none were named")
    return Study(**parts, missing=missing)


def subject_of(run: Run, device: torch.device, *, runs_code: bool) -> Subject:
    """As the run's configuration names it. Code that it names is run if `runs_code`: the folder may be anybody's."""
    config, missing = run.config, []

    def load(what: str, loader: Callable[[], Any], otherwise: Any = None) -> Any:
        try:
            return loader()
        except Exception as error:  # a configuration of another version, a file that is gone
            missing.append(f"{what}: {_why(error)}")
            return otherwise

    settings = load("settings of measurements", lambda: _settings(config), EvaluationSettings())
    teacher = load("teacher", lambda: _teacher(config, device, runs_code)) if run.is_distillation else None
    real = load(REAL, lambda: _real(config))
    features = load("feature network", lambda: _features(settings.feature_network, real, device, runs_code))
    return Subject(teacher, real, features, config.get("seed", 0), settings.teacher_steps, missing)


def features_for(source: str | None, real: Dataset | None, device: torch.device) -> FeatureNetwork | None:
    """What a command measures with: the network that was named or, for digits, the embedded one."""
    if source is None and (real is None or real.image_shape != (1, 28, 28)):
        return None
    return load_feature_network(source, device)


def _settings(config: Mapping[str, Any]) -> EvaluationSettings:
    settings = EvaluationSettings(**config.get("evaluation", {}))
    settings.check()
    return settings


def _teacher(config: Mapping[str, Any], device: torch.device, runs_code: bool) -> DenoisingNetwork:
    if "teacher" not in config:
        raise ValueError("expected a configuration that names one, got none")
    source, options = config["teacher"], TeacherOptions(**config.get("adapter", {}))
    code = source if teachers.is_code(source) else options.network
    if code is not None and not runs_code:
        raise ValueError(f"expected --run-code for {code}: code that a folder names runs only where you say so")
    network, _ = teachers.read(source, options, device)
    return network


def _real(config: Mapping[str, Any]) -> Dataset | None:
    settings = DataSettings(**config.get("data", {}))
    if settings.path is None and config.get("teacher", "mnist") != "mnist":
        return None
    return settings.load(labels_optional=True)


def _features(source: str | None, real: Dataset | None, device: torch.device, runs_code: bool) -> FeatureNetwork | None:
    if source is not None and not runs_code:
        kind = "TorchScript" if is_script(source) else "code"
        raise ValueError(f"expected --run-code for {source}: {kind} that a folder names runs only where you say so")
    return features_for(source, real, device)


def _teacher_rows(sheet: Sheet, subject: Subject) -> list[list[Image.Image]] | None:
    if subject.teacher is None:
        return None
    if not sheet.is_of_sheet_noise:
        raise ValueError(f"expected samples of noise of {RANDOM_NUMBERS}, got some of before")
    drawn = SampleSheet(subject.teacher, subject.seed, next(subject.teacher.parameters()).device)
    if len(drawn.noise) != len(sheet.varied) * NUM_COLUMNS:
        raise ValueError(f"expected a teacher of {len(sheet.varied)} rows of samples, got another")
    chosen = torch.arange(len(drawn.noise), device=drawn.noise.device).view(-1, NUM_COLUMNS)[:, 1 : 1 + NUM_COMPARED]
    labels = None if drawn.class_labels is None else drawn.class_labels[chosen.flatten()]
    images = sample(HeunSampler(subject.teacher, subject.teacher_steps), drawn.noise[chosen.flatten()], labels)
    pictures = [image_grid(image[None], 1) for image in images]
    return [pictures[start : start + NUM_COMPARED] for start in range(0, len(pictures), NUM_COMPARED)]


def _copies(sheet: Sheet, subject: Subject) -> Copies | None:
    if (real := subject.real) is None:
        return None
    pictures = [picture for row in sheet.varied for picture in row]
    images = torch.stack([_tensor(picture) for picture in pictures])  # [N, C, H, W]
    if tuple(images.shape[1:]) != real.image_shape:
        raise ValueError(f"expected real images of {tuple(images.shape[1:])}, got {real.image_shape} of {real.name}")
    drawn = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:MOST_REAL].sort().values

    def see(batch: torch.Tensor) -> torch.Tensor:
        return neighbours.pixels(batch).cpu() if subject.features is None else subject.features(batch)[0].float().cpu()

    features = torch.cat([see(real.batch(part)[0]) for part in drawn.split(500)])
    found = neighbours.nearest(see(images), features, NUM_NEIGHBOURS)
    in_row = len(sheet.varied[0])
    closest = found.distances[:, 0].view(-1, in_row).argmin(1) + torch.arange(len(sheet.varied)) * in_row
    shown = []
    for place in closest.tolist():
        beside, _ = real.batch(drawn[found.indices[place]])
        stacked = image_grid(torch.cat([images[place : place + 1], beside.cpu()]), 1)
        shown.append(Nearest(stacked, found.distances[place, 0].item() / found.usual if found.usual else float("nan")))
    whole = f"all {len(real):,}" if len(drawn) == len(real) else f"{len(drawn):,} of {len(real):,}"
    return Copies(
        found.ratio,
        shown,
        len(images),
        f"{whole} images of {real.name}",
        "pixels, made small" if subject.features is None else "features",
    )


def _tensor(picture: Image.Image) -> torch.Tensor:
    """[C, H, W] in [-1, 1]."""
    values = torch.from_numpy(np.array(picture)).float() / 127.5 - 1
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def _why(error: Exception) -> str:
    """In a line; what we say ourselves is enough."""
    return str(error) if type(error) in (ValueError, FileNotFoundError) and "\n" not in str(error) else reason(error)
