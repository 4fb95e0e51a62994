"""Whether a module still computes what it did: outputs and gradients beside those of before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Relative, of whole tensors; what the module's own rounding comes to is allowed several times over as well.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
OWN_ROUNDING, MOST = 8.0, 100.0  # and what that adds to the tolerance is this many times it at most
FLOOR = 1e-2  # of the greatest gradient: one that is zero but for rounding has no relative error


class Trial:
    """The numbers of a module for some inputs, in eval mode: what it gives, and gradients of inputs and parameters.

    Those of images and other inputs of several axes. Made before the module is changed; `fault` compares afterwards.
    Buffers, gradients, modes and random numbers are as before. `unsteady` says what differed as it ran a second time.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...]):
        self._module, self._inputs = module, inputs
        self._expected = self._numbers(inputs)
        dtypes = [tensor.dtype for tensor in (*module.parameters(), *self._expected.values())]
        tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes)
        sizes = {name: _size(value) for name, value in self._expected.items()}
        greatest = max((size for name, size in sizes.items() if _is_gradient(name)), default=0.0)
        self._allowed = {
            name: tolerance * (size + FLOOR * greatest * _is_gradient(name)) for name, size in sizes.items()
        }
        self.unsteady = self.fault()
        nudged = self._numbers(tuple(map(_nudged, inputs)))
        for name, value in self._expected.items():
            if name in nudged and nudged[name].shape == value.shape:
                own = OWN_ROUNDING * _distance(nudged[name], value)
                self._allowed[name] += min(own, MOST * self._allowed[name])

    def fault(self) -> str | None:
        """What differs now, in a few words; None for nothing beyond rounding."""
        try:
            numbers = self._numbers(self._inputs)
        except Exception as error:  # of somebody's code, to which a layout may matter
            return f"{type(error).__name__}: {error}".splitlines()[0][:120]
        for name, expected in self._expected.items():
            found = numbers.pop(name, None)
            if found is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
                got = "none" if found is None else f"{tuple(found.shape)} of {found.dtype}"
                return f"its {name} became {got}"
            distance = _distance(found, expected)
            if not distance <= self._allowed[name]:
                return f"its {name} came to differ by {distance / (_size(expected) or 1.0):.1e} of its norm"
        return f"there is another {next(iter(numbers))} now" if numbers else None

    def _numbers(self, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        leaves = {}
        with undisturbed(self._module), torch.enable_grad():
            given = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
            for i, value in enumerate(given):
                if _is_image(value):
                    leaves[f"gradient of input {i}"] = value.requires_grad_(True)
            passed = [value.view_as(value) if isinstance(value, Tensor) else value for value in given]  # may be changed
            for name, parameter in self._module.named_parameters():
                if parameter.is_floating_point():
                    leaves[f"gradient of {name}"] = parameter.requires_grad_(True)
            outputs = dict(_outputs("output", self._module(*passed)))
            wanted = [output for output in outputs.values() if output.requires_grad]
            gradients: tuple[Tensor | None, ...] = ()
            if wanted and leaves:
                total = torch.stack([(output * _direction(output)).sum() for output in wanted]).sum()
                gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        found = {name: grad for name, grad in zip(leaves, gradients, strict=False) if grad is not None}
        return {name: value.detach() for name, value in {**outputs, **found}.items()}


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """In eval mode and full precision, with a seed of its own; afterwards nothing has changed."""
    modes = [(part, part.training) for part in module.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices), torch.backends.cudnn.flags(allow_tf32=False):
        torch.manual_seed(0)
        try:
            for part, _ in modes:
                part.training = False
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            for parameter, need in needs:
                parameter.requires_grad_(need)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _outputs(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of whatever a module gives."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        items = value
    elif isinstance(value, tuple | list):
        items = dict(enumerate(value))
    elif hasattr(value, "__dict__"):
        items = vars(value)
    for key, item in items.items():
        yield from _outputs(f"{name}.{key}", item)


def _direction(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randn(output.shape, generator=generator).to(output)


def _nudged(value: Any) -> Any:
    """An image moved by about one rounding, up or down; a time might become another integer."""
    if not _is_image(value):
        return value
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
    return value * (1 + torch.finfo(value.dtype).eps * signs)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _distance(one: Tensor, other: Tensor) -> float:
    return _size(one - other) if one.is_floating_point() else float((one != other).sum())


def _size(tensor: Tensor) -> float:
    wide = torch.float64 if tensor.is_floating_point() else None
    return torch.linalg.vector_norm(tensor if wide else tensor.double(), dtype=wide).item()


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient")
