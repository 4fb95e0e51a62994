"""What a user can turn: the configuration of each command, made of the settings of the rooms that it uses."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch

from fastdmd.data.pairs import MAX_PAIRS
from fastdmd.data.settings import DataSettings
from fastdmd.diffusion import DenoisingNetwork
from fastdmd.distill.draws import Noise, NoiseSettings
from fastdmd.distill.gan import GAN, GANSettings
from fastdmd.distill.guard import NanPolicy
from fastdmd.distill.method_settings import MethodSettings
from fastdmd.distill.optimization import OptimizerSettings
from fastdmd.quality.settings import EvaluationSettings, HeunSteps, Monitor, MonitorSettings
from fastdmd.runs.checkpoints import CheckpointSettings
from fastdmd.runs.precision import Compute, ComputeSettings
from fastdmd.runs.record import RecordSettings
from fastdmd.settings import Input, OmitArgPrefixes, Positional, Settings, Switch, above, at_least, fail, within
from fastdmd.teachers import NO_OPTIONS, TeacherOptions

if TYPE_CHECKING:
    from typing_extensions import Self

Adapter = Annotated[TeacherOptions, OmitArgPrefixes]
Data = Annotated[DataSettings, OmitArgPrefixes]
Evaluation = Annotated[EvaluationSettings, OmitArgPrefixes]
Seed = Annotated[int, within(0, 2**32, below=True)]
Iterations = Annotated[int, at_least(1, 10**9)]
BatchSize = Annotated[int, at_least(1, 10**6)]
Snapshots = Annotated[int, at_least(1, 10**6)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandSettings(Settings):
    """Of every command."""

    verbose: Switch = False
    """Show the traceback of an error beneath its line, as FASTDMD_TRACEBACK=1 does."""

    def placed(self) -> Self:
        """With the place of its results decided, where that has no fixed name."""
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputingSettings(CommandSettings):
    """Of every command that computes images."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""
    deterministic: Switch = False
    """Take algorithms alone that give the same bits again, on the same machine; slower on a GPU. What has none is an
    error, and a run goes on only with the device, the number of threads and the versions that it was begun with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandConfig(ComputingSettings):
    """Of every command that measures."""

    data: Data = DataSettings()
    evaluation: Evaluation = EvaluationSettings()
    seed: Seed = 0
    """Every random draw is a function of the seed and the iteration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(CommandConfig):
    """Distil a teacher into a generator of one step, or a few, with DMD2 or SiD."""

    preset: Literal[
        "mnist",
        "mnist-best",
        "mnist-reference",
        "cifar10-cond",
        "cifar10-uncond",
        "imagenet64",
        "afhqv2-64",
        "ffhq-64",
    ] = "mnist"
    """Origin of the defaults. `mnist` ends within ten minutes on two cores; `mnist-best`, the same with three times the
    batch, within an hour; `mnist-reference` has the settings of the published
    re-implementation; the others are for EDM's published teachers."""
    teacher: Annotated[str | None, Input] = "mnist"
    """Weight file (.safetensors, or .pkl of EDM), folder of diffusers, package.module:name, or `mnist`: the embedded
    one."""
    adapter: Adapter = NO_OPTIONS
    init_from: Annotated[Path | None, Input] = None
    """Folder of a run to go on from, with other settings: generator, fake score, head and averages start as it left
    them, optimizers anew."""
    out: Path | None = None
    """Run folder; must not hold a run yet, but for --resume auto. Default: runs/PRESET-DATE-TIME."""
    iterations: Iterations = 2400
    """Guidance turns; one in dfake_gen_update_ratio of them comes with a generator turn."""
    batch_size: BatchSize = 64
    """Images per iteration."""
    dfake_gen_update_ratio: Annotated[int, at_least(1, 10**6)] = 2
    """Guidance turns per generator turn."""
    label_emphasis: Annotated[float | None, above(0, 1000)] = 1.0
    """Before it is distilled, the teacher's class embeddings move this many times as far from their mean: classes more
    distinct, variety less. None, of mnist and mnist-best: 0.923 for that teacher, which was made with 1.3, 1 for
    others."""
    clamp_images: bool | None = None
    """Whether the generator's images are clamped to [-1, 1], in training and ever after. Default: those of 1 or 3
    channels are, but for a teacher's of your own code or of diffusers, which may have another range."""
    optimizer: Annotated[OptimizerSettings, OmitArgPrefixes] = OptimizerSettings()
    noise: Annotated[NoiseSettings, OmitArgPrefixes] = NoiseSettings()
    method: Annotated[MethodSettings, OmitArgPrefixes] = MethodSettings()
    gan: Annotated[GANSettings, OmitArgPrefixes] = GANSettings()
    compute: Annotated[ComputeSettings, OmitArgPrefixes] = ComputeSettings()
    monitor: Annotated[MonitorSettings, OmitArgPrefixes] = MonitorSettings()
    checkpoint: Annotated[CheckpointSettings, OmitArgPrefixes] = CheckpointSettings()
    record: Annotated[RecordSettings, OmitArgPrefixes] = RecordSettings()
    log_every: Iterations = 50
    """Iterations between lines of metrics.jsonl."""
    snapshots: Snapshots = 10
    """How often, over the run, weights and samples are written."""
    nan_policy: NanPolicy = "skip"
    """What NaN or infinity in teacher, fake score, data, loss or gradient comes to. skip: that update is left out, and
    the run ends after ten in a row; stop: the run ends."""
    measure_teacher: Switch = False
    """Measure the teacher even where its weight file records figures measured in the same way."""
    dry_run: Switch = False
    """Print the resolved configuration and stop."""

    def check(self) -> None:
        super().check()
        if self.batch_size % self.compute.accumulation_steps:
            fail(self.compute, "accumulation_steps", f"that divides --batch-size {self.batch_size}")
        if self.batch_size // self.compute.accumulation_steps % self.noise.num_steps:
            parts = "" if self.compute.accumulation_steps == 1 else ", in each of --accumulation-steps,"
            fail(self, "batch_size", f"that the {self.noise.num_steps} steps of --generator-sigmas{parts} divide")
        if self.method.name != "dmd2" and self.gan.divergence != "reverse-kl":
            fail(self.gan, "divergence", f"reverse-kl with --method {self.method.name}")
        self.optimizer.averages(self.batch_size)  # raises where one is too long for it
        if self.checkpoint.resume is not None and self.out is None:
            fail(self.checkpoint, "resume", "together with --out")
        if self.monitor.eval_every and not self.evaluation.num_samples:
            fail(self.monitor, "eval_every", "0 with --num-samples 0")

    @property
    def has_open_end(self) -> bool:
        """Whether more iterations would be the same up to the last one of these."""
        return self.optimizer.lr_schedule == "constant"

    def placed(self) -> Self:
        name = f"{self.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        return dataclasses.replace(self, out=self.out or Path("runs") / name)

    def for_teacher(self, teacher: DenoisingNetwork, device: torch.device | None = None) -> ResolvedTrainConfig:
        """With the defaults that depend on the teacher and the device, by default its own, filled in.

        Raises ValueError for other dynamics than its own, for what the device cannot do, and for an adversarial term
        without features of the teacher.
        """
        if device is None:
            device = next(teacher.parameters()).device
        is_embedded = self.teacher == "mnist"
        is_resolved = isinstance(self.noise, Noise) and self.noise.dynamics == teacher.dynamics
        noise = cast(Noise, self.noise) if is_resolved else self.noise.for_teacher(teacher)
        resolved = {
            "noise": noise,
            "gan": self.gan.for_teacher(teacher, noise, self.optimizer.fake_score_lr, is_embedded=is_embedded),
            "compute": self.compute.for_teacher(teacher, device),
            "label_emphasis": of_label_emphasis(self.label_emphasis, self.teacher),
            "clamp_images": _makes_pictures(teacher) if self.clamp_images is None else self.clamp_images,
            "monitor": self.monitor.of(self.evaluation.num_samples),
        }
        return ResolvedTrainConfig(**(vars(self.placed()) | resolved))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedTrainConfig(TrainConfig):
    """`TrainConfig` with nothing left open: what a run is made from, and what its folder records."""

    out: Path = dataclasses.field()
    noise: Noise = dataclasses.field()
    gan: GAN = dataclasses.field()
    compute: Compute = dataclasses.field()
    label_emphasis: float = dataclasses.field()
    clamp_images: bool = dataclasses.field()
    monitor: Monitor = dataclasses.field()


