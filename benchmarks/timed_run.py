"""A distillation whose training is timed and whose student is measured between: fastdmd's, or the textbook loop's."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.textbook import TextbookDMD2, textbook_like
from fastdmd import teachers
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.optim.groups import schedule
from fastdmd.quality.evaluation import Evaluation
from fastdmd.runs import distillation, machine
from fastdmd.runs.cli import resolve_device
from fastdmd.runs.config import ResolvedTrainConfig
from fastdmd.runs.presets import PRESETS
from fastdmd.sampling import Generator, HeunSampler

LOOK_EVERY = 10  # iterations, at the clock: of a GPU, that waits for it


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of `fastdmd.train`: those of a preset, but for `changes`; and the loop that takes them."""

    loop: str  # "fastdmd" or "textbook"
    preset: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_constant(self) -> bool:
        """Whether a run is that of a longer one up to its end."""
        return PRESETS[self.preset].config.replace(**self.changes).has_open_end

    def config(self, iterations: int, seed: int, **changes: Any):
        return PRESETS[self.preset].config.replace(**self.changes, **changes, iterations=iterations, seed=seed)


class ScheduledTextbook:
    """The textbook loop, with the learning rates of a schedule put into its optimizers; it warms up by itself."""

    def __init__(self, config: ResolvedTrainConfig, teacher: DenoisingNetwork):
        if config.label_emphasis != 1:
            teacher = copy.deepcopy(teacher)
            teacher.emphasize_labels(config.label_emphasis)
        self.loop: TextbookDMD2 = textbook_like(config, teacher)
        self.peaks = self.loop.learning_rates
        ratio = config.dfake_gen_update_ratio
        optimizer = config.optimizer
        options = optimizer.of_generator(config.iterations, ratio, config.batch_size)
        self.decay_steps = options["decay_steps"], optimizer.of_fake_score(config.iterations)["decay_steps"]

    def iterate(self, step: int, draws: Any) -> None:
        loop = self.loop
        rates = [
            peak * schedule(update, 0, decay_steps)
            for peak, update, decay_steps in zip(self.peaks, loop.num_updates, self.decay_steps, strict=True)
        ]
        loop.learning_rates = tuple(rates)  # what it takes while it warms up
        for rate, optimizer in zip(rates, (loop.generator_optimizer, loop.guidance_optimizer), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
        loop.iterate(step, draws(step))

    @property
    def average(self) -> DenoisingNetwork:
        return self.loop.ema


class TimedRun:
    """A run of so many iterations, from its first; `seconds` are those of training alone, its first iterations, which
    may compile and capture, included, and of building nothing."""

    def __init__(
        self, recipe: Recipe, iterations: int, seed: int, *, device: str, num_samples: int, precision: str = "auto"
    ):
        self.device = resolve_device(device)
        teacher = teachers.load("mnist", device=self.device)
        config = recipe.config(iterations, seed, precision=precision).for_teacher(teacher)
        self.num_samples, self.teacher = num_samples, teacher
        self.step, self.seconds, self.first_seconds = 0, 0.0, 0.0
        real = distillation.real_images(config, teacher, None)
        self.draws = distillation.make_draws(config, teacher, self.device, real)
        if recipe.loop == "fastdmd":
            machine.prepare(self.device, precision=config.compute.precision, batch_size=config.batch_size)
            self.model = distillation.build(config, teacher)
        else:
            self.model = ScheduledTextbook(config, teacher)
        self.config = config
        self.evaluation: Evaluation | None = None

    def advance(self, to: int, limit_seconds: float) -> dict[str, Any]:
        """Trains up to iteration `to`, or until the clock has gone beyond the limit; says where it is, and when the
        first `LOOK_EVERY` iterations, which may compile and capture, were over."""
        self._synchronize()
        started = time.perf_counter()
        while self.step < to:
            self.model.iterate(self.step, self.draws)
            self.step += 1
            if self.step % LOOK_EVERY == 0:
                self._synchronize()
                seconds = self.seconds + time.perf_counter() - started
                if self.step == LOOK_EVERY:
                    self.first_seconds = seconds
                if seconds > limit_seconds:
                    break
        self._synchronize()
        self.seconds += time.perf_counter() - started
        seconds, first_seconds = round(self.seconds, 3), round(self.first_seconds, 3)
        return {"iteration": self.step, "seconds": seconds, "first_seconds": first_seconds}

    def measure(self) -> dict[str, Any]:
        """The student, which is the average of the weights; of the same noise for every run."""
        sampler = Generator(self.model.average, self.config.noise.generator_sigmas, self.config.clamp_images)
        return self._measure(sampler, "student")

    def measure_teacher(self) -> dict[str, Any]:
        return self._measure(HeunSampler(self.teacher, self.config.evaluation.teacher_steps), "teacher")

    def facts(self) -> dict[str, Any]:
        executor = getattr(self.model, "executor", None)
        return {"threads": torch.get_num_threads(), "execution": executor.name if executor else "eager"}

    def _measure(self, sampler: Any, name: str) -> dict[str, Any]:
        if self.evaluation is None:
            self.evaluation = Evaluation(
                self.teacher.image_shape, self.teacher.num_classes, num_samples=self.num_samples, device=self.device
            )
        found = self.evaluation.measure(sampler, name=name)
        return {"frechet_distance": found.frechet_distance, "class_accuracy": found.class_accuracy}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def made(*arguments: Any, **options: Any) -> Iterator[TimedRun]:
    """What a process of its own makes first."""
    yield TimedRun(*arguments, **options)
