"""Which method distils, and what it has to be told."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from fastdmd.settings import Input, Settings, arg, at_least, fail, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings(Settings):
    """What moves the generator."""

    name: Annotated[Literal["dmd2", "sid"], arg(name="method")] = "dmd2"
    """What matches the distributions of generator and teacher: `dmd2` (distribution matching) or `sid` (score identity
    distillation)."""
    sid_alpha: Annotated[float, within(-10, 10)] = 1.0
    """Of --method sid: the alpha of its loss; its authors published 1.0 and 1.2."""
    fake_loss_weight: Literal["as-trained", "none"] = "as-trained"
    """How noise levels count in the fake score's loss: as in the training of such a network (EDM's weight, or flow
    matching's), or, for comparison, alike: `mean((D_fake - x_gen)^2)`, which tells little of small levels."""
    regression_weight: Annotated[float, at_least(0, 1e6)] = 0.0
    """Weight of DMD's regression to images of the teacher, those of --pairs."""
    pairs: Annotated[str | None, Input] = None
    """Folder of pairs of noise and the teacher's images, which `fastdmd.pairs` made."""

    @property
    def has_regression(self) -> bool:
        return self.regression_weight > 0

    @property
    def differentiates_denoisers(self) -> bool:
        """Whether the generator's loss reaches its images through teacher and fake score, too."""
        return self.name == "sid"

    def check(self) -> None:
        super().check()
        if self.name != "sid" and self.sid_alpha != 1.0:
            fail(self, "sid_alpha", "together with --method sid")
        if self.has_regression and self.pairs is None:
            raise ValueError("expected --pairs with images of the teacher for --regression-weight, got none")
        if self.pairs is not None and not self.has_regression:
            fail(self, "pairs", "together with --regression-weight")
