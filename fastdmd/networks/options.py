"""How a foreign network is taken: what is said of it, and what that and the network itself come to."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from torch import nn

from fastdmd import diffusion
from fastdmd.diffusion import NoiseSchedule
from fastdmd.settings import Input, Suppress, Switch, above, arg, at_least

Parameterization = Literal["x0", "edm", "epsilon", "v", "flow"]
Labels = Literal["int", "one_hot", "none"]
Timesteps = Literal["fractional", "integer"]
Velocity = Literal["noise-image", "image-noise"]
TimeDirection = Literal["to-noise", "to-image"]
CHOICES = {
    "parameterization": get_args(Parameterization),
    "noise_schedule": get_args(NoiseSchedule),
    "labels": get_args(Labels),
    "timesteps": get_args(Timesteps),
    "velocity": get_args(Velocity),
    "time_direction": get_args(TimeDirection),
}
FLAGS = {  # of options that are not called by their own names
    "sigma_data": "teacher-sigma-data",
    "labels": "teacher-labels",
    "num_train_timesteps": "schedule-timesteps",
    "weights": "teacher-weights",
}
SCHEDULE_OPTIONS = ("noise_schedule", "num_train_timesteps", "beta_start", "beta_end", "alphas_cumprod", "timesteps")
FLOW_OPTIONS = ("velocity", "time_scale", "time_direction")
MAX_VALUES = 1 << 26  # of an image; like the next two far above any network in use
MAX_CLASSES = 1 << 20
MAX_STEPS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What a network that is not fastdmd's takes and gives, as far as it is said; `Adapted` takes it so."""

    parameterization: Parameterization | None = None
    """What the network gives: x0, the image; edm, F_x of Karras et al.; epsilon, the noise; v; flow, a velocity."""
    image_shape: Annotated[tuple[int, int, int] | None, at_least(1, 2**14)] = None
    """Channels, height, width. Default: the network's image_shape, or img_channels and img_resolution."""
    num_classes: Annotated[int | None, at_least(0, MAX_CLASSES)] = None
    """0: no labels. Default: the network's num_classes or label_dim."""
    labels: Annotated[Labels | None, arg(name=FLAGS["labels"])] = None
    """How it takes labels. Default: int, or one_hot where it has a label_dim."""
    sigma_data: Annotated[float | None, above(0, 1e6), arg(name=FLAGS["sigma_data"])] = None
    """Standard deviation of its data. Default: the network's sigma_data; without that 0.5, but for edm."""
    noise_schedule: NoiseSchedule | None = None
    """DDPM's, from sigma to timestep. Default for epsilon and v: linear. With x0, the network takes timesteps, too."""
    num_train_timesteps: Annotated[int | None, at_least(2, MAX_STEPS), arg(name=FLAGS["num_train_timesteps"])] = None
    """Timesteps of the noise schedule. Default: 1000."""
    beta_start: Annotated[float | None, above(0, 1)] = None
    """First beta. Default: 1e-4, or 0.00085 for scaled_linear."""
    beta_end: Annotated[float | None, above(0, 1)] = None
    """Last beta. Default: 0.02, or 0.012 for scaled_linear."""
    alphas_cumprod: Annotated[tuple[float, ...] | None, Suppress] = None
    """The noise schedule itself, instead of its name."""
    timesteps: Timesteps | None = None
    """Whether timesteps between two integers are rounded. Default: fractional."""
    velocity: Velocity | None = None
    """Flow: the sign of the velocity. Default: noise-image, noise minus image."""
    time_scale: Annotated[float | None, above(0, 1e9)] = None
    """Flow: what the time in [0, 1] is multiplied with for the network. Default: 1."""
    time_direction: TimeDirection | None = None
    """Flow: whether the time that the network takes is 0 for images or for noise. Default: to-noise, 0 for images."""

    def __post_init__(self) -> None:
        for name in ("image_shape", "alphas_cumprod"):  # JSON turns tuples into lists
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value.tolist() if hasattr(value, "tolist") else value))

    def given(self) -> dict[str, Any]:
        """What is said of the network, and not left to a default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(AdapterOptions)}
        return {name: value for name, value in values.items() if value is not None}

    def resolve(self, network: nn.Module) -> Interface:
        """What these options come to for a network, whose attributes fill in some.

        Raises ValueError for what is missing, contradicts itself or does not apply, naming the flag.
        """
        kind = self.parameterization
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in (None, *choices) or name == "parameterization" and value is None:
                raise _error(f"{flag(name)} out of {', '.join(choices)}", value)
        image_shape = _image_shape(self.image_shape, network)
        num_classes, labels = _classes(self, network)
        stated = {
            "parameterization": kind,
            "image_shape": image_shape,
            "num_classes": num_classes,
            "labels": labels,
            "sigma_data": _sigma_data(self, network),
            **_levels(self),
        }
        alphas_cumprod = _alphas_cumprod(stated)
        known = {field.name for field in dataclasses.fields(Interface)} & stated.keys()
        values = {name: stated[name] for name in known} | {"alphas_cumprod": alphas_cumprod}
        return Interface(**values, stated=stated)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions(AdapterOptions):
    """How a teacher that is not fastdmd's is taken. docs/own-teacher.md has the tables."""

    weights: Annotated[Path | None, Input, arg(name=FLAGS["weights"])] = None
    """State of a teacher given as package.module:name: .safetensors, or .pt without code. Default: as the code made
    it."""
    weights_key: str | None = None
    """The entry of --teacher-weights that holds the state, where several could: ema, state_dict.model."""
    network: Annotated[str | None, Input] = None
    """package.module:name of the network in a weight file of fastdmd, where that is not fastdmd's own."""
    accelerate: Switch = True
    """Networks that are not fastdmd's compute with fastdmd's ops, as far as that was seen to give the same; with this
    flag they stay as they are."""


