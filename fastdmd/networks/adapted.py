"""Any network as a denoiser: what its inputs and outputs mean, stated once, turned into D_x."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd import diffusion
from fastdmd.diffusion import DenoisingNetwork, per_sample
from fastdmd.networks.options import AdapterOptions

LEAST_ALPHAS_CUMPROD = 2.0**-24  # a schedule that ends in pure noise has 0 there, an infinite sigma


class Adapted(DenoisingNetwork):
    """A denoiser `D(x, sigma, class_labels) -> D_x` around any network; see `diffusion.Denoiser`.

    `D_x = c_skip * x + c_out * network(c_in * x, level, labels)`, where `interface`, what the options of
    `AdapterOptions` come to, says what the network takes and gives. Without classes it is called with two arguments. An
    output with the attribute `sample` stands for that tensor. Where its weights are of less precision than x, it runs
    under `torch.autocast`.

    The network is taken over, not copied. What it trains, it trains; parameters that it holds fixed beside others
    that it trains (`requires_grad=False`) become buffers, which no optimizer moves. Buffers of a trained copy are
    the teacher's: all copies are in eval mode, in which running statistics stay as they are. `sigma_max` is the
    greatest level of its noise schedule, above which nobody has trained it.

    `with_features` needs a module with `feature_shape`, (C, h, w), and `features(x, level, labels)`, which takes what
    it is called with itself and gives its encoder's features, `[B, C, h, w]`. `level_embedding` is the module's own, if
    it has one, or the `time_embedding` of a network of diffusers.

    `origin` says how a weight file's reader can make the network again: `{"source": "package.module:name"}`, or
    `{"diffusers": config}`.
    """

    is_one_graph = False  # what others wrote may break it
    ln_sigmas: Tensor  # [num_train_timesteps], ascending; none without a noise schedule
    gathered_dtype: torch.dtype | None = None  # of parameters, where processes share them (`Sharding.cut_`)

    def __init__(self, network: nn.Module, *, origin: Mapping[str, Any] | None = None, **options: Any):
        super().__init__()
        self.interface = AdapterOptions(**options).resolve(network)
        self.origin = dict(origin or {"source": f"{type(network).__module__}:{type(network).__qualname__}"})
        self.image_shape = self.interface.image_shape
        self.num_classes = self.interface.num_classes
        self.sigma_data = self.interface.sigma_data
        self.parameterization = self.interface.parameterization
        self.dynamics = "flow" if self.parameterization == "flow" else "edm"
        if self.parameterization == "x0" and getattr(network, "dynamics", None) == "flow":
            self.dynamics = "flow"
        self.is_scaled = self.parameterization != "x0" or len(self.interface.alphas_cumprod) > 0
        if next(network.parameters(), None) is None:
            raise _error("a network with parameters", f"a {type(network).__name__} without")
        self.fixed_names = _keep_fixed_what_is_fixed(network)
        for parameter in network.parameters():  # a slice of a larger tensor has strides that no copy of it has
            if parameter.stride() != torch.empty_like(parameter).stride():
                parameter.data = parameter.data.clone()
        self.network = network
        self.feature_shape = _feature_shape(network)
        self.foreign_name = type(network).__name__
        ln_sigmas = _ln_sigmas(self.interface.alphas_cumprod)
        self.sigma_max = ln_sigmas[-1].exp().item() if len(ln_sigmas) else math.inf
        self.register_buffer("ln_sigmas", ln_sigmas.to(next(network.parameters()).device), persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what was pickled whole when options were kept in place of the interface, too."""
        super().__setstate__(state)
        if (options := vars(self).pop("options", None)) is not None:
            self.interface = options.resolve(self.network)
            self.is_scaled = self.parameterization != "x0" or len(self.interface.alphas_cumprod) > 0
            self.foreign_name = type(self.network).__name__
            if self.ln_sigmas is None:
                self.ln_sigmas = torch.empty(0, device=next(self.network.parameters()).device)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in, level = self.coefficients(sigma)
        output = self.raw(per_sample(c_in) * x if self.is_scaled else x, level, class_labels)
        if self.parameterization == "x0":
            return output.to(x.dtype)
        return per_sample(c_skip) * x + per_sample(c_out) * output

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`c_skip, c_out, c_in` and the noise level as the network takes it, each `[B]`.

        With `alpha = 1 / sqrt(1 + sigma^2)`, the variance preserving `x_vp = alpha x` is `alpha image + alpha sigma
        noise` (Song et al. 2021). From there `D_x = x - sigma epsilon` (Ho et al. 2020), and for
        `v = alpha noise - alpha sigma image` `D_x = alpha x_vp - alpha sigma v` (Salimans & Ho 2022).
        """
        if self.parameterization == "edm":
            return diffusion.preconditioning(sigma, self.sigma_data)
        if self.parameterization == "flow":
            c_skip, c_out, c_in, t = diffusion.velocity_preconditioning(sigma)
            if self.interface.velocity == "image-noise":
                c_out = -c_out
            if self.interface.time_direction == "to-image":
                t = c_in  # 1 - t, without cancellation
            return c_skip, c_out, c_in, self.interface.time_scale * t
        zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
        if not self.is_scaled:
            return zero, one, one, sigma
        alpha = (1 + sigma**2).rsqrt()
        timestep = self.timestep(sigma)
        if self.parameterization == "x0":
            return zero, one, alpha, timestep
        if self.parameterization == "v":
            return alpha**2, -sigma * alpha, alpha, timestep
        return one, -sigma, alpha, timestep  # of epsilon

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of each sigma, linear in ln(sigma) between two, the first or last one beyond them, `[B]`."""
        nodes, ln_sigma = self.ln_sigmas.to(sigma.dtype), sigma.log()
        above = (nodes < ln_sigma[..., None]).sum(dim=-1).clamp(1, len(nodes) - 1)  # ONNX has no searchsorted
        below = above - 1
        fraction = (ln_sigma - nodes[below]) / (nodes[above] - nodes[below])
        timestep = below + fraction.clamp(0, 1)
        return timestep.round().long() if self.interface.timesteps == "integer" else timestep

    def raw(self, x: Tensor, level: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """What the network gives for its own inputs. Raises ValueError if that is not a tensor like x."""
        output = self._call(self.network, x, level, class_labels)
        output = output if isinstance(output, Tensor) else getattr(output, "sample", output)
        return _require(output, tuple(x.shape), "the network")

    def with_features(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, num_denoised: int
    ) -> tuple[Tensor, Tensor]:
        """See `DenoisingNetwork.with_features`; the encoder runs once more for what is denoised."""
        shape, rows = self.require_features(), slice(num_denoised)
        labels = None if class_labels is None else class_labels[rows]
        D_x = self(x[rows], sigma[rows], labels) if num_denoised else x.new_empty((0, *x.shape[1:]))
        _, _, c_in, level = self.coefficients(sigma)
        scaled = per_sample(c_in) * x if self.is_scaled else x
        features = self._call(self.network.features, scaled, level, class_labels)  # type: ignore[arg-type]
        return D_x, _require(features, (len(x), *shape), "features(x, level, labels)")

    def _call(self, function: Callable[..., Any], x: Tensor, level: Tensor, class_labels: Tensor | None) -> Any:
        arguments = (x, level) if self.interface.labels == "none" else (x, level, self._labels(class_labels, x.dtype))
        dtype = self.gathered_dtype or next(self.network.parameters()).dtype
        if dtype.itemsize < x.dtype.itemsize:
            with torch.autocast(x.device.type, dtype=dtype, cache_enabled=False):
                return function(*arguments)
        return function(*arguments)

    @property
    def level_embedding(self) -> nn.Module | None:
        found = getattr(self.network, "level_embedding", None)
        if found is None and any(base.__module__.startswith("diffusers.") for base in type(self.network).__mro__):
            found = getattr(self.network, "time_embedding", None)
        return found if isinstance(found, nn.Module) else None

    @property
    def inner(self) -> nn.Module:
        return self.network

    def describe(self) -> dict[str, Any]:
        return {**self.origin, "options": dict(self.interface.stated)}

    def _labels(self, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """int64 `[B]` or one-hot `[B, num_classes]`, whichever the network takes, from either."""
        if class_labels is None:
            raise ValueError(f"fastdmd.Adapted: expected class_labels for {self.num_classes} classes, got None")
        if self.interface.labels == "int":
            return class_labels if class_labels.dim() == 1 else class_labels.argmax(dim=1)
        if class_labels.dim() == 1:
            class_labels = class_labels[:, None] == torch.arange(self.num_classes, device=class_labels.device)
        return class_labels.to(dtype)


def _ln_sigmas(alphas_cumprod: tuple[float, ...]) -> Tensor:
    """ln(sigma) of every timestep, ascending, float32."""
    abar = torch.tensor(alphas_cumprod, dtype=torch.float64).clamp(min=LEAST_ALPHAS_CUMPROD)
    return (((1 - abar).log() - abar.log()) / 2).float()


def _keep_fixed_what_is_fixed(network: nn.Module) -> frozenset[str]:
    """The names of those that are buffers from now on."""
    fixed: set[str] = set()
    if not any(parameter.requires_grad for parameter in network.parameters()):
        return frozenset(fixed)  # frozen as a whole, as a teacher is
    for owner, module in network.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)
                fixed.add(f"{owner}.{name}".lstrip("."))
    return frozenset(fixed)


def _feature_shape(network: nn.Module) -> tuple[int, int, int] | None:
    """That of a module that says it and has `features`; other modules use either name for other things."""
    shape = getattr(network, "feature_shape", None)
    if not isinstance(shape, (tuple, list)) or not callable(getattr(network, "features", None)):
        return None
    is_shape = len(shape) == 3 and all(isinstance(size, int) and size > 0 for size in shape)
    return (shape[0], shape[1], shape[2]) if is_shape else None


def _require(output: Any, shape: tuple[int, ...], what: str) -> Tensor:
    if not isinstance(output, Tensor) or output.shape != shape or not output.is_floating_point():
        is_tensor = isinstance(output, Tensor)
        got = f"{tuple(output.shape)} of {output.dtype}" if is_tensor else f"a {type(output).__name__}"
        raise _error(f"{what} to give a floating point tensor of shape {shape}", got)
    return output


def _error(expected: str, got: object) -> ValueError:
    return ValueError(f"fastdmd.Adapted: expected {expected}, got {got}")
