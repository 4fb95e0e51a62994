"""A turn on a CPU as the operations that it comes to, in a row, without the modules and the autograd around them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from fastdmd.ops._registry import backends, chosen

NUM_WARMUP_CALLS = 2  # of a turn, before two that are recorded
# What an operation may not be, as its results, or what Python makes of them, are others at another call.
CHANGING = {
    torch.Tag.nondeterministic_seeded: "draws random numbers of torch's",
    torch.Tag.data_dependent_output: "tells Python a value",
    torch.Tag.dynamic_output_shape: "has a shape that depends on values",
    torch.Tag.inplace_view: "changes the shape of a tensor",
}
MASKS = (torch.bool, torch.uint8)  # by which the shape of what they index depends on values
SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)  # tensors of which autograd alone knows


@dataclasses.dataclass(frozen=True)
class Value:
    """What an operation of a recording has made."""

    index: int


@dataclasses.dataclass(frozen=True)
class Constant:
    """What was there before, and is there at every call: a static buffer, a weight, a view of one."""

    index: int


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation: its arguments, nested, with tensors by their places, and the values that it makes."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any  # as nested as what it returns; None in place of what is no new tensor
    function: Callable[..., Any]  # what computes it

    @property
    def writes(self) -> bool:
        return self.op._schema.is_mutable

    def __str__(self) -> str:
        """All of it: numbers by their digits, as NaN is not equal to itself, and 1 is to True."""
        return f"{self.op}{self.args}{self.kwargs} -> {self.results}"


class Recording(TorchDispatchMode):
    """Every operation that code inside comes to, those of its backward passes too, once autograd has seen them.

    `fault`: why they are not those of another call, if one of them shows it. Holds no tensor but those that were there
    before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.constants: list[Tensor] = []
        self.fault: str | None = None
        self._places: dict[int, Constant] = {}  # by id, of what `constants` hold
        self._made = WeakTensorKeyDictionary()
        self._num_values = 0
        self._views: list[Call] = []  # of constants, which are constants

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        faults = [f"{func} {why}" for tag, why in CHANGING.items() if tag in func.tags]
        if func is torch.ops.aten.index.Tensor and not any(tensor.dtype in MASKS for tensor in given):
            faults = []
        if "c10d" in func.namespace:
            faults.append(f"{func} talks to other processes")
        placed_args, placed_kwargs = tree_map(self._place, (args, kwargs))
        result = func(*args, **kwargs)
        if not given and not isinstance(result, Tensor | list | tuple):
            return result  # of dtypes, another one of them
        if any(not isinstance(leaf, Tensor | None) for leaf in tree_leaves(result)):
            faults.append(f"{func} tells Python a value")
        self.fault = self.fault or next(iter(faults), None)
        are_constant = not func._schema.is_mutable and _is_view(func) and all(one not in self._made for one in given)
        known = {id(one) for one in given}
        results = tree_map(lambda leaf: self._name(leaf, known, are_constant), result)
        (self._views if are_constant else self.calls).append(
            Call(func, placed_args, placed_kwargs, results, _function(func))
        )
        return result

    def _place(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        value = self._made.get(leaf)
        return self._constant(leaf) if value is None else value

    def _constant(self, tensor: Tensor) -> Constant:
        if id(tensor) not in self._places:
            self._places[id(tensor)] = Constant(len(self.constants))
            self.constants.append(tensor)
        return self._places[id(tensor)]

    def _name(self, leaf: Any, known: set[int], is_constant: bool) -> Value | Constant | None:
        if not isinstance(leaf, Tensor) or id(leaf) in known:
            return None
        if is_constant:
            return self._constant(leaf)
        self._num_values += 1
        self._made[leaf] = Value(self._num_values)
        return self._made[leaf]

    def difference(self, other: Recording) -> str | None:
        """What is not as in another recording of the same turn; None if that will be so at every call."""
        if (fault := self.fault or other.fault) is not None:
            return fault
        for calls, next_calls in ((self._views, other._views), (self.calls, other.calls)):
            if len(calls) != len(next_calls):
                return f"{len(calls)} operations at one call, {len(next_calls)} at the next"
            for call, next_call in zip(calls, next_calls, strict=True):
                if str(call) != str(next_call):
                    return f"{call.op} at one call, {next_call.op} at the next, or with other arguments"
        places = [place for call in self._views for place in tree_leaves(call.results)]
        made = {place.index for place in places if place is not None}
        for index, (tensor, next_tensor) in enumerate(zip(self.constants, other.constants, strict=True)):
            if index not in made and tensor is not next_tensor:
                return f"a tensor {tuple(tensor.shape)} that no operation has made, another one at the next call"
        return None


def _is_view(op: OpOverload) -> bool:
    """Whether what it returns is memory that it was given."""
    return any(returned.alias_info is not None for returned in op._schema.returns)


def program(recording: Recording) -> Callable[[], None]:
    """Runs the operations of a recording, below autograd, each result freed as soon as nothing needs it any more."""
    same: dict[Value, Value | Constant] = {}

    def resolved(leaf: Any) -> Any:
        return same.get(leaf, leaf) if isinstance(leaf, Value) else leaf

    calls = []
    for call in recording.calls:
        args, kwargs = tree_map(resolved, (call.args, call.kwargs))
        if call.op in SAME:
            same[call.results] = args[0]
        else:
            calls.append(dataclasses.replace(call, args=args, kwargs=kwargs))
    scope: dict[str, Any] = {f"c{index}": tensor for index, tensor in enumerate(recording.constants)}
    lines = [*_lines(_needed(calls), scope), "return"]
    source = f"def run({', '.join(f'{name}={name}' for name in scope)}):\n" + "\n".join(f"    {line}" for line in lines)
    exec(compile(source, "<recorded turn>", "exec"), scope)  # names are ours, all else is in `scope`
    run = scope["run"]

    def replay() -> None:
        with torch._C._AutoDispatchBelowAutograd():
            run()

    return replay


def _values(*nested: Any) -> set[Value]:
    return {leaf for leaf in tree_leaves(nested) if isinstance(leaf, Value)}


def _needed(calls: list[Call]) -> list[Call]:
    """Without those whose results nothing needs; of torch's own, where running statistics are written unsaid."""
    needed: set[Value] = set()
    kept = []
    for call in reversed(calls):
        is_torchs = call.op.namespace == "aten" and "batch_norm" not in call.op.name()
        if call.writes or not is_torchs or _values(call.results) & needed:
            needed |= _values(call.args, call.kwargs)
            kept.append(call)
    return kept[::-1]


def _lines(calls: list[Call], scope: dict[str, Any]) -> Iterator[str]:
    """Python, a line a call; what it needs by name goes into `scope`."""
    uses = Counter(value for call in calls for value in _values(call.args, call.kwargs))

    def written(leaf: Any) -> str:
        if isinstance(leaf, Value | Constant):
            return f"{'v' if isinstance(leaf, Value) else 'c'}{leaf.index}"
        if isinstance(leaf, list | tuple):
            inner = ", ".join(map(written, leaf))
            return f"[{inner}]" if isinstance(leaf, list) else f"({inner},)"
        if leaf is None or isinstance(leaf, bool | int | str):
            return repr(leaf)
        scope[name := f"k{len(scope)}"] = leaf  # floats, dtypes, memory formats, ...
        return name

    for call in calls:
        name = f"f_{call.op.name().replace('::', '_').replace('.', '_')}"
        scope[name] = call.function
        arguments = [*map(written, call.args), *(f"{key}={written(value)}" for key, value in call.kwargs.items())]
        line = f"{name}({', '.join(arguments)})"
        if _values(call.results):
            line = f"{_targets(call.results)} = {line}"
        yield line
        before = _values(call.args, call.kwargs)
        uses.subtract(before)
        if over := sorted(f"v{value.index}" for value in before | _values(call.results) if uses[value] <= 0):
            yield f"del {', '.join(over)}"


def _targets(results: Any) -> str:
    """Where results go, those that nobody has to know under a name of no use."""
    if isinstance(results, list | tuple):
        return "(" + "".join(f"{_targets(one)}, " for one in results) + ")"
    return f"v{results.index}" if isinstance(results, Value) else "_"


def _function(op: OpOverload) -> Callable[..., Any]:
    """What computes it: of fastdmd's ops that write nothing, the implementation that was chosen."""
    namespace, name = op.name().split(".")[0].split("::")
    if namespace == "fastdmd" and not op._schema.is_mutable:
        return chosen(name, "cpu")
    return op._op  # without the Python around it


def _is_plain() -> bool:
    """Whether operations are what the code around makes of them, and autograd."""
    around = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled()
    return torch.is_grad_enabled() and not any(around)


class RecordedTurn:
    """A turn that is replayed from where two calls in a row, behind two that warm up, came to the same operations.

    Then it may read and write nothing but tensors that stay, and whatever else it depends on is `fixed`: with another
    one, or another `ops.use_backend`, it begins anew. The numbers are those of the turn itself, to the bit. A turn of
    which that is not so runs as it is, and `reason` says why; so does each under autocast, anomaly detection, or
    without gradients. As in a CUDA graph, hooks, and attributes of modules, are those of the calls that were recorded.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._fixed: Any = None
        self._begin()

    def _begin(self) -> None:
        self._num_calls = 0
        self._recording: Recording | None = None
        self._replay: Callable[[], None] | None = None

    @property
    def is_captured(self) -> bool:
        return self._replay is not None

    def __call__(self, run: Callable[[], None], fixed: Any = None) -> bool:
        """Returns whether that was a replay."""
        if not _is_plain():
            run()
            return False
        if (now := (fixed, backends())) != self._fixed:
            self._fixed = now
            self._begin()
        if self._replay is not None:
            self._replay()
            return True
        if self.reason is not None or self._num_calls < NUM_WARMUP_CALLS:
            run()
            self._num_calls += 1
            return False
        with Recording() as recording:
            run()
        before, self._recording = self._recording, recording
        if before is not None:
            self.reason, self._recording = before.difference(recording), None
            if self.reason is None:
                self._replay = program(recording)
        return False
