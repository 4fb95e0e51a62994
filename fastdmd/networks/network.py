"""What a run trains, copies and keeps: a denoiser that is a module, and says what others need to know of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self


class DenoisingNetwork(nn.Module):
    """A `diffusion.Denoiser` with parameters, `D(x, sigma, class_labels) -> D_x`: a `UNet`, or `Adapted`, anybody's."""

    image_shape: tuple[int, int, int]  # C, H, W
    num_classes: int  # 0: unconditional
    sigma_data: float  # standard deviation of the data
    dynamics: str  # how it is trained: "edm" or "flow"
    parameterization: str  # what its raw output is: "edm", "flow", "x0", "epsilon" or "v"
    sigma_max: float = math.inf  # the greatest level that it was trained for
    is_one_graph: bool = True  # torch.compile can take it whole
    foreign_name: str = ""  # of the class of somebody else's whose code runs in it; empty: none

    @property
    def inner(self) -> nn.Module:
        """The module whose tensors a weight file holds, under its own names."""
        return self

    def describe(self) -> dict[str, Any]:
        """How to make this network again, as JSON can hold it; a weight file's `network`."""
        raise NotImplementedError

    def in_best_layout(self) -> Self:
        """Itself, its weights in the memory format in which it is fastest."""
        return self