def of_label_emphasis(factor: float | None, teacher: str | None) -> float:
    """The factor, of None the default for this teacher: the embedded one was made with 1.3, and 1.2 are left."""
    if factor is not None:
        return factor
    return 0.923 if teacher == "mnist" else 1.0


def _makes_pictures(teacher: DenoisingNetwork) -> bool:
    """Whether its images are known to lie in [-1, 1]."""
    return not teacher.foreign_name and teacher.image_shape[0] in (1, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CommandConfig):
    """Measure the samples of a generator or a teacher (Heun) against real images."""

    weights: Annotated[str, Positional, Input]
    """Weight file of a generator or a teacher (.safetensors), or a teacher as `fastdmd.train --teacher` takes it."""
    adapter: Adapter = NO_OPTIONS
    out: Path | None = None
    """Where to write the figures as JSON, too."""

    def check(self) -> None:
        if self.evaluation.num_samples < 2:
            fail(self.evaluation, "num_samples", ">= 2")
        super().check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig(ComputingSettings):
    """Make pairs of noise and a teacher's images, for `fastdmd.train --pairs`.

    Run again, it goes on."""

    teacher: Annotated[str, Input] = "mnist"
    """As `fastdmd.train --teacher` takes it."""
    adapter: Adapter = NO_OPTIONS
    out: Path
    """Folder of the pairs; new, or one that the same settings were begun in."""
    num: Annotated[int, at_least(1, MAX_PAIRS)] = 10_000
    """Number of pairs; all classes in turn."""
    batch_size: BatchSize = 250
    """Images per forward pass, and per file."""
    teacher_steps: HeunSteps = 18
    """Heun steps; N steps are 2 N - 1 evaluations."""
    label_emphasis: Annotated[float | None, above(0, 1000)] = None
    """As that of the `fastdmd.train` that the pairs are for. None: 0.923 for the embedded teacher, as with --preset
    mnist, 1 for others."""
    seed: Seed = 0
    """Seed of the noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(ComputingSettings):
    """Sample images from a generator or a teacher (Heun)."""

    weights: Annotated[str, Positional, Input]
    """Weight file of a generator or a teacher (.safetensors), or a teacher as `fastdmd.train --teacher` takes it."""
    adapter: Adapter = NO_OPTIONS
    out: Path = Path("samples.png")
    """A picture (.png), or images and labels as arrays (.npz); latents, of other than 1 or 3 channels, in float32."""
    num: Annotated[int, at_least(1, 2**31)] = 64
    """Number of images."""
    labels: str | None = None
    """Class labels, separated by commas and repeated as needed. Default: all classes in turn."""
    seed: Seed = 0
    """Seed of the noise."""
    batch_size: BatchSize = 250
    """Images per forward pass; changes no image beyond rounding."""
    teacher_steps: HeunSteps = 18
    """Heun steps of a teacher; N steps are 2 N - 1 evaluations. A generator has its own."""

    def check(self) -> None:
        super().check()
        if self.out.suffix not in (".png", ".npz"):
            fail(self, "out", "ending in .png or .npz")