NO_OPTIONS = TeacherOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interface:
    """What one network takes and gives, nothing left open; `AdapterOptions.resolve` makes it."""

    parameterization: Parameterization
    image_shape: tuple[int, int, int]
    num_classes: int  # 0: it takes no labels
    labels: Labels
    sigma_data: float
    alphas_cumprod: tuple[float, ...]  # of its noise schedule, by timestep; none: it takes no timesteps
    timesteps: Timesteps = "fractional"
    velocity: Velocity = "noise-image"
    time_scale: float = 1.0
    time_direction: TimeDirection = "to-noise"
    stated: Mapping[str, Any]  # the options that applied, by name: what makes it again, as weight files hold it


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{FLAGS.get(name, name).replace('_', '-')}"


def _image_shape(shape: tuple[int, ...] | None, network: nn.Module) -> tuple[int, int, int]:
    if shape is None:
        shape = getattr(network, "image_shape", None)
    if shape is None and hasattr(network, "img_channels") and hasattr(network, "img_resolution"):
        channels: Any = network.img_channels
        size: Any = network.img_resolution
        shape = (channels, size, size)
    if shape is None:
        raise _missing("image_shape", network)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise _error("--image-shape C H W", tuple(shape))
    if math.prod(shape) > MAX_VALUES:
        raise _error(f"--image-shape of at most {MAX_VALUES} values", tuple(shape))
    C, H, W = shape
    return C, H, W


def _classes(options: AdapterOptions, network: nn.Module) -> tuple[int, Labels]:
    """How many there are, and how the network takes them."""
    num_classes, labels = options.num_classes, options.labels
    if num_classes is None:
        own = getattr(network, "num_classes", getattr(network, "label_dim", None))
        num_classes = 0 if labels == "none" else own
    if num_classes is None:
        raise _missing("num_classes", network)
    if not isinstance(num_classes, Integral) or num_classes > MAX_CLASSES:
        raise _error(f"--num-classes to be a whole number of at most {MAX_CLASSES}", f"{num_classes!r:.80}")
    if num_classes < 0 or (num_classes > 0) != (labels != "none") and labels is not None:
        raise _error(
            "--num-classes > 0 with --teacher-labels int or one_hot, 0 with none", f"{num_classes} and {labels}"
        )
    if labels is None:
        labels = "none" if num_classes == 0 else "one_hot" if hasattr(network, "label_dim") else "int"
    return int(num_classes), labels


