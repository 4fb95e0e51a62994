"""Random numbers that are a function of (seed, call, element): Philox4x32-10 and standard normals from it."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from fastdmd.ops._registry import define
from fastdmd.ops._validate import check_tensor

CALL = 1 << 32  # by how much each call advances the offset; the low word is the kernels' ticket counter


def rng_state(seed: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The state of a random stream: int64 `[2]`, seed and offset, on `device`.

    Every op that draws from it advances the offset by 2^32 on the device, so a captured graph draws fresh noise at
    every replay, and a state that was saved draws again what it drew. Seeds are in [0, 2^63).
    Raises TypeError or ValueError for other seeds.
    """
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"fastdmd.rng_state: expected seed to be an int, got {type(seed).__name__} {seed}") from None
    if not 0 <= seed < 2**63:
        raise ValueError(f"fastdmd.rng_state: expected seed in [0, 2^63), got {seed}")
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def check_rng_state(op: str, state: Tensor, x: Tensor) -> None:
    check_tensor(op, "rng_state", state)
    if state.dtype != torch.int64 or state.shape != (2,) or not state.is_contiguous():
        got = f"{state.dtype} {tuple(state.shape)} of strides {state.stride()}"
        raise ValueError(f"fastdmd.{op}: expected rng_state of ops.rng_state, int64 (2,), got {got}")
    if state.device != x.device:
        raise ValueError(f"fastdmd.{op}: expected rng_state on {x.device}, got it on {state.device}")


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: four 32-bit words each, int64 `[N, 4]`.
        key: two 32-bit words, int64 `[2]`.

    Returns the random words, int64 `[N, 4]`, in [0, 2^32).
    Raises TypeError or ValueError, naming what was expected and what came.
    """
    for name, tensor, expected in (("counter", counter, "[N, 4]"), ("key", key, "[2]")):
        check_tensor("philox", name, tensor)
        shaped = tensor.shape == (2,) if name == "key" else tensor.dim() == 2 and tensor.shape[1] == 4
        if tensor.dtype != torch.int64:
            raise TypeError(f"fastdmd.philox: expected {name} of dtype int64, got {tensor.dtype}")
        if not shaped:
            raise ValueError(f"fastdmd.philox: expected {name} of shape {expected}, got {tuple(tensor.shape)}")
    if key.device != counter.device:
        raise ValueError(f"fastdmd.philox: expected key on {counter.device}, got it on {key.device}")
    return _philox(counter.contiguous(), key.contiguous())


def reference(counter: Tensor, key: Tensor) -> Tensor:
    word = 0xFFFFFFFF
    x0, x1, x2, x3 = (counter & word).unbind(1)
    key0, key1 = (key & word).unbind(0)
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # modulo 2^64, as int64 wraps around
        x0, x1, x2, x3 = (
            (product1 >> 32) & word ^ x1 ^ key0,
            product1 & word,
            (product0 >> 32) & word ^ x3 ^ key1,
            product0 & word,
        )
        key0, key1 = key0 + 0x9E3779B9 & word, key1 + 0xBB67AE85 & word
    return torch.stack([x0, x1, x2, x3], dim=1)


def reference_normals(like: Tensor, rng_state: Tensor) -> Tensor:
    """Standard normals float32, shaped and laid out as `like`; Box and Muller 1958.

    Element i in memory order takes normal i mod 4 of counter (i div 4, call), key = seed.
    """
    quad = torch.arange(-(-like.numel() // 4), device=like.device)
    seed, offset = rng_state.unbind(0)
    counter = torch.stack([quad, quad >> 32, torch.zeros_like(quad), (offset >> 32).expand_as(quad)], dim=1)
    words = reference(counter, torch.stack([seed, seed >> 32]))
    a, b = words[:, 0::2], words[:, 1::2]  # [Q, 2]: two pairs of words
    u = (a >> 1).float() * 2**-31 + 2**-32
    signed = b - (b >= 2**31) * 2**32
    angle = signed.float().double() * (2**-31 * math.pi)
    radius = (-2 * u.double().log()).sqrt()
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2)  # [Q, 2, 2]
    return normals.float().flatten()[: like.numel()].as_strided(like.shape, like.stride())


_philox = define(
    "philox(Tensor counter, Tensor key) -> Tensor",
    module="philox",
    reference=reference,
    fake=lambda counter, key: torch.empty_like(counter),
)
