"""Which images a command reads, and how."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch

from fastdmd.data.dataset import Dataset, load
from fastdmd.data.framing import Framing
from fastdmd.data.labels import require_choice
from fastdmd.diffusion import Denoiser
from fastdmd.settings import Input, Settings, arg, at_least, fail

Pixels = Annotated[int | None, at_least(1, 2**14)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Real images."""

    path: Annotated[str | None, Input, arg(name="data")] = None
    """Folder of IDX files, .npz, folder of images, or EDM dataset zip. Default: the embedded MNIST digits."""
    labels: Annotated[str | None, Input] = None
    """Classes of --data: `prefix` (of file names, up to the first underscore), FILE.csv (lines of name,class), or
    `none`. Default: what the data says, in a dataset.json, by subfolders or in arrays."""
    resize: Pixels = None
    """Resize the images of --data: shorter side to so many pixels (Lanczos), then the centre square."""
    crop: Pixels = None
    """Of each image of --data, resized or not, keep the centre square of so many pixels. Default: --resize."""

    def check(self) -> None:
        super().check()
        for name in ("labels", "resize", "crop"):
            if self.path is None and getattr(self, name) is not None:
                fail(self, name, "together with --data")
        require_choice(self.labels)
        Framing(self.resize, self.crop)

    def load(
        self,
        *,
        image_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        labels_optional: bool = False,
        device: torch.device | str = "cpu",
    ) -> Dataset:
        """The images, those of MNIST without a path; see `data.load`."""
        return load(
            self.path,
            labels=self.labels,
            resize=self.resize,
            crop=self.crop,
            image_shape=image_shape,
            num_classes=num_classes,
            labels_optional=labels_optional,
            device=device,
        )

    def load_named(self, network: Denoiser) -> Dataset | None:
        """The user's images, checked against the network; None where none were named. They need no labels."""
        if self.path is None:
            return None
        return self.load(image_shape=network.image_shape, num_classes=network.num_classes, labels_optional=True)
