"""What a denoiser is, its preconditioning, and noise schedules."""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from fastdmd.ops._math import per_sample as per_sample  # the ops' own, public here
from fastdmd.ops._math import preconditioning as preconditioning

if TYPE_CHECKING:
    from typing_extensions import Self

Dynamics = Literal["edm", "flow"]  # how a network is trained: Karras et al.'s way, or flow matching's
DDPM_BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}  # first and last
NoiseSchedule = Literal["linear", "scaled_linear", "cosine", "squaredcos_cap_v2"]  # of a DDPM


class Denoiser(Protocol):
    """What fastdmd asks of a network: `D(x, sigma, class_labels) -> D_x`, the expectation of the clean image.

    `x` is `image + sigma * noise`, `[B, C, H, W]`; `sigma` `[B]`; `class_labels` int64 `[B]` or one-hot
    `[B, num_classes]`, or None for an unconditional network. The other dynamics are a matter of scale: with
    `t = sigma / (1 + sigma)`, flow matching's `(1 - t) image + t noise` is `x / (1 + sigma)`.
    """

    image_shape: tuple[int, int, int]  # C, H, W
    num_classes: int  # 0: unconditional
    sigma_data: float  # standard deviation of the data
    dynamics: Dynamics  # see distill.denoising_loss
    is_one_graph: bool  # torch.compile can take it whole
    foreign_name: str  # of the class of somebody else's whose code runs in it; empty: none

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor: ...

    def with_features(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, num_denoised: int
    ) -> tuple[Tensor, Tensor]:
        """`D_x` of the first `num_denoised` rows, and its encoder's features of all, `[B, *feature_shape]`."""
        ...


class DenoisingNetwork(nn.Module, abc.ABC):
    """A `Denoiser` that is a module, `D(x, sigma, class_labels) -> D_x`, and says what others need to know of it.

    What a run trains, copies and keeps: a `UNet`, or `Adapted`, anybody's.
    """

    image_shape: tuple[int, int, int]  # C, H, W
    num_classes: int  # 0: unconditional
    sigma_data: float  # standard deviation of the data
    dynamics: Dynamics
    parameterization: str  # what its raw output is: "edm", "flow", "x0", "epsilon" or "v"
    sigma_max: float = math.inf  # the greatest level that it was trained for
    is_one_graph: bool = True  # torch.compile can take it whole
    foreign_name: str = ""  # of the class of somebody else's whose code runs in it; empty: none
    feature_shape: tuple[int, int, int] | None = None  # C, h, w of what `with_features` gives; None: it cannot

    @abc.abstractmethod
    def with_features(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, num_denoised: int
    ) -> tuple[Tensor, Tensor]:
        """`D_x` of the first `num_denoised` rows, and its encoder's features of all, `[B, *feature_shape]`.

        Rows do not see each other: the numbers are those of passes apart. Raises ValueError without a `feature_shape`.
        """

    def require_features(self) -> tuple[int, int, int]:
        """Its `feature_shape`. Raises ValueError if it has none, saying how somebody's module offers features."""
        if self.feature_shape is None:
            name = self.foreign_name or type(self).__name__
            raise ValueError(
                f"fastdmd.with_features: expected {name} to have feature_shape, the "
                "(C, h, w) of its encoder's features, and features(x, level, labels), which gives them, got none"
            )
        return self.feature_shape

    @property
    def level_embedding(self) -> nn.Module | None:
        """What embeds noise levels, `[B, width]`, a Linear last; None: not known."""
        return None

    def emphasize_labels(self, factor: float) -> None:
        """Moves the class embeddings `factor` times as far from their mean, in place. Raises ValueError without any."""
        name = self.foreign_name or type(self).__name__
        raise ValueError(f"fastdmd.emphasize_labels: expected class embeddings that are known, got a {name}")

    @property
    def inner(self) -> nn.Module:
        """The module whose tensors a weight file holds, under its own names."""
        return self

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """How to make this network again, as JSON can hold it; a weight file's `network`."""

    def in_best_layout(self) -> Self:
        """Itself, its weights in the memory format in which it is fastest."""
        return self


