"""Which data these are: a digest of all values, wherever they lie."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

CHUNK_BYTES = 2**24  # which cross from a device at once


def identity(*tensors: Tensor | None) -> str:
    """64 bits of the SHA-256 of dtypes, shapes and values, in hexadecimal; the same on every device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in tensor.detach().contiguous().view(-1).split(CHUNK_BYTES // tensor.itemsize):
            digest.update(part.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
