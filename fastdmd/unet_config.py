"""What determines a network."""

from __future__ import annotations

import dataclasses
import math

EMBEDDINGS = ("positional", "ddpmpp", "fourier")
ENCODERS = ("standard", "residual")
DYNAMICS = ("edm", "flow")


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
    augment_dim: int = 0  # of the augmentation labels that the network was trained with; sampling leaves them out
    dropout: float = 0.0
    sigma_data: float = 0.5
    dynamics: str = "edm"  # what F_x is: EDM's preconditioned output, or a velocity of flow matching

    def __post_init__(self):
        def expect(condition: bool, expected: str, got) -> None:
            if not condition:
                raise ValueError(f"fastdmd.UNetConfig: expected {expected}, got {got}")

        # JSON turns tuples into lists.
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        object.__setattr__(self, "resample_filter", tuple(self.resample_filter))
        for name in ("image_size", "image_channels", "patch_size", "num_blocks", "embedding_multiplier",
                     "noise_multiplier"):  # fmt: skip
            expect(getattr(self, name) >= 1, f"{name} >= 1", getattr(self, name))
        expect(self.embedding in EMBEDDINGS, f"embedding out of {', '.join(EMBEDDINGS)}", self.embedding)
        expect(self.encoder in ENCODERS, f"encoder out of {', '.join(ENCODERS)}", self.encoder)
        expect(self.dynamics in DYNAMICS, f"dynamics out of {', '.join(DYNAMICS)}", self.dynamics)
        expect(len(self.resample_filter) % 2 == 0 and sum(self.resample_filter) > 0,
               "a resample_filter of even length", self.resample_filter)  # fmt: skip
        expect(self.num_classes >= 0, "num_classes >= 0", self.num_classes)
        expect(self.model_channels >= 4 and self.model_channels % 2 == 0,
               "an even model_channels >= 4", self.model_channels)  # fmt: skip
        expect(len(self.channel_multipliers) >= 1 and min(self.channel_multipliers) >= 1,
               "at least one channel multiplier, each >= 1", self.channel_multipliers)  # fmt: skip
        expect(self.sigma_data > 0, "sigma_data > 0", self.sigma_data)
        factor = self.patch_size * 2 ** (len(self.channel_multipliers) - 1)
        expect(self.image_size % factor == 0,
               f"image_size divisible by {factor} (patch_size * 2^(levels - 1))", self.image_size)  # fmt: skip

    @property
    def skip_scale(self) -> float:
        """Of the sum of two branches: keeps its variance at that of one, but in ADM."""
        return 1.0 if self.adm else math.sqrt(0.5)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image_channels, self.image_size, self.image_size
