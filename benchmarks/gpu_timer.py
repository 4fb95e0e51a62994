"""Times calls on a GPU without the host: captured in a graph, replayed, between events."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import statistics
from collections.abc import Callable, Sequence

import torch

WARM_UPS = 2
REPLAYS, SECONDS = (5, 30), 0.04  # bounds, and how long they may take together


def time_calls(calls: Sequence[Callable]) -> dict:
    """`seconds` of one of the calls, a median of `replays`; the `method`; kernels, copies and fills a call `launches`.

    All calls are one graph, so that no launch waits for Python. Their results stay alive until the last is captured:
    else all would be written to the same memory, which may not leave the cache. The current stream must not be the
    default one. What cannot be captured (`method` says why) is launched one by one.
    """
    for call in itertools.chain.from_iterable([calls] * WARM_UPS):
        call()
    torch.cuda.synchronize()
    launches, method = None, "graph"
    try:
        graph = _capture(calls)
        nodes, run = num_nodes(graph), graph.replay
        launches = None if nodes is None else nodes / len(calls)
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises again if it was no matter of capturing
        method = f"launches, no graph: {str(error).splitlines()[0]}"
        run = lambda: [call() for call in calls]  # noqa: E731
    run()
    first = median_seconds(run, 1)
    replays = int(min(max(SECONDS / first, REPLAYS[0]), REPLAYS[1]))
    seconds = median_seconds(run, replays) / len(calls)
    return {"seconds": seconds, "replays": replays, "calls": len(calls), "method": method, "launches": launches}


def _capture(calls: Sequence[Callable]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    gc.disable()  # what it frees, such as an earlier graph, may be forbidden while one is captured
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            results = [call() for call in calls]
    finally:
        gc.enable()
    del results
    graph.instantiate()
    return graph


def median_seconds(run: Callable, replays: int) -> float:
    """All are queued before the first ends, so that the host's time lies outside of the events."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    run()  # something to wait behind
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


def num_nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    """Of a captured graph: its kernels, copies and fills. None if the driver does not tell."""
    number = ctypes.c_size_t()
    with contextlib.suppress(OSError, AttributeError):
        count = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes
        if count(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(number)) == 0:
            return number.value
    return None
