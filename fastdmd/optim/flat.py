"""The parameters of a network as views of one buffer: laid out, watched, and refused where that cannot be right."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALIGNMENT = 16  # elements: every parameter starts a cache line
SHAPE, REQUIRES_GRAD = operator.attrgetter("shape"), operator.attrgetter("requires_grad")


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
    """Elements of the buffer that it takes."""
    return -(-tensor.numel() // ALIGNMENT) * ALIGNMENT


def places(tensors: Sequence[Tensor]) -> list[tuple]:
    """Where and how the tensors lie in memory, to be compared; never asks the device.

    As long as the memory is held, nothing else can have its address. Storages do not tell: that of a tensor which
    `share_memory_` or a queue of processes takes stays, and its memory is another.
    """
    address: Callable[[Tensor], int] = Tensor.data_ptr
    if tensors[0].untyped_storage().device.type == "meta":  # meta and fake tensors have none
        address = _storage
    return list(zip(map(address, tensors), map(Tensor.stride, tensors), map(SHAPE, tensors), strict=True))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Watch:
    """Whether a network still has its modules and parameters, those trained in the same memory."""

    def __init__(self, network: nn.Module, trained: Mapping[nn.Parameter, str], *, flags: bool):
        self._network, self._trained = network, trained
        self._contents = [own for module in network.modules() for own in (module._modules, module._parameters)]
        self._named = _named(network)  # held: an address of Python's comes again, too
        self._parameters = list(network.parameters()) if flags else []
        self._seen = self._look()

    def _look(self) -> tuple[list, list, list]:
        ids = [*map(id, itertools.chain.from_iterable(own.values() for own in self._contents))]
        return ids, places(list(self._trained)), [*map(REQUIRES_GRAD, self._parameters)]

    def check(self) -> None:
        """Raises ValueError for the first that was moved or replaced, or whose `requires_grad` has changed."""
        now = self._look()
        if now == self._seen:
            return
        named = _named(self._network)
        present = set(map(id, named.values()))
        for (parameter, name), place, before in zip(self._trained.items(), now[1], self._seen[1], strict=True):
            if place != before or id(parameter) not in present:
                raise ValueError(
                    f"fastdmd.AdamWEMA: expected {name} where the optimizer put it, got it moved or replaced; what "
                    "does that (.to, .double, load_state_dict(assign=True), share_memory, a queue of processes, "
                    "sharding, another AdamWEMA) comes before it"
                )
        for name in self._named | named:
            if named.get(name) is not self._named.get(name):
                raise ValueError(
                    "fastdmd.AdamWEMA: expected modules and parameters as at construction, got "
                    f"{name} of the {type(self._network).__name__} added, removed or replaced; what does that (another "
                    "head, torch.compile of a part, parametrizations) comes before it"
                )
        for (name, parameter), flag in zip(self._network.named_parameters(), self._seen[2], strict=False):
            if parameter.requires_grad != flag:
                raise ValueError(
                    f"fastdmd.AdamWEMA: expected requires_grad of {name} as at construction, {flag}, got {not flag}"
                )


def _named(network: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """Modules and parameters, those in more than one place under each name."""
    modules = dict(network.named_modules(remove_duplicate=False))
    return modules | dict(network.named_parameters(remove_duplicate=False))


class Mirror:
    """The buffers and fixed parameters of a copy of a network, which follow those of the network."""

    def __init__(self, network: nn.Module, twin: nn.Module, trained: set[nn.Parameter]):
        pairs = list(zip(network.modules(), twin.modules(), strict=True))
        self._buffers = [(module._buffers, other._buffers) for module, other in pairs]
        fixed = dict(zip(network.parameters(), twin.parameters(), strict=True))
        self._fixed = [(own, other) for own, other in fixed.items() if own not in trained]
        self._versions: list[int] | None = None
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Copies all buffers, as batch_norm changes them without counting, and fixed parameters that have changed."""
        copies = []
        for own, twin in self._buffers:
            for key, source in own.items():
                target = twin.get(key)
                if source is not None and _alike(source, target):
                    copies.append((target, source))
                else:
                    twin[key] = None if source is None else source.detach().clone()
        versions = [source._version for source, _ in self._fixed]
        if versions != self._versions:
            self._versions = versions
            for source, target in self._fixed:
                if _alike(source, target):
                    copies.append((target, source))
                else:
                    target.data = source.detach().clone()
        if copies:
            self._copy(*map(list, zip(*copies, strict=True)))

    def _copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        torch._foreach_copy_(targets, sources)


def _alike(source: Tensor, target: Tensor | None) -> bool:
    """Whether a copy of the source can be written into the target."""
    return (
        target is not None
        and source.shape == target.shape
        and source.dtype == target.dtype
        and source.device == target.device
        and not target.is_inference()
        and 0 not in target.stride()  # expanded, which torch does not write to
    )


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
        if isinstance(module, torch.jit.ScriptModule):
            fail("modules of Python", f"a {type(module).__name__}, which torch.jit made", TypeError)
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not trained:
        fail("a network with parameters that require a gradient", f"a {type(network).__name__} without")
    first_name, first = next(iter(trained.items()))
    for name, parameter in trained.items():
        if is_lazy(parameter):
            fail("parameters that have their shape", f"{name}, which waits for a first forward")
        if parameter.is_inference():
            fail("parameters from outside of torch.inference_mode", f"{name} from inside")
        if is_traceable_wrapper_subclass(parameter):
            fail("plain tensors as parameters", f"{name}, a {type(parameter.data).__name__}", TypeError)
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            fail("dense gradients", f"that of {name} in {parameter.grad.layout}", TypeError)
        if parameter.dtype not in (torch.float32, torch.float64):
            expected = "parameters in float32 or float64 (compute_dtype: what the network computes in)"
            fail(expected, f"{name} in {parameter.dtype}", TypeError)
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
    first = int(tensor.storage_offset())
    elements = torch.arange(first, first + _extent(tensor)).as_strided(tensor.shape, tensor.stride()).flatten()
    return elements[:, None] * tensor.itemsize + torch.arange(tensor.itemsize)
