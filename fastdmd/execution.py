"""How networks and turns are executed on a GPU: networks by torch.compile, turns as CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdmd.diffusion import Denoiser
from fastdmd.unet import UNet

NUM_WARMUP_CALLS = 2  # of a captured turn: they validate, compile and allocate; the next one captures

_numbers = itertools.count()


class CompiledNetwork:
    """A denoiser by `torch.compile`, which compiles a function of its own for every shape of images.

    Dynamo keeps compiled code with the code object that it is of, and refuses a ninth there (`recompile_limit`); all
    networks of one class would share that of its `forward`. A function here has at most one with and one without
    gradients, for labels or none. Hooks on the network are traced, so they come before the first call.
    """

    def __init__(self, network: Denoiser, mode: str | None):
        self.dynamics = network.dynamics
        self._network, self._mode = network, mode
        self._forwards: dict[torch.Size, Denoiser] = {}

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if x.shape not in self._forwards:
            fullgraph = isinstance(self._network, UNet)  # what others wrote may break the graph, ours must not
            self._forwards[x.shape] = torch.compile(
                _own_forward(self._network), fullgraph=fullgraph, dynamic=False, mode=self._mode
            )
        return self._forwards[x.shape](x, sigma, class_labels)


def _own_forward(network: nn.Module) -> Denoiser:
    def forward(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        return network(x, sigma, class_labels)

    # Closures share their code object. Another name makes this one unequal to theirs, too.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    return forward


class CapturedTurn:
    """A turn as a CUDA graph: the first calls run it eagerly, the next one captures it, all others replay it.

    The eager calls are iterations like any other; they run on the stream that will capture, so that every tensor that
    outlives them belongs to it. The graph holds addresses: `run` must read and write the same buffers every time.
    """

    def __init__(self, run: Callable[[], None], device: torch.device, pool):
        self._run, self._pool, self._num_calls = run, pool, 0
        self._stream, self._graph = torch.cuda.Stream(device), None

    def __call__(self) -> None:
        self._num_calls += 1
        current = torch.cuda.current_stream(self._stream.device)
        if self._num_calls <= NUM_WARMUP_CALLS:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._run()
            current.wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream):
                self._run()
        self._graph.replay()
