"""Any network as a denoiser: what its inputs and outputs mean, stated once, turned into D_x."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Integral
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastdmd import diffusion
from fastdmd.diffusion import per_sample
from fastdmd.settings import Suppress, above, arg, at_least

Parameterization = Literal["x0", "edm", "epsilon", "v", "flow"]
NoiseSchedule = Literal["linear", "scaled_linear", "cosine", "squaredcos_cap_v2"]
FLAGS = {"sigma_data": "teacher-sigma-data", "labels": "teacher-labels", "num_train_timesteps": "schedule-timesteps"}
Timesteps = Annotated[int | None, at_least(2, 10**6), arg(name=FLAGS["num_train_timesteps"])]
SCHEDULE_OPTIONS = ("noise_schedule", "num_train_timesteps", "beta_start", "beta_end", "alphas_cumprod", "timesteps")
FLOW_OPTIONS = ("velocity", "time_scale", "time_direction")
MAX_VALUES, MAX_CLASSES, MAX_TIMESTEPS = 1 << 26, 1 << 20, 1 << 20  # of an image; far above any network in use
LEAST_ALPHAS_CUMPROD = 2.0**-24  # a schedule that ends in pure noise has 0 there, an infinite sigma


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """A teacher that is not fastdmd's: what its network takes and gives. README, 'Your own teacher', has the table."""

    parameterization: Parameterization | None = None
    """What the network gives: x0, the image; edm, F_x of Karras et al.; epsilon, the noise; v; flow, a velocity."""
    image_shape: Annotated[tuple[int, int, int] | None, at_least(1, 2**14)] = None
    """Channels, height, width. Default: the network's image_shape, or img_channels and img_resolution."""
    num_classes: Annotated[int | None, at_least(0, 2**20)] = None
    """0: no labels. Default: the network's num_classes or label_dim."""
    labels: Annotated[Literal["int", "one_hot", "none"] | None, arg(name=FLAGS["labels"])] = None
    """How it takes labels. Default: int, or one_hot where it has a label_dim."""
    sigma_data: Annotated[float | None, above(0, 1e6), arg(name=FLAGS["sigma_data"])] = None
    """Standard deviation of its data. Default: the network's sigma_data; without that 0.5, but for edm."""
    noise_schedule: NoiseSchedule | None = None
    """DDPM's, from sigma to timestep. Default for epsilon and v: linear. With x0, the network takes timesteps, too."""
    num_train_timesteps: Timesteps = None
    """Timesteps of the noise schedule. Default: 1000."""
    beta_start: Annotated[float | None, above(0, 1)] = None
    """First beta. Default: 1e-4, or 0.00085 for scaled_linear."""
    beta_end: Annotated[float | None, above(0, 1)] = None
    """Last beta. Default: 0.02, or 0.012 for scaled_linear."""
    alphas_cumprod: Annotated[tuple[float, ...] | None, Suppress] = None
    """The noise schedule itself, instead of its name."""
    timesteps: Literal["fractional", "integer"] | None = None
    """Whether timesteps between two integers are rounded. Default: fractional."""
    velocity: Literal["noise-image", "image-noise"] | None = None
    """Flow: the sign of the velocity. Default: noise-image, noise minus image."""
    time_scale: Annotated[float | None, above(0, 1e9)] = None
    """Flow: what the time in [0, 1] is multiplied with for the network. Default: 1."""
    time_direction: Literal["to-noise", "to-image"] | None = None
    """Flow: whether the time that the network takes is 0 for images or for noise. Default: to-noise, 0 for images."""

    def __post_init__(self):
        for name in ("image_shape", "alphas_cumprod"):  # JSON turns tuples into lists
            if (value := getattr(self, name)) is not None:
                values = value.tolist() if isinstance(value, Tensor) else value
                object.__setattr__(self, name, tuple(values))

    def given(self) -> dict[str, Any]:
        """What is not left to its default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def resolve(self, network: nn.Module) -> AdapterOptions:
        """With every default that applies filled in, some from the network's attributes.

        Raises ValueError for what is missing, contradicts itself or does not apply, naming the flag.
        """
        _expect_choices(self)
        kind = self.parameterization
        found = dataclasses.asdict(self) | _shape_and_labels(self, network)
        if found["sigma_data"] is None:
            found["sigma_data"] = getattr(network, "sigma_data", None if kind == "edm" else 0.5)
        if found["sigma_data"] is None:
            raise _missing("teacher-sigma-data", "sigma_data", network)
        found["sigma_data"] = float(found["sigma_data"])
        if not 0 < found["sigma_data"] < math.inf:
            raise _error("--teacher-sigma-data > 0 and finite", found["sigma_data"])

        applicable, context = _applicable(self)
        for name in (*SCHEDULE_OPTIONS, *FLOW_OPTIONS):
            if name not in applicable and found[name] is not None:
                if name == "alphas_cumprod":  # which has no flag, and a thousand numbers
                    raise _error(f"no noise schedule of the network's own with {context}", f"{len(found[name])} {name}")
                raise _error(f"no {flag(name)} with {context}", found[name])
        found |= {name: default for name, default in applicable.items() if found[name] is None}
        if (length := found["num_train_timesteps"]) is not None and not 2 <= length <= MAX_TIMESTEPS:
            raise _error(f"--schedule-timesteps from 2 to {MAX_TIMESTEPS}", length)
        if kind == "flow" and not 0 < found["time_scale"] < math.inf:
            raise _error("--time-scale > 0 and finite", found["time_scale"])
        return AdapterOptions(**{field.name: found[field.name] for field in dataclasses.fields(AdapterOptions)})


class Adapted(nn.Module):
    """A denoiser `D(x, sigma, class_labels) -> D_x` around any network; see `diffusion.Denoiser`.

    `D_x = c_skip * x + c_out * network(c_in * x, level, labels)`, where `options`, those of `AdapterOptions`, say what
    the network takes and gives. Without classes it is called with two arguments. An output with the attribute `sample`
    stands for that tensor. Where its weights are of less precision than x, it runs under `torch.autocast`.

    The network is taken over, not copied. What it trains, it trains; parameters that it holds fixed beside others
    that it trains (`requires_grad=False`) become buffers, which no optimizer moves. Buffers of a trained copy are
    the teacher's: all copies are in eval mode, in which running statistics stay as they are. `sigma_max` is the
    greatest level of its noise schedule, above which nobody has trained it.

    `origin` says how a weight file's reader can make the network again: `{"source": "package.module:name"}`, or
    `{"diffusers": config}`.
    """

    is_one_graph = False  # what others wrote may break it

    def __init__(self, network: nn.Module, *, origin: Mapping[str, Any] | None = None, **options: Any):
        super().__init__()
        self.options = AdapterOptions(**options).resolve(network)
        self.origin = dict(origin or {"source": f"{type(network).__module__}:{type(network).__qualname__}"})
        self.image_shape, self.num_classes = self.options.image_shape, self.options.num_classes
        self.sigma_data, self.parameterization = self.options.sigma_data, self.options.parameterization
        self.dynamics = "flow" if self.parameterization == "flow" else "edm"
        if self.parameterization == "x0" and getattr(network, "dynamics", None) == "flow":
            self.dynamics = "flow"
        if next(network.parameters(), None) is None:
            raise _error("a network with parameters", f"a {type(network).__name__} without")
        _keep_fixed_what_is_fixed(network)
        for parameter in network.parameters():  # a slice of a larger tensor has strides that no copy of it has
            if parameter.stride() != torch.empty_like(parameter).stride():
                parameter.data = parameter.data.clone()
        self.network = network
        ln_sigmas = _ln_sigmas(self.options)
        self.sigma_max = math.inf if ln_sigmas is None else ln_sigmas[-1].exp().item()
        if ln_sigmas is not None:
            ln_sigmas = ln_sigmas.to(next(network.parameters()).device)
        self.register_buffer("ln_sigmas", ln_sigmas, persistent=False)  # [num_train_timesteps]

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in, level = self.coefficients(sigma)
        output = self.raw(x if c_in is None else per_sample(c_in) * x, level, class_labels)
        if self.parameterization == "x0":
            return output.to(x.dtype)
        return per_sample(c_skip) * x + per_sample(c_out) * output

    def coefficients(self, sigma: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """`c_skip, c_out, c_in` and the noise level as the network takes it, each `[B]`; None where there is none.

        With `alpha = 1 / sqrt(1 + sigma^2)`, the variance preserving `x_vp = alpha x` is `alpha image + alpha sigma
        noise` (Song et al. 2021). From there `D_x = x - sigma epsilon` (Ho et al. 2020), and for
        `v = alpha noise - alpha sigma image` `D_x = alpha x_vp - alpha sigma v` (Salimans & Ho 2022).
        """
        if self.parameterization == "edm":
            return diffusion.preconditioning(sigma, self.sigma_data)
        if self.parameterization == "flow":
            c_skip, c_out, c_in, t = diffusion.velocity_preconditioning(sigma)
            if self.options.velocity == "image-noise":
                c_out = -c_out
            if self.options.time_direction == "to-image":
                t = c_in  # 1 - t, without cancellation
            return c_skip, c_out, c_in, self.options.time_scale * t
        if self.ln_sigmas is None:  # x0 of the unscaled x
            return None, None, None, sigma
        alpha, level = (1 + sigma**2).rsqrt(), self.timestep(sigma)
        if self.parameterization == "v":
            return alpha**2, -sigma * alpha, alpha, level
        return torch.ones_like(sigma), -sigma, alpha, level  # of epsilon; x0 has the inputs only

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of each sigma, linear in ln(sigma) between two, the first or last one beyond them, `[B]`."""
        nodes, ln_sigma = self.ln_sigmas.to(sigma.dtype), sigma.log()
        above = torch.searchsorted(nodes, ln_sigma).clamp(1, len(nodes) - 1)
        below = above - 1
        fraction = (ln_sigma - nodes[below]) / (nodes[above] - nodes[below])
        timestep = below + fraction.clamp(0, 1)
        return timestep.round().long() if self.options.timesteps == "integer" else timestep

    def raw(self, x: Tensor, level: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """What the network gives for its own inputs. Raises ValueError if that is not a tensor like x."""
        arguments = (x, level) if self.options.labels == "none" else (x, level, self._labels(class_labels, x.dtype))
        dtype = next(self.network.parameters()).dtype
        if dtype.itemsize < x.dtype.itemsize:
            with torch.autocast(x.device.type, dtype=dtype, cache_enabled=False):
                output = self.network(*arguments)
        else:
            output = self.network(*arguments)
        output = output if isinstance(output, Tensor) else getattr(output, "sample", output)
        if not isinstance(output, Tensor) or output.shape != x.shape or not output.is_floating_point():
            is_tensor = isinstance(output, Tensor)
            got = f"{tuple(output.shape)} of {output.dtype}" if is_tensor else f"a {type(output).__name__}"
            raise _error(f"the network to give a floating point tensor of shape {tuple(x.shape)}", got)
        return output

    def describe(self) -> dict[str, Any]:
        """How to make this denoiser again, as JSON can hold it; a weight file's `network`."""
        return {**self.origin, "options": self.options.given()}

    def _labels(self, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """int64 `[B]` or one-hot `[B, num_classes]`, whichever the network takes, from either."""
        if class_labels is None:
            raise ValueError(f"fastdmd.Adapted: expected class_labels for {self.num_classes} classes, got None")
        if self.options.labels == "int":
            return class_labels if class_labels.dim() == 1 else class_labels.argmax(dim=1)
        if class_labels.dim() == 1:
            class_labels = class_labels[:, None] == torch.arange(self.num_classes, device=class_labels.device)
        return class_labels.to(dtype)


def flag(name: str) -> str:
    """The flag of an option."""
    name = FLAGS.get(name, name)
    return f"--{name.replace('_', '-')}"


def _shape_and_labels(options: AdapterOptions, network: nn.Module) -> dict[str, Any]:
    """image_shape, num_classes and labels, from the options or else the network's attributes."""
    shape, num_classes, labels = options.image_shape, options.num_classes, options.labels
    if shape is None:
        shape = getattr(network, "image_shape", None)
    if shape is None and hasattr(network, "img_channels") and hasattr(network, "img_resolution"):
        shape = (network.img_channels, network.img_resolution, network.img_resolution)
    if shape is None:
        raise _missing("image-shape", "image_shape", network)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise _error("--image-shape C H W", tuple(shape))
    if math.prod(shape) > MAX_VALUES:
        raise _error(f"--image-shape of at most {MAX_VALUES} values", tuple(shape))
    if num_classes is None:
        if labels == "none":
            num_classes = 0
        else:
            num_classes = getattr(network, "num_classes", getattr(network, "label_dim", None))
    if num_classes is None:
        raise _missing("num-classes", "num_classes", network)
    if not isinstance(num_classes, Integral) or num_classes > MAX_CLASSES:
        raise _error(f"--num-classes to be a whole number of at most {MAX_CLASSES}", f"{num_classes!r:.80}")
    if num_classes < 0 or (num_classes > 0) != (labels != "none") and labels is not None:
        raise _error(
            "--num-classes > 0 with --teacher-labels int or one_hot, 0 with none", f"{num_classes} and {labels}"
        )
    if labels is None:
        labels = "none" if num_classes == 0 else "one_hot" if hasattr(network, "label_dim") else "int"
    return {"image_shape": tuple(shape), "num_classes": int(num_classes), "labels": labels}


def _applicable(options: AdapterOptions) -> tuple[dict[str, Any], str]:
    """Those of SCHEDULE_OPTIONS and FLOW_OPTIONS that apply, with their defaults, and what that depends on."""
    kind = options.parameterization
    context = f"--parameterization {kind}"
    if kind == "flow":
        return {"velocity": "noise-image", "time_scale": 1.0, "time_direction": "to-noise"}, context
    if kind == "edm":
        return {}, context
    if options.alphas_cumprod is not None:
        return {"alphas_cumprod": None, "timesteps": "fractional"}, "alphas_cumprod"
    name = options.noise_schedule or (None if kind == "x0" else "linear")
    if name is None:
        return {}, f"{context} and no noise schedule"
    defaults = {"noise_schedule": name, "num_train_timesteps": 1000, "timesteps": "fractional"}
    defaults |= dict(zip(("beta_start", "beta_end"), diffusion.DDPM_BETAS.get(name, ()), strict=False))
    return defaults, f"--noise-schedule {name}"


def _ln_sigmas(options: AdapterOptions) -> Tensor | None:
    """ln(sigma) of every timestep, ascending, float32; None without a noise schedule."""
    if options.alphas_cumprod is not None:
        abar = torch.tensor(options.alphas_cumprod, dtype=torch.float64)
        if len(abar) < 2 or not (0 <= abar[-1] and abar[0] < 1 and (abar.diff() < 0).all()):
            got = f"{len(abar)} values from {abar[0]:.6g} to {abar[-1]:.6g}" if len(abar) else "none"
            raise _error("alphas_cumprod that fall, from less than 1 to 0 at least", got)
    elif options.noise_schedule is not None:
        abar = diffusion.ddpm_alphas_cumprod(
            options.noise_schedule, options.num_train_timesteps, beta_start=options.beta_start,
            beta_end=options.beta_end,
        )  # fmt: skip
    else:
        return None
    abar = abar.clamp(min=LEAST_ALPHAS_CUMPROD)
    return (((1 - abar).log() - abar.log()) / 2).float()


def _keep_fixed_what_is_fixed(network: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in network.parameters()):
        return  # frozen as a whole, as a teacher is
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)


def _expect_choices(options: AdapterOptions) -> None:
    choices = {
        "parameterization": get_args(Parameterization), "noise_schedule": get_args(NoiseSchedule),
        "labels": ("int", "one_hot", "none"), "timesteps": ("fractional", "integer"),
        "velocity": ("noise-image", "image-noise"), "time_direction": ("to-noise", "to-image"),
    }  # fmt: skip
    for name, allowed in choices.items():
        value = getattr(options, name)
        if value not in allowed and (value is not None or name == "parameterization"):
            raise _error(f"{flag(name)} out of {', '.join(allowed)}", value)


def _missing(flag: str, attribute: str, network: nn.Module) -> ValueError:
    return _error(f"--{flag} for a network without the attribute {attribute}", f"none for {type(network).__name__}")


def _error(expected: str, got: object) -> ValueError:
    return ValueError(f"fastdmd.Adapted: expected {expected}, got {got}")
