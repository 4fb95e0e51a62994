"""Images moved by whole pixels, so that a discriminator does not come to know few real ones by heart."""

from __future__ import annotations

import torch
from torch import Tensor


def translate(x: Tensor, shift: Tensor | None) -> Tensor:
    """`y[b, c, i, j] = x[b, c, m(i + shift[b, 0]), m(j + shift[b, 1])]`, where `m` mirrors what is beyond a border.

    One transformation of real and generated images alike, through which a gradient passes (Zhao et al. 2020,
    DiffAugment, section 3.3). `x` is `[B, C, H, W]`, `shift` int64 `[B, 2]`, less than H and W either way, unchecked,
    or None, which moves nothing. Raises ValueError for another shape or dtype.
    """
    if shift is None:
        return x
    if x.dim() != 4 or shift.shape != (len(x), 2) or shift.dtype != torch.int64:
        raise ValueError(
            "fastdmd.translate: expected x of shape [B, C, H, W] and shift int64 of shape [B, 2], got x of "
            f"{tuple(x.shape)} and shift {shift.dtype} of {tuple(shift.shape)}"
        )
    height, width = x.shape[2:]
    rows = _mirrored(height, shift[:, 0])[:, None, :, None].expand_as(x)
    columns = _mirrored(width, shift[:, 1])[:, None, None, :].expand_as(x)
    return x.gather(2, rows).gather(3, columns)


def _mirrored(size: int, shift: Tensor) -> Tensor:
    """Places `m(i + shift)` of `i` from 0 to `size`, `[B, size]`."""
    place = torch.arange(size, device=shift.device) + shift[:, None]
    return size - 1 - (size - 1 - place.abs()).abs()
