"""What a user can turn: the typed configuration of each command, its checks, and the presets."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fastdmd.data.framing import Framing
from fastdmd.data.labels import require_choice
from fastdmd.diffusion import Denoiser
from fastdmd.precision import resolve_execution, resolve_precision
from fastdmd.teachers import NO_OPTIONS, TeacherOptions

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the samples of a network are measured; part of every command that measures."""

    data: str | None = None
    """Folder of IDX files, .npz, folder of images, or EDM dataset zip. Default: the embedded MNIST digits."""
    labels: str | None = None
    """Classes of --data: `prefix` (of file names, up to the first underscore), FILE.csv (lines of name,class), or
    `none`. Default: what the data says, in a dataset.json, by subfolders or in arrays."""
    resize: int | None = None
    """Resize the images of --data: shorter side to so many pixels (Lanczos), then the centre square."""
    crop: int | None = None
    """Of each image of --data, resized or not, keep the centre square of so many pixels. Default: --resize."""
    num_samples: int = 10_000
    """Images sampled for each figure; 0 measures nothing."""
    feature_network: str | None = None
    """TorchScript file or package.module:name for the metrics. Default: the embedded digit classifier."""
    reference: str | None = None
    """EDM reference statistics (.npz with mu, sigma). Default: those of the data."""
    teacher_steps: int = 18
    """Heun steps of a teacher; N steps are 2 N - 1 evaluations. A generator takes one step."""
    seed: int = 0
    """Every random draw is a function of the seed and the iteration."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""

    def check(self) -> None:
        """Raises ValueError for a value that cannot be, naming the flag, what was expected and what came."""
        require(self, 1, "teacher_steps")
        require_seed(self)
        for name in ("labels", "resize", "crop"):
            if self.data is None and getattr(self, name) is not None:
                fail(self, name, "together with --data")
        require_choice(self.labels)
        Framing(self.resize, self.crop)
        if self.num_samples != 0 and self.num_samples < 2:
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
    adapter: tyro.conf.OmitArgPrefixes[TeacherOptions] = NO_OPTIONS
    out: Path | None = None
    """Run folder; must not hold a run yet. Default: runs/PRESET-DATE-TIME."""
    iterations: int = 1600
    """Guidance turns; one in dfake_gen_update_ratio of them comes with a generator turn."""
    batch_size: int = 48
    """Images per iteration."""
    dfake_gen_update_ratio: int = 2
    """Guidance turns per generator turn."""
    generator_lr: float = 6e-4
    """Learning rate of the generator's AdamW."""
    guidance_lr: float = 1.2e-3
    """Learning rate of the fake score's AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After warm-up: constant, or to zero along a cosine."""
    warmup_iterations: int = 50
    """Iterations over which both learning rates rise."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients of either network are clipped to this global norm."""
    ema_decay: float = 0.98
    """Decay of the average of the generator's weights, per generator update. The average is the result."""
    num_train_timesteps: int = 1000
    """Number of noise levels in the Karras schedule."""
    sigma_min: float = 0.002
    """Least noise level."""
    sigma_max: float = 80.0
    """Greatest noise level; at most that of the teacher's noise schedule, if it has one."""
    rho: float = 7.0
    """Exponent of the Karras schedule."""
    sigma_data: float | None = None
    """Standard deviation of the data in the fake score's loss weight. Default: the teacher's."""
    min_step_percent: float = 0.02
    """Distribution matching draws noise levels from this fraction of the schedule ..."""
    max_step_percent: float = 0.98
    """... to this one."""
    dynamics: Literal["edm", "flow"] | None = None
    """How noise levels are drawn and weighted: Karras et al.'s way, or flow matching's. Default: the teacher's."""
    time_mean: float = 0.0
    """Flow matching: mean of logit(t), from which noise levels are drawn."""
    time_std: float = 1.0
    """Flow matching: standard deviation of logit(t)."""
    conditioning_sigma: float | None = None
    """The noise level that the one-step generator starts from. Default: 80, or the end of the teacher's noise schedule
    if that is less; 1e6 in flow matching, where t = sigma / (1 + sigma) is 1 then."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """What the networks compute in; weights are kept in float32. auto: bf16 on a GPU, fp32 on a CPU."""
    execution: Literal["auto", "eager", "compiled", "captured"] = "auto"
    """How turns run. auto: captured (compiled networks, a CUDA graph per turn) on a GPU, eager on a CPU."""
    compile: Switch = False
    """Short for --execution compiled."""
    accumulation_steps: int = 1
    """Parts that a batch is processed in: less memory, the same gradient."""
    log_every: int = 50
    """Iterations between lines of metrics.jsonl."""
    snapshots: int = 10
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
        conditioning_sigma = self.conditioning_sigma or (1e6 if teacher.dynamics == "flow" else min(80.0, limit))
        sigma_data = self.sigma_data or teacher.sigma_data
        device = device or next(teacher.parameters()).device
        return dataclasses.replace(
            self, dynamics=teacher.dynamics, conditioning_sigma=conditioning_sigma, sigma_data=sigma_data,
            sigma_max=min(self.sigma_max, limit),
            precision=resolve_precision(self.precision, device),
            execution="compiled" if self.compile else resolve_execution(self.execution, device),
        )  # fmt: skip

    def check(self) -> None:
        super().check()
        require(self, 1, "iterations", "batch_size", "dfake_gen_update_ratio", "accumulation_steps")
        require(self, 1, "log_every", "snapshots")
        if self.batch_size % self.accumulation_steps:
            fail(self, "accumulation_steps", f"that divides --batch-size {self.batch_size}")
        require(self, 0, "warmup_iterations", "weight_decay")
        require(self, 2, "num_train_timesteps")
        if self.compile and self.execution not in ("auto", "compiled"):
            fail(self, "execution", "compiled with --compile")
        require_positive(self, "generator_lr", "guidance_lr", "max_grad_norm")
        require_positive(self, "sigma_min", "rho", "time_std")
        require_fraction(self, "ema_decay", "beta1", "beta2")
        require_positive(
            self, *(name for name in ("sigma_data", "conditioning_sigma") if getattr(self, name) is not None)
        )
        if not self.sigma_max > self.sigma_min:
            fail(self, "sigma_max", f"> --sigma-min {self.sigma_min}")
        if not 0 <= self.min_step_percent <= 1:
            fail(self, "min_step_percent", "in [0, 1]")
        if not self.min_step_percent <= self.max_step_percent <= 1:
            fail(self, "max_step_percent", f"between --min-step-percent {self.min_step_percent} and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationConfig):
    """Measure the samples of a generator (one step) or a teacher (Heun) against real images."""

    weights: tyro.conf.Positional[str]
    """Weight file of a generator or a teacher (.safetensors), or a teacher as `fastdmd.train --teacher` takes it."""
    adapter: tyro.conf.OmitArgPrefixes[TeacherOptions] = NO_OPTIONS
    out: Path | None = None
    """Where to write the figures as JSON, too."""

    def check(self) -> None:
        super().check()
        require(self, 2, "num_samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample images from a generator (one step) or a teacher (Heun)."""

    weights: tyro.conf.Positional[str]
    """Weight file of a generator or a teacher (.safetensors), or a teacher as `fastdmd.train --teacher` takes it."""
    adapter: tyro.conf.OmitArgPrefixes[TeacherOptions] = NO_OPTIONS
    out: Path = Path("samples.png")
    """A picture (.png), or images and labels as arrays (.npz)."""
    num: int = 64
    """Number of images."""
    labels: str | None = None
    """Class labels, separated by commas and repeated as needed. Default: all classes in turn."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 250
    """Images per forward pass; changes no image beyond rounding."""
    teacher_steps: int = 18
    """Heun steps of a teacher; N steps are 2 N - 1 evaluations. A generator takes one step."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""

    def check(self) -> None:
        require(self, 1, "num", "batch_size", "teacher_steps")
        require_seed(self)
        if self.out.suffix not in (".png", ".npz"):
            fail(self, "out", "ending in .png or .npz")


def fail(config: Any, name: str, expected: str) -> None:
    raise ValueError(f"expected --{name.replace('_', '-')} {expected}, got {getattr(config, name)}")


def require(config: Any, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            fail(config, name, f">= {least}")


def require_seed(config: Any) -> None:
    if not 0 <= config.seed < 2**32:
        fail(config, "seed", "in [0, 2^32)")


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            fail(config, name, "> 0 and finite")


def require_fraction(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            fail(config, name, "in [0, 1)")