def _sigma_data(options: AdapterOptions, network: nn.Module) -> float:
    sigma_data = options.sigma_data
    if sigma_data is None:
        sigma_data = getattr(network, "sigma_data", None if options.parameterization == "edm" else 0.5)
    if sigma_data is None:
        raise _missing("sigma_data", network)
    if not 0 < (sigma_data := float(sigma_data)) < math.inf:
        raise _error("--teacher-sigma-data > 0 and finite", sigma_data)
    return sigma_data


def _levels(options: AdapterOptions) -> dict[str, Any]:
    """Those of SCHEDULE_OPTIONS and FLOW_OPTIONS that apply, as given or by default."""
    defaults, context = _applicable(options)
    given = options.given()
    for name in (*SCHEDULE_OPTIONS, *FLOW_OPTIONS):
        if name in given and name not in defaults:
            if name == "alphas_cumprod":  # which has no flag, and a thousand numbers
                raise _error(f"no noise schedule of the network's own with {context}", f"{len(given[name])} {name}")
            raise _error(f"no {flag(name)} with {context}", given[name])
    levels = {name: given.get(name, default) for name, default in defaults.items()}
    if not 2 <= levels.get("num_train_timesteps", 2) <= MAX_STEPS:
        raise _error(f"--schedule-timesteps from 2 to {MAX_STEPS}", levels["num_train_timesteps"])
    if not 0 < levels.get("time_scale", 1) < math.inf:
        raise _error("--time-scale > 0 and finite", levels["time_scale"])
    return levels


def _applicable(options: AdapterOptions) -> tuple[dict[str, Any], str]:
    """Those of SCHEDULE_OPTIONS and FLOW_OPTIONS that apply, with their defaults, and what that depends on."""
    kind = options.parameterization
    context = f"--parameterization {kind}"
    if kind == "flow":
        return {"velocity": "noise-image", "time_scale": 1.0, "time_direction": "to-noise"}, context
    if kind == "edm":
        return {}, context
    if options.alphas_cumprod is not None:
        return {"alphas_cumprod": options.alphas_cumprod, "timesteps": "fractional"}, "alphas_cumprod"
    name = options.noise_schedule or (None if kind == "x0" else "linear")
    if name is None:
        return {}, f"{context} and no noise schedule"
    defaults: dict[str, Any] = {"noise_schedule": name, "num_train_timesteps": 1000, "timesteps": "fractional"}
    if name in diffusion.DDPM_BETAS:
        defaults["beta_start"], defaults["beta_end"] = diffusion.DDPM_BETAS[name]
    return defaults, f"--noise-schedule {name}"


def _alphas_cumprod(stated: Mapping[str, Any]) -> tuple[float, ...]:
    """Of the noise schedule that is stated, by its numbers or its name; none without one."""
    if "noise_schedule" in stated:
        ends = {name: stated[name] for name in ("beta_start", "beta_end") if name in stated}
        return tuple(
            diffusion.ddpm_alphas_cumprod(stated["noise_schedule"], stated["num_train_timesteps"], **ends).tolist()
        )
    if "alphas_cumprod" not in stated:
        return ()
    alphas = tuple(map(float, stated["alphas_cumprod"]))
    falls = len(alphas) >= 2 and all(before > after for before, after in itertools.pairwise(alphas))
    if not falls or not (0 <= alphas[-1] and alphas[0] < 1):
        got = f"{len(alphas)} values from {alphas[0]:.6g} to {alphas[-1]:.6g}" if alphas else "none"
        raise _error("alphas_cumprod that fall, from less than 1 to 0 at least", got)
    return alphas


def _missing(name: str, network: nn.Module) -> ValueError:
    return _error(f"{flag(name)} for a network without the attribute {name}", f"none for {type(network).__name__}")


def _error(expected: str, got: object) -> ValueError:
    return ValueError(f"fastdmd.Adapted: expected {expected}, got {got}")
