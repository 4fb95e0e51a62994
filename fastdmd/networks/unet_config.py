"""What determines a network."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

from fastdmd.diffusion import Dynamics

EMBEDDINGS = ("positional", "ddpmpp", "fourier")
ENCODERS = ("standard", "residual")
# Far above any network in use, and so small that neither a product of them overflows nor a loop over them takes long.
MAX_NUMBER, MAX_BLOCKS, MAX_CLASSES, MAX_LENGTH = 1 << 14, 1 << 10, 1 << 20, 16
MAX_WIDTH, MAX_VALUES, MAX_SIGMA_DATA = 1 << 16, 1 << 26, 1e6


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Everything that determines a network; stored inside every weight file.

    `num_classes = 0` means unconditional. `patch_size > 1` folds each patch of pixels into channels before
    the first convolution and unfolds it after the last: the UNet then works at `image_size / patch_size`.
    `attention_resolutions` are feature-map sizes, as the network sees them. Karras et al. 2022, table 7:

    - DDPM++: `embedding="ddpmpp"`.
    - NCSN++: `embedding="fourier", noise_multiplier=2, encoder="residual", resample_filter=(1, 3, 3, 1)`.
    - ADM: `adm=True, adaptive_scale=True, channels_per_head=64`.
    """

    image_size: int = 28
    image_channels: int = 1
    num_classes: int = 10
    patch_size: int = 1
    model_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    channels_per_head: int = 0  # 0: a single head, as in DDPM++
    embedding_multiplier: int = 4
    adaptive_scale: bool = False  # the embedding scales and shifts normalised features (ADM), or is added (DDPM++)
    embedding: str = "positional"  # of the noise level: positional, ddpmpp (another order and spacing), or fourier
    noise_multiplier: int = 1  # width of the noise embedding before its two layers, in units of model_channels
    encoder: str = "standard"  # or residual: the input, downsampled, joins at every resolution (NCSN++)
    resample_filter: tuple[int, ...] = (1, 1)
    adm: bool = False  # labels join after the noise layers, attention everywhere, plain skips, sums unscaled
    augment_dim: int = 0  # of the augmentation labels that EDM trained the network with; nothing here gives it any
    dropout: float = 0.0
    sigma_data: float = 0.5
    dynamics: Dynamics = "edm"  # what F_x is: EDM's preconditioned output, or a velocity of flow matching

    def __post_init__(self):
        for name in ("channel_multipliers", "attention_resolutions", "resample_filter"):
            self._expect(isinstance(getattr(self, name), (list, tuple)), f"{name} as a list", getattr(self, name))
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON turns tuples into lists
            self._expect_whole(name, -MAX_NUMBER if name == "resample_filter" else 1, MAX_NUMBER)
            self._expect(
                len(getattr(self, name)) <= MAX_LENGTH,
                f"{name} of at most {MAX_LENGTH} numbers",
                len(getattr(self, name)),
            )
        self._expect_whole("num_classes", 0, MAX_CLASSES)
        self._expect_whole("num_blocks", 1, MAX_BLOCKS)
        self._expect_whole("channels_per_head", 0, MAX_NUMBER)
        self._expect_whole("augment_dim", 0, MAX_NUMBER)
        for name in (
            "image_size",
            "image_channels",
            "patch_size",
            "model_channels",
            "embedding_multiplier",
            "noise_multiplier",
        ):
            self._expect_whole(name, 1, MAX_NUMBER)
        for name in ("adaptive_scale", "adm"):
            self._expect(isinstance(getattr(self, name), bool), f"{name} true or false", getattr(self, name))
        for name, choices in (("embedding", EMBEDDINGS), ("encoder", ENCODERS), ("dynamics", get_args(Dynamics))):
            self._expect(getattr(self, name) in choices, f"{name} out of {', '.join(choices)}", getattr(self, name))
        self._expect(
            len(self.resample_filter) % 2 == 0 and sum(self.resample_filter) > 0,
            "a resample_filter of even length",
            self.resample_filter,
        )
        self._expect(
            self.model_channels >= 4 and self.model_channels * self.noise_multiplier % 2 == 0,
            "an even model_channels >= 4",
            self.model_channels,
        )
        self._expect(len(self.channel_multipliers) >= 1, "at least one channel multiplier", self.channel_multipliers)
        factor = max(*self.channel_multipliers, self.embedding_multiplier, self.noise_multiplier)
        self._expect(
            self.model_channels * factor <= MAX_WIDTH,
            f"widths of at most {MAX_WIDTH} channels",
            self.model_channels * factor,
        )
        self._expect(
            math.prod(self.image_shape) <= MAX_VALUES, f"images of at most {MAX_VALUES} values", self.image_shape
        )
        self._expect(
            isinstance(self.sigma_data, (int, float)) and 0 < self.sigma_data <= MAX_SIGMA_DATA,
            f"sigma_data > 0 and at most {MAX_SIGMA_DATA:g}",
            self.sigma_data,
        )
        self._expect(
            isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1, "dropout from 0 to below 1", self.dropout
        )
        factor = self.patch_size * 2 ** (len(self.channel_multipliers) - 1)
        self._expect(
            self.image_size % factor == 0,
            f"image_size divisible by {factor} (patch_size * 2^(levels - 1))",
            self.image_size,
        )

    def _expect(self, condition: bool, expected: str, got: object) -> None:
        if not condition:
            raise ValueError(f"fastdmd.UNetConfig: expected {expected}, got {str(got)[:80]}")

    def _expect_whole(self, name: str, least: int, greatest: int) -> None:
        value = getattr(self, name)
        for number in value if isinstance(value, tuple) else (value,):
            whole = isinstance(number, int) and not isinstance(number, bool)
            self._expect(whole and least <= number <= greatest, f"{name} from {least} to {greatest}", value)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Feature-map sizes at each level, finest first."""
        return tuple(self.image_size // self.patch_size >> level for level in range(len(self.channel_multipliers)))

    @property
    def skip_scale(self) -> float:
        """Of the sum of two branches: keeps its variance at that of one, but in ADM."""
        return 1.0 if self.adm else math.sqrt(0.5)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image_channels, self.image_size, self.image_size
