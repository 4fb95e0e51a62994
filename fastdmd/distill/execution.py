"""How networks and turns are executed: eager, compiled by torch.compile, or whole turns captured."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdmd.diffusion import Denoiser
from fastdmd.distill.recording import RecordedTurn
from fastdmd.optim import AdamWEMA
from fastdmd.optim.states import fixed_options

Execution = Literal["eager", "compiled", "captured"]
# Of torch.compile on a GPU; read when an Executor is made. CUDA graphs are "captured" execution's own. On an H200,
# beside other work, the first iteration of the MNIST networks took 53 s like this; "max-autotune-no-cudagraphs", which
# times every convolution, was not done with the first network after 60 s.
COMPILE_MODE = "default"
NUM_WARMUP_CALLS = 2  # of a captured turn: they validate, compile and allocate; the next one captures

_numbers = itertools.count()


class Executor:
    """How the networks and turns of one model run.

    `name`: "eager"; "compiled", every network by `torch.compile`; "captured", on a GPU compiled networks and each whole
    turn one CUDA graph, where what does not depend on each other runs side by side on two streams, on a CPU each turn
    the operations that it came to, see `RecordedTurn`. Without `records`, and on other devices, these are eager, and
    so `name` says: exchanges with other processes are no such operations, and networks of others may keep state in
    Python. Raises ValueError for another name.
    """

    def __init__(self, name: str, device: torch.device, *, records: bool = True):
        if name not in get_args(Execution):
            raise ValueError(f"fastdmd.DMD2: expected execution out of {', '.join(get_args(Execution))}, got {name}")
        is_able = device.type == "cuda" or (device.type == "cpu" and records)
        self.name, self.device = "eager" if name == "captured" and not is_able else name, device
        self._compiler = Compiler(COMPILE_MODE if device.type == "cuda" else None)
        self.streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None  # of the turns, and beside them
        self._turns: dict[str, CapturedTurn | RecordedTurn] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have streams and graphs of their own."""
        return vars(self) | {"streams": None, "_turns": {}}

    def denoiser(self, network: Denoiser) -> Denoiser:
        """The network, as the turns call it."""
        return CompiledNetwork(network, self._compiler) if self._compiles else network

    def fused(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a function of tensors gives: of many small operations, a GPU gets few launches where networks are
        compiled. It may write to tensors, draws no random numbers, and looks at no value."""
        if not self._fuses:
            return function(*arguments, **options)
        return self._compiler.fused(function, *arguments, **options)

    @property
    def _compiles(self) -> bool:
        return self.name == "compiled" or (self.name == "captured" and self.device.type == "cuda")

    @property
    def _fuses(self) -> bool:
        return self._compiles and self.device.type == "cuda"

    def renew(self, turns: tuple[str, ...], turns_beside: tuple[str, ...]) -> None:
        """For turns over new buffers, which need other graphs."""
        if self.name != "captured":
            return
        if self.device.type == "cpu":
            self._turns = {name: RecordedTurn() for name in (*turns, *turns_beside)}
            return
        torch.cuda.synchronize(self.device)  # what runs still reads the buffers and graphs that go now
        if self.streams is None:
            self.streams = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._turns = {}
        for stream, names in zip(self.streams, (turns, turns_beside), strict=True):
            pool = torch.cuda.graph_pool_handle()
            self._turns |= {name: CapturedTurn(stream, pool) for name in names}

    def run(self, name: str, turn: Callable[[], None], *optimizers: AdamWEMA) -> None:
        """Runs a turn of these optimizers, or what it was captured as. Keeps no reference to it, and so none to its
        model."""
        captured = self._turns.get(name)
        if captured is None:
            turn()
        elif isinstance(captured, RecordedTurn):
            if captured(turn, [fixed_options(optimizer.param_groups) for optimizer in optimizers]):
                for optimizer in optimizers:
                    optimizer.note_change()  # which is no operation
        else:
            captured(turn)

    @property
    def captured(self) -> frozenset[str]:
        """The turns that are captured by now."""
        return frozenset(name for name, turn in self._turns.items() if turn.is_captured)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is inside may run beside what follows, up to `join`, where turns are captured.

        What each stream makes is freed when both have met again, and its memory goes to later work of that stream.
        """
        if self.streams is None:
            yield
            return
        self.streams[1].wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.streams[1]):
            yield

    def join(self) -> None:
        """Lets what comes next wait for what runs beside."""
        if self.streams is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.streams[1])


