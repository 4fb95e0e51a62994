"""What a user can turn: the typed configuration of each command, its checks, and the presets."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastdmd.diffusion import Denoiser
from fastdmd.precision import resolve_execution, resolve_precision
from fastdmd.teachers import NO_OPTIONS, TeacherOptions
from fastdmd.unet_config import UNetConfig

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the samples of a network are measured; part of every command that measures."""

    data: str | None = None
    """Folder of IDX files, .npz, folder of images, or EDM dataset zip. Default: the embedded MNIST digits."""
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
        _require(self, 1, "teacher_steps")
        _require_seed(self)
        if self.num_samples != 0 and self.num_samples < 2:
            _fail(self, "num_samples", ">= 2, or 0 for no metrics")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(EvaluationConfig):
    """Distil a teacher into a one-step generator with DMD2."""

    preset: Literal["mnist", "mnist-reference"] = "mnist"
    """Origin of the defaults. `mnist` ends within ten minutes on two cores; `mnist-reference` has the settings of the
    published re-implementation."""
    teacher: str = "mnist"
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
    """Greatest noise level."""
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
    """The noise level that the one-step generator starts from. Default: 80, or 1e6 in flow matching, where t =
    sigma / (1 + sigma) is 1 then."""
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

    def for_teacher(self, teacher: Denoiser) -> TrainConfig:
        """With the defaults that depend on the teacher and its device filled in.

        Raises ValueError for other dynamics than its own, and for what the device cannot do.
        """
        if self.dynamics not in (None, teacher.dynamics):
            _fail(self, "dynamics", f"{teacher.dynamics}, as the teacher was trained")
        conditioning_sigma = self.conditioning_sigma or (1e6 if teacher.dynamics == "flow" else 80.0)
        sigma_data = self.sigma_data or teacher.sigma_data
        device = next(teacher.parameters()).device
        return dataclasses.replace(
            self, dynamics=teacher.dynamics, conditioning_sigma=conditioning_sigma, sigma_data=sigma_data,
            precision=resolve_precision(self.precision, device),
            execution="compiled" if self.compile else resolve_execution(self.execution, device),
        )  # fmt: skip

    def check(self) -> None:
        super().check()
        _require(self, 1, "iterations", "batch_size", "dfake_gen_update_ratio", "accumulation_steps")
        _require(self, 1, "log_every", "snapshots")
        if self.batch_size % self.accumulation_steps:
            _fail(self, "accumulation_steps", f"that divides --batch-size {self.batch_size}")
        _require(self, 0, "warmup_iterations", "weight_decay")
        _require(self, 2, "num_train_timesteps")
        if self.compile and self.execution not in ("auto", "compiled"):
            _fail(self, "execution", "compiled with --compile")
        _require_positive(self, "generator_lr", "guidance_lr", "max_grad_norm")
        _require_positive(self, "sigma_min", "rho", "time_std")
        _require_fraction(self, "ema_decay", "beta1", "beta2")
        _require_positive(
            self, *(name for name in ("sigma_data", "conditioning_sigma") if getattr(self, name) is not None)
        )
        if not self.sigma_max > self.sigma_min:
            _fail(self, "sigma_max", f"> --sigma-min {self.sigma_min}")
        if not 0 <= self.min_step_percent <= 1:
            _fail(self, "min_step_percent", "in [0, 1]")
        if not self.min_step_percent <= self.max_step_percent <= 1:
            _fail(self, "max_step_percent", f"between --min-step-percent {self.min_step_percent} and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(EvaluationConfig):
    """Train a teacher. The embedded MNIST teacher has these defaults, --label-emphasis 1.3 and
    --weights-dtype float16."""

    out: Path = Path("runs/teacher")
    """Run folder; must not hold a run yet."""
    init: str | None = None
    """Weight file of a teacher to go on from, or `mnist`: the embedded one. Its architecture overrules these flags."""
    iterations: int = 11_500
    """Number of optimizer updates."""
    batch_size: int = 128
    """Images per update."""
    learning_rate: float = 1.5e-3
    """Peak learning rate of AdamW; falls to zero along a cosine."""
    warmup_iterations: int = 300
    """Updates over which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    ema_decay: float = 0.999
    """Decay of the average of the weights, per update. The average is the teacher."""
    dynamics: Literal["edm", "flow"] = "edm"
    """EDM's preconditioning and objective, or flow matching's velocity, noise minus image."""
    sigma_mean: float = -0.2
    """Mean of ln(sigma) in training, which is logit(t) in flow matching."""
    sigma_std: float = 1.5
    """Standard deviation of ln(sigma) in training."""
    sigma_data: float = 0.5
    """Standard deviation of the data, as the preconditioning assumes it."""
    patch_size: int = 2
    """Pixels per side folded into channels before the first convolution."""
    model_channels: int = 48
    """Width that the multipliers refer to, and width of the noise embedding."""
    channel_multipliers: tuple[int, ...] = (1, 2)
    """Width at each resolution, finest first, in units of model_channels."""
    num_blocks: int = 1
    """Residual blocks at each resolution of the encoder."""
    attention_resolutions: tuple[int, ...] = (7,)
    """Feature-map sizes with self-attention."""
    channels_per_head: int = 0
    """Channels of an attention head; 0 means one head."""
    adaptive_scale: bool = True
    """Embeddings scale and shift normalised features (ADM); otherwise they are added (DDPM++)."""
    dropout: float = 0.0
    """Dropout probability inside residual blocks."""
    log_every: int = 100
    """Iterations between lines of metrics.jsonl."""
    snapshots: int = 10
    """How often, over the run, weights and samples are written."""
    label_emphasis: float = 1.0
    """After training, class embeddings move this much farther from their mean: classes more distinct, variety less."""
    weights_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the weights in the file; float16 halves it. What is measured is what the file holds."""
    dry_run: Switch = False
    """Print the resolved configuration and stop."""

    def check(self) -> None:
        super().check()
        _require(self, 1, "iterations", "batch_size", "log_every", "snapshots")
        _require(self, 0, "warmup_iterations", "weight_decay", "channels_per_head")
        _require_positive(self, "learning_rate", "max_grad_norm", "sigma_std", "sigma_data", "label_emphasis")
        _require_fraction(self, "ema_decay", "dropout")

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> UNetConfig:
        """The network for images `(C, H, W)`."""
        shared = {field.name for field in dataclasses.fields(UNetConfig)} & set(vars(self))
        architecture = {name: getattr(self, name) for name in shared}
        return UNetConfig(
            image_channels=image_shape[0], image_size=image_shape[1], num_classes=num_classes, **architecture
        )


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
        _require(self, 2, "num_samples")


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
        _require(self, 1, "num", "batch_size", "teacher_steps")
        _require_seed(self)
        if self.out.suffix not in (".png", ".npz"):
            _fail(self, "out", "ending in .png or .npz")


def _fail(config: Any, name: str, expected: str) -> None:
    raise ValueError(f"expected --{name.replace('_', '-')} {expected}, got {getattr(config, name)}")


def _require(config: Any, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            _fail(config, name, f">= {least}")


def _require_seed(config: Any) -> None:
    if not 0 <= config.seed < 2**32:
        _fail(config, "seed", "in [0, 2^32)")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            _fail(config, name, "> 0 and finite")


def _require_fraction(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            _fail(config, name, "in [0, 1)")


TRAIN_PRESETS = {
    "mnist": TrainConfig(),
    "mnist-reference": TrainConfig(
        preset="mnist-reference", iterations=20_000, batch_size=128, dfake_gen_update_ratio=10, generator_lr=2e-4,
        guidance_lr=2e-4, max_grad_norm=1.0, ema_decay=0.999, warmup_iterations=500, lr_schedule="constant",
    ),
}  # fmt: skip
