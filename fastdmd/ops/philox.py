"""Random numbers that are a function of what names them: Philox4x32-10, its keys, and standard normals from it."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from fastdmd.ops._registry import define
from fastdmd.ops._validate import check_tensor

STATES = 2**32 - 1  # the stream of states


def rng_key(
    seed: int, *, stream: int = 0, iteration: int = 0, first_sample: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """What a draw is a function of: int64 `[4]`, seed, stream, iteration and first sample, on `device`.

    An op that draws with it, as often as it does, takes for element i of image b, in the order (C, H, W), normal i
    mod 4 of the Philox counter (i div 4, first_sample + b, iteration, stream) with key = seed. So images [a, b) of a
    batch, drawn by themselves with `first_sample` a, are what they are within it. A captured graph draws by what the
    key holds when it is replayed.

    The seed is in [0, 2^63), the others are in [0, 2^32). Raises TypeError or ValueError for others.
    """
    values = {"seed": seed, "stream": stream, "iteration": iteration, "first_sample": first_sample}
    checked = [_natural("rng_key", name, value, 63 if name == "seed" else 32) for name, value in values.items()]
    return torch.tensor(checked, dtype=torch.int64).to(device, non_blocking=True)


def rng_state(seed: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The state of a random stream, on `device`: a key, whose iteration counts the calls that drew from it.

    It is advanced on the device, so a captured graph draws fresh noise at every replay, and a state that was saved
    draws again what it drew. Seeds are in [0, 2^63). Raises TypeError or ValueError for other seeds.
    """
    return rng_key(_natural("rng_state", "seed", seed, 63), stream=STATES, device=device)


def _natural(op: str, name: str, value: int, bits: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"fastdmd.{op}: expected {name} to be an int, got {type(value).__name__} {value}") from None
    if not 0 <= number < 1 << bits:
        raise ValueError(f"fastdmd.{op}: expected {name} in [0, 2^{bits}), got {number}")
    return number


def check_rng_key(op: str, name: str, key: Tensor, x: Tensor) -> None:
    check_tensor(op, name, key)
    if key.dtype != torch.int64 or key.shape != (4,) or not key.is_contiguous():
        got = f"{key.dtype} {tuple(key.shape)} of strides {key.stride()}"
        raise ValueError(f"fastdmd.{op}: expected {name} of ops.{name}, int64 (4,), got {got}")
    if key.device != x.device:
        raise ValueError(f"fastdmd.{op}: expected {name} on {x.device}, got it on {key.device}")


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


def reference_normals(like: Tensor, rng_key: Tensor) -> Tensor:
    """Standard normals float32, shaped and laid out as `like` `[B, ...]`, see `rng_key`; Box and Muller 1958."""
    size = like.shape[1:].numel()
    seed, stream, iteration, first_sample = rng_key.unbind(0)
    quad = torch.arange(-(-size // 4), device=like.device)
    sample = first_sample + torch.arange(like.shape[0], device=like.device)[:, None]
    counter = torch.stack(torch.broadcast_tensors(quad, sample, iteration, stream), dim=-1).flatten(0, 1)  # [B * Q, 4]
    words = reference(counter, torch.stack([seed, seed >> 32]))
    a, b = words[:, 0::2], words[:, 1::2]  # [Q, 2]: two pairs of words
    u = (a >> 1).float() * 2**-31 + 2**-32
    signed = b - (b >= 2**31) * 2**32
    angle = signed.float().double() * (2**-31 * math.pi)
    radius = (-2 * u.double().log()).sqrt()
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2)  # [Q, 2, 2]
    rows = normals.float().view(like.shape[0], 4 * len(quad))[:, :size]
    return torch.empty_like(like, dtype=torch.float32).copy_(rows.reshape(like.shape))


_philox = define(
    "philox(Tensor counter, Tensor key) -> Tensor",
    module="philox",
    reference=reference,
    fake=lambda counter, key: torch.empty_like(counter),
)