class Compiler:
    """`torch.compile` for networks that may be copies of each other, which share what is alike, and for functions.

    Dynamo keeps compiled code with the code object that it is of, and refuses a ninth there (`recompile_limit`); all
    networks of one class, anybody's, would share that of its `forward`. Here every shape of images has a function of
    its own, which takes the network as an argument: with and without gradients, with parameters that require them and
    without. Of teacher, generator and fake score that is three graphs to trace instead of five.
    """

    def __init__(self, mode: str | None):
        self._mode = mode
        self._forwards: dict[tuple[torch.Size, bool, int | None], Callable[..., Any]] = {}
        self._fused: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which compile for themselves."""
        return {"_mode": self._mode, "_forwards": {}, "_fused": {}}

    def fused(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What the function gives, compiled for it and tensors of these shapes alone."""
        key = function, *(x.shape for x in tree_leaves((arguments, options)) if isinstance(x, Tensor))
        if key not in self._fused:
            self._fused[key] = torch.compile(_own_call(), fullgraph=True, dynamic=False, mode=self._mode)
        return self._fused[key](function, *arguments, **options)

    def __call__(
        self,
        network: Denoiser,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None,
        num_denoised: int | None = None,
    ) -> Any:
        """`D_x`; with `num_denoised` what `with_features` gives."""
        key = x.shape, network.is_one_graph, num_denoised
        if key not in self._forwards:
            self._forwards[key] = torch.compile(
                _own_forward(num_denoised), fullgraph=network.is_one_graph, dynamic=False, mode=self._mode
            )
        # Else dynamo takes two networks for alike of which one has hooks.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            return self._forwards[key](network, x, sigma, class_labels)


class CompiledNetwork:
    """A compiled denoiser. Hooks on the network are traced, its own alone; with other hooks it is traced anew."""

    def __init__(self, network: Denoiser, compiler: Compiler):
        self.image_shape, self.num_classes = network.image_shape, network.num_classes
        self.sigma_data, self.dynamics = network.sigma_data, network.dynamics
        self.is_one_graph, self.foreign_name = network.is_one_graph, network.foreign_name
        self._network, self._compiler = network, compiler

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self._compiler(self._network, x, sigma, class_labels)

    def with_features(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, *, num_denoised: int
    ) -> tuple[Tensor, Tensor]:
        return self._compiler(self._network, x, sigma, class_labels, num_denoised)


def _own_forward(num_denoised: int | None) -> Callable[..., Any]:
    if num_denoised is None:

        def forward(network: Denoiser, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Any:
            return network(x, sigma, class_labels)
    else:

        def forward(network: Denoiser, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Any:
            return network.with_features(x, sigma, class_labels, num_denoised=num_denoised)

    return _with_own_code(forward)


def _own_call() -> Callable[..., Any]:
    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    return _with_own_code(call)


def _with_own_code(function: Any) -> Callable[..., Any]:
    """Functions of one definition share their code object. Another name makes this one unequal to theirs, too."""
    function.__code__ = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return function


class CapturedTurn:
    """A turn as a CUDA graph: the first calls run it eagerly, the next one captures it, all others replay it.

    The eager calls are iterations like any other; they run on the stream that will capture, so that every tensor that
    outlives them belongs to it, as do the workspaces of cuBLAS, which are a stream's own (notes of CUDA semantics, as
    is that a backward pass runs on the streams of its forward pass, and so is captured with it). The graph holds
    addresses: `run` must read and write the same buffers every time, and what it makes besides is not to be read after
    it. It may fork to another stream that it joins again.

    So turns may share a `pool`, in whatever order they are replayed, but never two that run at the same time; and they
    need to share the stream, since the allocator gives freed memory to the stream that it was of (notes of
    `torch.cuda.graph`). Turns that do run at the same time need streams and pools of their own.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: Any):
        self._stream, self._pool = stream, pool
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def __call__(self, run: Callable[[], None]) -> None:
        if self._graph is None and self._num_calls == NUM_WARMUP_CALLS:
            self._graph = self._capture(run)
        if self._graph is not None:
            return self._graph.replay()  # on the current stream
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                run()
        finally:  # after an error, too: others may use what it has begun to write
            current.wait_stream(self._stream)
        self._num_calls += 1

    def _capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Nothing in here may wait for the device, or be compiled or chosen by measuring: warm-up calls did that.

        What would be compiled now raises, in place of a graph of unknown content; what waits, CUDA itself refuses.
        """
        graph = torch.cuda.CUDAGraph()
        # The outer block makes the device current, and ends where a failed capture leaves the inner one's stream.
        with (
            torch.compiler.set_stance("fail_on_recompile"),
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            run()
        return graph