def karras_sigmas(
    num_steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The Karras noise levels, ascending: index 0 is the least noise.

    `sigma_i = (max^(1/rho) + i / (n - 1) * (min^(1/rho) - max^(1/rho)))^rho` (Karras et al. 2022, eq. 5),
    flipped. Returns float32 `[num_steps]`. Computed in float32, as EDM-based trainers do, so that the levels are
    theirs to the last bit; float64 would differ by up to 1.7e-6. Raises ValueError for fewer than two, for levels that
    do not rise, and for what is not finite and positive.
    """
    if num_steps < 2:
        raise ValueError(f"fastdmd.karras_sigmas: expected num_steps >= 2, got {num_steps}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"fastdmd.karras_sigmas: expected 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}"
        )
    if not 0 < rho < math.inf:
        raise ValueError(f"fastdmd.karras_sigmas: expected rho > 0 and finite, got {rho}")
    ramp = torch.linspace(0, 1, num_steps)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return ((high + ramp * (low - high)) ** rho).flip(0).to(device)


def ddpm_alphas_cumprod(
    schedule: str = "linear", num_steps: int = 1000, *, beta_start: float | None = None, beta_end: float | None = None
) -> Tensor:
    """`abar_t = prod(1 - beta_s, s <= t)` of a DDPM, descending, float64 `[num_steps]`; `sigma_t^2 = 1 / abar_t - 1`.

    `linear`: beta from 1e-4 to 0.02 (Ho et al. 2020); `scaled_linear`: the square of a line, from 0.00085 to 0.012
    (Rombach et al. 2022); `cosine`, also called `squaredcos_cap_v2`: `abar_t = cos^2((t / T + 0.008) / 1.008 * pi / 2)`
    with beta at most 0.999 (Nichol & Dhariwal 2021). Raises ValueError for other schedules, for fewer than two steps,
    for beta that does not rise within (0, 1), and for one with `cosine`.
    """
    if num_steps < 2:
        raise ValueError(f"fastdmd.ddpm_alphas_cumprod: expected num_steps >= 2, got {num_steps}")
    if schedule in ("cosine", "squaredcos_cap_v2"):
        if beta_start is not None or beta_end is not None:
            raise ValueError(
                f"fastdmd.ddpm_alphas_cumprod: expected no beta_start or beta_end with {schedule}, got {beta_start} "
                f"and {beta_end}"
            )
        time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        abar = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    elif schedule in DDPM_BETAS:
        start, end = DDPM_BETAS[schedule]
        start = start if beta_start is None else beta_start
        end = end if beta_end is None else beta_end
        if not 0 < start < end < 1:
            raise ValueError(
                f"fastdmd.ddpm_alphas_cumprod: expected 0 < beta_start < beta_end < 1, got {start} and {end}"
            )
        power = 2 if schedule == "scaled_linear" else 1
        betas = torch.linspace(start ** (1 / power), end ** (1 / power), num_steps, dtype=torch.float64) ** power
    else:
        choices = ", ".join(get_args(NoiseSchedule))
        raise ValueError(f"fastdmd.ddpm_alphas_cumprod: expected schedule out of {choices}, got {schedule}")
    return (1 - betas).cumprod(0)


def velocity_preconditioning(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`c_skip, c_out, c_in, t` of flow matching, each `[B]`: a velocity network as a denoiser of `x + sigma * noise`.

    With `t = sigma / (1 + sigma)` the interpolation `x_t = (1 - t) x + t noise` is `(x + sigma * noise) / (1 + sigma)`,
    and `x = x_t - t v` for `v = noise - x` (Lipman et al. 2023; Liu et al. 2023): `c_skip = c_in = 1 - t` and
    `c_out = -t`.
    """
    c_in = 1 / (1 + sigma)
    t = sigma * c_in
    return c_in, -t, c_in, t


def lognormal_sigma(normal: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Training noise levels `exp(mean + std * normal)`, `[B]`, of as many standard normal numbers.

    Karras et al. 2022, table 1. They make the `t = sigma / (1 + sigma)` of flow matching logit-normal (Esser et al.
    2024).
    """
    return (mean + std * normal).exp()


def lognormal_sigmas(num_steps: int, *, mean: float, std: float, device: torch.device | str | None = None) -> Tensor:
    """Equally probable levels of `lognormal_sigma`, ascending, float32 `[num_steps]`: the medians of its quantiles.

    Raises ValueError for fewer than two, and for a mean and a deviation of no distribution.
    """
    if num_steps < 2:
        raise ValueError(f"fastdmd.lognormal_sigmas: expected num_steps >= 2, got {num_steps}")
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"fastdmd.lognormal_sigmas: expected a finite mean and std > 0, got {mean} and {std}")
    quantile = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
    return lognormal_sigma(torch.special.ndtri(quantile), mean, std).float().to(device)
