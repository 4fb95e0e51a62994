"""A short distillation of the embedded teacher, reading by reading: what alarms and curves are made from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.failures import Case
from fastdmd import teachers
from fastdmd.quality.alarms import Alarm
from fastdmd.quality.reference import Reference
from fastdmd.runs import distillation, watching
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.pictures import SampleSheet
from fastdmd.sampling import Generator

SNAPSHOT = 32  # iterations
# Faults are hooks, which turns that were captured before them would not run.
SETTINGS = {"batch_size": 24, "warmup_iterations": 20, "log_every": 8, "execution": "eager"}


class Line(NamedTuple):
    """What `fastdmd.train` would write to metrics.jsonl, and what images should look like."""

    iteration: int
    figures: dict[str, float | None]
    alarms: list[Alarm]
    reference: Reference


def lines(case: Case, seed: int, iterations: int, **settings: Any) -> Iterator[Line]:
    """Of a run with a snapshot every 32 iterations; one that nobody asks for more of ends."""
    teacher = teachers.load("mnist")
    settings = SETTINGS | {"iterations": iterations} | settings | case.options
    config = TrainConfig(seed=seed).replace(**settings).for_teacher(teacher)
    real = distillation.real_images(config, teacher, None)
    draws = distillation.make_draws(config, teacher, torch.device("cpu"), real)
    model = distillation.build(config, teacher)
    watch, sheet = watching.make_watch(config, model, None), SampleSheet(teacher, seed, torch.device("cpu"))
    assert watch is not None  # of a teacher that samples images
    sampler = Generator(model.average, config.noise.generator_sigmas, config.clamp_images)
    watch.see_average(sheet.of(sampler))
    for step in range(iterations):
        if step == case.at and case.fault is not None:
            case.fault(model)
        model.iterate(step, draws)
        line = None
        if (step + 1) % config.log_every == 0:
            readings = [tally.read() for tally in (model.generator_tally, model.guidance_tally)]
            means = {name: value for reading in readings for name, value in reading.means.items()}
            num_images, num_judged = readings[0].num_watched, 2 * readings[1].num_good  # in batches
            figures, alarms = watch.read(
                step + 1, means, num_images * config.batch_size, num_judged * config.batch_size
            )
            line = Line(step + 1, means | figures, alarms, watch.reference)
        if (step + 1) % SNAPSHOT == 0:
            watch.see_average(sheet.of(sampler))
        if line is not None:
            yield line
