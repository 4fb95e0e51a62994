"""The parameters of a network as views of one buffer: laid out, watched, and refused where that cannot be right."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALIGNMENT = 16  # elements: every parameter starts a cache line


def flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Moves the parameters into one buffer and makes them views of it."""
    flat = parameters[0].new_zeros(sum(map(padded_size, parameters)), requires_grad=False)
    for parameter, view in zip(parameters, views(flat, parameters), strict=True):
        parameter.data = view.copy_(parameter.data)
    return flat


def views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A view for each tensor, of its shape and memory order: dense, even where the tensor is a slice of a larger one.

    Each has a storage of its own over its part of the memory, as tensors have that nobody flattened: what looks at
    storages (safetensors, a saver, a wrapper) takes them for whole and apart.
    """
    result, offset, storage = [], 0, flat.untyped_storage()
    for tensor in tensors:
        strides = torch.empty_like(tensor, device="meta").stride()
        if storage.device.type == "meta":  # nothing but shapes: meta and fake tensors
            result.append(flat.as_strided(tensor.shape, strides, offset))
        else:
            start = offset * flat.itemsize
            part = storage[start : start + tensor.numel() * flat.itemsize]
            result.append(flat.new_empty(0).set_(part, 0, tensor.shape, strides))
        offset += padded_size(tensor)
    return result


def padded_size(tensor: Tensor) -> int:
    return -(-tensor.numel() // ALIGNMENT) * ALIGNMENT


def same_storage(tensor: Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether the tensor still lies in this storage, which must be held: the address of a freed one comes again."""
    return tensor.untyped_storage()._cdata == storage._cdata


class Watch:
    """Whether the parameters of a network are still what they were, in the same memory; never asks the device."""

    def __init__(self, network: nn.Module, names: Mapping[nn.Parameter, str], *, flags: bool):
        self._places = [
            (names[parameter], module._parameters, key, parameter, parameter.untyped_storage(), parameter.stride())
            for module in network.modules() for key, parameter in module._parameters.items() if parameter in names
        ]  # fmt: skip
        parameters = network.named_parameters() if flags else ()
        self._flags = [(name, parameter, parameter.requires_grad) for name, parameter in parameters]

    def check(self) -> None:
        """Raises ValueError for the first that was moved or replaced, or whose `requires_grad` has changed."""
        for name, owner, key, parameter, storage, strides in self._places:
            same = owner.get(key) is parameter and same_storage(parameter, storage)
            if not same or parameter.stride() != strides:
                raise ValueError(
                    f"fastdmd.AdamWEMA: expected {name} where the optimizer put it, got it moved or replaced; what "
                    "does that (.to, .double, load_state_dict(assign=True), sharding, another AdamWEMA) comes before it"
                )
        for name, parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                raise ValueError(
                    f"fastdmd.AdamWEMA: expected requires_grad of {name} as at construction, {flag}, got {not flag}"
                )


class Mirror:
    """The buffers and fixed parameters of a copy of a network, which follow those of the network."""

    def __init__(self, network: nn.Module, twin: nn.Module, trained: set[nn.Parameter]):
        self._places = [
            (own, other, key)
            for module, counterpart in zip(network.modules(), twin.modules(), strict=True)
            for own, other in (
                (module._buffers, counterpart._buffers), (module._parameters, counterpart._parameters)
            ) for key in own if own[key] not in trained
        ]  # fmt: skip
        self._seen: list[tuple[Tensor | None, int]] = []
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Copies all of them where one has changed, which a forward pass in train mode does to one at least."""
        now = [(own[key], -1 if own[key] is None else own[key]._version) for own, _, key in self._places]
        if self._seen and all(
            a is b and version == seen for (a, version), (b, seen) in zip(now, self._seen, strict=True)
        ):
            return
        self._seen = now
        sources, targets = [], []
        for own, other, key in self._places:
            source, target = own[key], other[key]
            if source is None or target is None or source.shape != target.shape or source.dtype != target.dtype:
                other[key] = None if source is None else source.detach().clone()
            else:
                sources.append(source)
                targets.append(target)
        if sources:
            torch._foreach_copy_(targets, sources)


def check_network(network: nn.Module) -> None:
    """Raises TypeError or ValueError for a network whose trained parameters cannot become views of one buffer."""

    def fail(expected: str, got: str, error: type[Exception] = ValueError) -> None:
        raise error(f"fastdmd.AdamWEMA: expected {expected}, got {got}")

    if not isinstance(network, nn.Module):
        fail("network to be a torch.nn.Module", type(network).__name__, TypeError)
    for module in network.modules():
        if isinstance(module, DistributedDataParallel):
            fail("the network inside DistributedDataParallel, its .module", "the wrapper", TypeError)
        fsdp = sys.modules.get("torch.distributed.fsdp")  # who has made one has imported it
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            fail("a network whose parameters are whole", "FullyShardedDataParallel, which shards them", TypeError)
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not trained:
        fail("a network with parameters that require a gradient", f"a {type(network).__name__} without")
    first_name, first = next(iter(trained.items()))
    for name, parameter in trained.items():
        if is_lazy(parameter):
            fail("parameters that have their shape", f"{name}, which waits for a first forward")
        if is_traceable_wrapper_subclass(parameter):
            fail("plain tensors as parameters", f"{name}, a {type(parameter.data).__name__}", TypeError)
        if parameter.dtype not in (torch.float32, torch.float64):
            fail("parameters in float32 or float64 (compute_dtype: what the network computes in)",
                 f"{name} in {parameter.dtype}", TypeError)  # fmt: skip
        if parameter.dtype != first.dtype:
            fail(f"parameters of one dtype, {first.dtype} as {first_name}", f"{name} in {parameter.dtype}", TypeError)
        if parameter.device != first.device:
            fail(f"parameters on one device, {first.device} as {first_name}", f"{name} on {parameter.device}")
    others = dict(network.named_buffers()) | dict(network.named_parameters())
    if (pair := _sharing(trained, {name: tensor for name, tensor in others.items() if tensor.numel()})) is not None:
        fail("parameters that share no memory (to tie them, make them one)", " and ".join(pair))


def _sharing(trained: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two that have an element in common, one of them trained; or one twice, which holds an element twice."""
    spans = []  # storage, first byte, behind the last byte
    for name, tensor in tensors.items():
        start, extent = tensor.storage_offset() * tensor.itemsize, _extent(tensor)
        spans.append((tensor.untyped_storage()._cdata, start, start + extent * tensor.itemsize, name))
        if name in trained and tensor.numel() > extent:
            return name, name
    spans.sort()
    for index, (storage, _, stop, name) in enumerate(spans):
        for other_storage, other_start, _, other_name in spans[index + 1 :]:
            if other_storage != storage or other_start >= stop:
                break
            pair = tensors[name], tensors[other_name]
            if {name, other_name} & trained.keys() and torch.isin(*map(_bytes, pair)).any():
                return name, other_name
    return None


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _bytes(tensor: Tensor) -> Tensor:
    """Where in their storage the elements lie, every byte of them."""
    places = torch.arange(_extent(tensor)).as_strided(tensor.shape, tensor.stride()).flatten()
    return (places + tensor.storage_offset())[:, None] * tensor.itemsize + torch.arange(tensor.itemsize)
