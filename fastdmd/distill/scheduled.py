"""A denoiser as a turn calls it: beside others, and what it gave is known afterwards."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fastdmd.diffusion import Denoiser, Dynamics
from fastdmd.distill.losses import Denoise


@dataclasses.dataclass
class Scheduled:
    """A denoiser that denoises by way of `denoise`, beside others; its features come when they are asked for."""

    denoiser: Denoiser
    denoise: Denoise
    D_x: Tensor | None = None  # what it gave last, without its graph

    @property
    def dynamics(self) -> Dynamics:
        return self.denoiser.dynamics

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        D_x = self.denoise(x, sigma, class_labels)
        self.D_x = D_x.detach()
        return D_x

    def with_features(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, num_denoised: int
    ) -> tuple[Tensor, Tensor]:
        D_x, features = self.denoiser.with_features(x, sigma, class_labels, num_denoised=num_denoised)
        if num_denoised:
            self.D_x = D_x.detach()
        return D_x, features
