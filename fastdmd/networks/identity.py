"""Which network it is: a digest of all that decides what it computes."""

from __future__ import annotations

import hashlib
import json

import torch

from fastdmd.diffusion import DenoisingNetwork
from fastdmd.networks.states import tensors_of


def identity(network: DenoisingNetwork) -> str:
    """64 bits of the SHA-256 of its description and its tensors, in hexadecimal; the same on every device."""
    digest = hashlib.sha256(json.dumps(network.describe(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors_of(network.inner).items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
