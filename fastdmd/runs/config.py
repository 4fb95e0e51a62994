"""What a user can turn: the typed configuration of each command, its checks, and the presets."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from fastdmd import settings
from fastdmd.settings import above, at_least, within
from fastdmd.data.framing import Framing
from fastdmd.data.labels import require_choice
from fastdmd.diffusion import Denoiser
from fastdmd.settings import FlagCreatePairsOff, OmitArgPrefixes, Positional
from fastdmd.runs.precision import resolve_execution, resolve_precision
from fastdmd.teachers import NO_OPTIONS, TeacherOptions

Switch = Annotated[bool, FlagCreatePairsOff]
Adapter = Annotated[TeacherOptions, OmitArgPrefixes]
Seed = Annotated[int, within(0, 2**32, below=True)]
HeunSteps = Annotated[int, at_least(1, 10**4)]
Iterations = Annotated[int, at_least(1, 10**9)]
WarmUp = Annotated[int, at_least(0, 10**9)]
BatchSize = Annotated[int, at_least(1, 10**6)]
Snapshots = Annotated[int, at_least(1, 10**6)]
Rate = Annotated[float, above(0, 1e30)]  # what float32 holds, as is the norm that gradients are clipped to
WeightDecay = Annotated[float, at_least(0, 1e8)]
Decay = Annotated[float, within(0, 1 - 2**-20)]  # beyond, float32 corrects the first moments by a division by zero
NoiseLevel = Annotated[float, above(0, 1e9)]
LogMean = Annotated[float, within(-10, 10)]  # of ln(sigma): the squares of sigma have to stay in float32
LogDeviation = Annotated[float, above(0, 5)]
DataDeviation = Annotated[float, above(0, 1e6)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the samples of a network are measured; part of every command that measures."""

    data: str | None = None
    """Folder of IDX files, .npz, folder of images, or EDM dataset zip. Default: the embedded MNIST digits."""
    labels: str | None = None
    """Classes of --data: `prefix` (of file names, up to the first underscore), FILE.csv (lines of name,class), or
    `none`. Default: what the data says, in a dataset.json, by subfolders or in arrays."""
    resize: Annotated[int | None, at_least(1, 2**14)] = None
    """Resize the images of --data: shorter side to so many pixels (Lanczos), then the centre square."""
    crop: Annotated[int | None, at_least(1, 2**14)] = None
    """Of each image of --data, resized or not, keep the centre square of so many pixels. Default: --resize."""
    num_samples: Annotated[int, at_least(0, 10**7)] = 10_000
    """Images sampled for each figure; 0 measures nothing."""
    feature_network: str | None = None
    """TorchScript file or package.module:name for the metrics. Default: the embedded digit classifier."""
    reference: str | None = None
    """EDM reference statistics (.npz with mu, sigma). Default: those of the data."""
    teacher_steps: HeunSteps = 18
    """Heun steps of a teacher; N steps are 2 N - 1 evaluations. A generator takes one step."""
    seed: Seed = 0
    """Every random draw is a function of the seed and the iteration."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""
    verbose: Switch = False
    """Show the traceback of an error beneath its line, as FASTDMD_TRACEBACK=1 does."""

    def check(self) -> None:
        """Raises ValueError for a value that cannot be, naming the flag, what was expected and what came."""
        settings.check(self)
        for name in ("labels", "resize", "crop"):
            if self.data is None and getattr(self, name) is not None:
                fail(self, name, "together with --data")
        require_choice(self.labels)
        Framing(self.resize, self.crop)
        if self.num_samples == 1:
            fail(self, "num_samples", ">= 2, or 0 for no metrics")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(EvaluationConfig):
    """Distil a teacher into a one-step generator with DMD2."""

    preset: Literal[
        "mnist", "mnist-reference", "cifar10-cond", "cifar10-uncond", "imagenet64", "afhqv2-64", "ffhq-64"
    ] = "mnist"
    """Origin of the defaults. `mnist` ends within ten minutes on two cores; `mnist-reference` has the settings of the
    published re-implementation; the others are for EDM's published teachers."""
    teacher: str | None = "mnist"
    """Weight file (.safetensors, or .pkl of EDM), folder of diffusers, package.module:name, or `mnist`: the embedded
    one."""
    adapter: Adapter = NO_OPTIONS
    out: Path | None = None
    """Run folder; must not hold a run yet. Default: runs/PRESET-DATE-TIME."""
    iterations: Iterations = 1600
    """Guidance turns; one in dfake_gen_update_ratio of them comes with a generator turn."""
    batch_size: BatchSize = 48
    """Images per iteration."""
    dfake_gen_update_ratio: Annotated[int, at_least(1, 10**6)] = 2
    """Guidance turns per generator turn."""
    generator_lr: Rate = 6e-4
    """Learning rate of the generator's AdamW."""
    guidance_lr: Rate = 1.2e-3
    """Learning rate of the fake score's AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After warm-up: constant, or to zero along a cosine."""
    warmup_iterations: WarmUp = 50
    """Iterations over which both learning rates rise."""
    beta1: Decay = 0.9
    """Decay of AdamW's first moment."""
    beta2: Decay = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: WeightDecay = 0.01
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Rate = 1.0
    """Gradients of either network are clipped to this global norm."""
    ema_decay: Decay = 0.98
    """Decay of the average of the generator's weights, per generator update. The average is the result."""
    num_train_timesteps: Annotated[int, at_least(2, 10**6)] = 1000
    """Number of noise levels in the Karras schedule."""
    sigma_min: NoiseLevel = 0.002
    """Least noise level."""
    sigma_max: NoiseLevel = 80.0
    """Greatest noise level; at most that of the teacher's noise schedule, if it has one."""
    rho: Annotated[float, within(0.1, 1000)] = 7.0
    """Exponent of the Karras schedule."""
    sigma_data: DataDeviation | None = None
    """Standard deviation of the data in the fake score's loss weight. Default: the teacher's."""
    min_step_percent: Annotated[float, within(0, 1)] = 0.02
    """Distribution matching draws noise levels from this fraction of the schedule ..."""
    max_step_percent: Annotated[float, within(0, 1)] = 0.98
    """... to this one."""
    dynamics: Literal["edm", "flow"] | None = None
    """How noise levels are drawn and weighted: Karras et al.'s way, or flow matching's. Default: the teacher's."""
    time_mean: LogMean = 0.0
    """Flow matching: mean of logit(t), from which noise levels are drawn."""
    time_std: LogDeviation = 1.0
    """Flow matching: standard deviation of logit(t)."""
    conditioning_sigma: NoiseLevel | None = None
    """The noise level that the one-step generator starts from. Default: 80, or the end of the teacher's noise schedule
    if that is less; 1e6 in flow matching, where t = sigma / (1 + sigma) is 1 then."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """What the networks compute in; weights are kept in float32. auto: bf16 on a GPU, fp32 on a CPU."""
    execution: Literal["auto", "eager", "compiled", "captured"] = "auto"
    """How turns run. auto: captured (compiled networks, a CUDA graph per turn) on a GPU, eager on a CPU."""
    compile: Switch = False
    """Short for --execution compiled."""
    accumulation_steps: BatchSize = 1
    """Parts that a batch is processed in: less memory, the same gradient."""
    log_every: Iterations = 50
    """Iterations between lines of metrics.jsonl."""
    snapshots: Snapshots = 10
    """How often, over the run, weights and samples are written."""
    measure_teacher: Switch = False
    """Measure the teacher even where its weight file records figures measured in the same way."""
    dry_run: Switch = False
    """Print the resolved configuration and stop."""

    @property
    def step_range(self) -> tuple[int, int]:
        """First and last index of the schedule that distribution matching draws, both included."""
        last = self.num_train_timesteps - 1
        return (
            min(int(self.min_step_percent * self.num_train_timesteps), last),
            min(int(self.max_step_percent * self.num_train_timesteps), last),
        )

    @property
    def resolved_out(self) -> Path:
        return self.out or Path("runs") / f"{self.preset}-{time.strftime('%Y%m%d-%H%M%S')}"

    def for_teacher(self, teacher: Denoiser, device: torch.device | None = None) -> TrainConfig:
        """With the defaults that depend on the teacher and the device, by default its own, filled in.

        Raises ValueError for other dynamics than its own, and for what the device cannot do.
        """
        if self.dynamics not in (None, teacher.dynamics):
            fail(self, "dynamics", f"{teacher.dynamics}, as the teacher was trained")
        limit = getattr(teacher, "sigma_max", math.inf)
        conditioning_sigma, sigma_data = self.conditioning_sigma, self.sigma_data
        if conditioning_sigma is None:
            conditioning_sigma = 1e6 if teacher.dynamics == "flow" else min(80.0, limit)
        if sigma_data is None:
            sigma_data = teacher.sigma_data
        if device is None:
            device = next(teacher.parameters()).device
        return dataclasses.replace(
            self, dynamics=teacher.dynamics, conditioning_sigma=conditioning_sigma, sigma_data=sigma_data,
            sigma_max=min(self.sigma_max, limit),
            precision=resolve_precision(self.precision, device),
            execution="compiled" if self.compile else resolve_execution(self.execution, device),
        )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.batch_size % self.accumulation_steps:
            fail(self, "accumulation_steps", f"that divides --batch-size {self.batch_size}")
        if self.compile and self.execution not in ("auto", "compiled"):
            fail(self, "execution", "compiled with --compile")
        if not self.sigma_max > self.sigma_min:
            fail(self, "sigma_max", f"> --sigma-min {self.sigma_min}")
        if self.min_step_percent > self.max_step_percent:
            fail(self, "max_step_percent", f"between --min-step-percent {self.min_step_percent} and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationConfig):
    """Measure the samples of a generator (one step) or a teacher (Heun) against real images."""

    weights: Annotated[str, Positional]
    """Weight file of a generator or a teacher (.safetensors), or a teacher as `fastdmd.train --teacher` takes it."""
    adapter: Adapter = NO_OPTIONS
    out: Path | None = None
    """Where to write the figures as JSON, too."""

    def check(self) -> None:
        super().check()
        if self.num_samples < 2:
            fail(self, "num_samples", ">= 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample images from a generator (one step) or a teacher (Heun)."""

    weights: Annotated[str, Positional]
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
    """Heun steps of a teacher; N steps are 2 N - 1 evaluations. A generator takes one step."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""
    verbose: Switch = False
    """Show the traceback of an error beneath its line, as FASTDMD_TRACEBACK=1 does."""

    def check(self) -> None:
        settings.check(self)
        if self.out.suffix not in (".png", ".npz"):
            fail(self, "out", "ending in .png or .npz")


def fail(config: Any, name: str, expected: str) -> None:
    raise ValueError(f"expected --{name.replace('_', '-')} {expected}, got {getattr(config, name)}")


def warm_up_notice(config: Any) -> str | None:
    """Of a run that ends before its warm-up does."""
    if config.warmup_iterations < config.iterations or config.warmup_iterations == 0:
        return None
    return (
        f"warm-up takes {config.warmup_iterations} iterations and the run ends after {config.iterations}: the learning "
        "rate asked for is never reached; --warmup-iterations changes that"
    )
