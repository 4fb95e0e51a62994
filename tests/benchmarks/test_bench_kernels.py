"""The kernel benchmark on a CPU: its cases, bytes and table; a GPU is needed for its times alone."""

import contextlib
import dataclasses
import math
import os
import signal
import time

import pytest
import torch

from benchmarks import bench_kernels, gpu_timer, kernel_cases
from benchmarks.kernel_cases import Case
from benchmarks.worker import Worker


def tiny(case):
    """The same case with few elements."""
    if case.op == "adamw_ema_":
        return dataclasses.replace(case, shape=(1003,), compiled=False)
    return dataclasses.replace(case, shape=(3, case.shape[1], 4, 4), compiled=False)


ON_A_GPU = ("triton", "native", "compiled")
CASES = sorted({tiny(case) for case in kernel_cases.cases()}, key=str)


@pytest.fixture
def stopped_clock(monkeypatch):
    def time_calls(calls):
        for call in calls:
            call()
        return {"seconds": 1e-6 * len(calls), "replays": 1, "calls": len(calls), "method": "none", "launches": 1.0}

    monkeypatch.setattr(gpu_timer, "time_calls", time_calls)
    monkeypatch.setattr(bench_kernels, "GRAPH_BYTES", 1)  # four calls


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(case, name) for case in CASES for name in (*case.implementations, "reference") if name not in ON_A_GPU],
    ids=str,
)
def test_every_case_is_measured(case, implementation, stopped_clock):
    with torch.no_grad():
        row = bench_kernels.measure(case, implementation, "cpu")
    assert row["calls"] == row["input_sets"] == 4
    if (case.op, implementation) in bench_kernels.RANDOM:
        assert row["error_of_result"] is None
    else:
        # What one would write computes in the narrow dtype.
        allowed = 1e-5 if case.dtype == "float32" else 3e-2
        assert row["error_of_result"] <= (allowed if implementation != "reference" else 0)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # 2 x 3 x 4 x 4 values read thrice and written once; the loss.
        (Case("dm_loss", "bfloat16", (2, 3, 4, 4)), 4 * 96 * 2 + 4),
        (Case("add_noise", "float32", (2, 3, 4, 4)), 3 * 96 * 4 + 2 * 4),
        (Case("add_noise_rng", "float32", (2, 3, 4, 4)), 2 * 96 * 4 + 2 * 4 + 4 * 8),
        # grad_y, x and grad_x; weight, bias and their gradients; the moments of 2 x 32 groups.
        (
            Case("group_norm_silu_backward", "bfloat16", (2, 64, 4, 4), True),
            3 * 2048 * 2 + 4 * 64 * 2 + 2 * 64 * 4,
        ),
        # 8 values of float32 and 2 gradients; the copy; step twice and learning rate.
        (Case("adamw_ema_", "bfloat16", (100,)), 8 * 400 + 2 * 200 + 200 + 2 * 8 + 4),
    ],
    ids=str,
)
def test_bytes(case, expected):
    given = kernel_cases.arguments(case, "cpu")
    returned = kernel_cases.results(case.op, given, kernel_cases.reference(case.op)(*given))
    assert kernel_cases.bytes_moved(case.op, given, returned) == expected


def test_sizes():
    """Tensors are of 64 or 256 MB, or of a real batch; no case comes twice."""
    found = kernel_cases.cases()
    assert len(set(map(str, found))) == len(found)
    real = {*kernel_cases.REAL_IMAGES, *kernel_cases.REAL_FEATURE_MAPS}
    for case in found:
        itemsize = 4 if case.op == "adamw_ema_" else kernel_cases.DTYPES[case.dtype].itemsize
        size = math.prod(case.shape) * itemsize / 1e6
        assert case.shape in real or min(abs(size - 64), abs(size - 256)) < 3


class FakeGraph:
    """Stands for a CUDA graph and its capture; replaying one takes a tick of the clock for every call in it."""

    clock, current, capturable = 0, None, True

    def __init__(self, keep_graph):
        assert keep_graph
        self.calls = 0

    @contextlib.contextmanager
    def capture(self, stream):
        assert stream == "stream"
        FakeGraph.current = self
        yield
        FakeGraph.current = None
        if not FakeGraph.capturable:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    def instantiate(self):
        pass

    def replay(self):
        FakeGraph.clock += self.calls

    @staticmethod
    def call():
        if FakeGraph.current is None:
            FakeGraph.clock += 10
        else:
            FakeGraph.current.calls += 1


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = FakeGraph.clock

    def elapsed_time(self, other):
        return other.time - self.time


@pytest.mark.parametrize("capturable", [True, False])
def test_the_timer(capturable, monkeypatch):
    """Milliseconds of one call, in a graph or, if that fails, launched."""
    monkeypatch.setattr(FakeGraph, "capturable", capturable)
    monkeypatch.setattr(gpu_timer, "num_nodes", lambda graph: 2 * graph.calls)
    for name, value in {
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "graph": FakeGraph.capture,
        "synchronize": lambda: None,
        "current_stream": lambda: "stream",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    timed = gpu_timer.time_calls([FakeGraph.call] * 3)
    assert timed["calls"] == 3
    assert timed["seconds"] == pytest.approx(1e-3 if capturable else 1e-2)
    assert timed["launches"] == (2 if capturable else None)
    assert timed["method"] == ("graph" if capturable else "launches, no graph: operation not permitted")
    assert timed["replays"] == (13 if capturable else 5)  # of 3 and 30 ms


def test_sets_outgrow_the_cache():
    for moved in (1_600_000, 130_000_000, 2_000_000_000):
        num_calls, num_sets = bench_kernels.plan(moved)
        assert 1 <= num_sets <= num_calls <= 256 and num_calls >= 4
        assert num_sets * moved >= bench_kernels.UNCACHED_BYTES


def test_errors_are_relative_to_the_reference():
    a = torch.tensor([3.0, 4.0])
    assert kernel_cases.relative_error((a, a), (a, a)) == 0
    assert kernel_cases.relative_error((a, 1.1 * a), (a, a)) == pytest.approx(0.1, rel=1e-5)
    assert math.isnan(kernel_cases.relative_error((a * math.nan, a), (a, a)))
    assert math.isnan(kernel_cases.relative_error((a[:1],), (a,)))


def test_table():
    report = bench_kernels.Report(None, {"copy": {"bytes_per_second": 3e12}})
    case = Case("dm_loss", "float32", (1302, 3, 64, 64))
    timed = {"seconds": 1e-4, "bytes": 240_000_000, "launches": 1.0, "error_of_result": 2e-8}
    report.add(case, "triton", timed)
    report.add(case, "eager", {**timed, "seconds": 1e-3, "launches": 12.0})
    report.add(case, "native", {"failed": "RuntimeError: an illegal memory access"})
    assert report.rows[0]["gigabytes_per_second"] == pytest.approx(2400)
    assert report.rows[0]["percent_of_copy"] == pytest.approx(80)
    _, line, error = bench_kernels.table(report.rows).splitlines()
    assert line.split() == ["dm_loss", "float32", "1302x3x64x64", "8", "80", "failed", "100.0", "1/nan", "2e-08"]
    assert error == "failed 1, native dm_loss float32 1302x3x64x64: RuntimeError: an illegal memory access"
    report.rows[-1] = {**report.rows[0], "implementation": "native", "error_of_result": math.nan}
    assert bench_kernels.table(report.rows).split()[-1] == "nan"  # a wrong result is never hidden by a right one


def test_a_lost_process_costs_one_job():
    worker = Worker(contextlib.nullcontext)
    try:
        assert worker(divmod, 7, 2, seconds=30) == (3, 1)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            worker(divmod, 7, 0, seconds=30)
        first = worker(os.getpid, seconds=30)
        with pytest.raises(RuntimeError, match="died"):
            worker(signal.raise_signal, signal.SIGKILL, seconds=30)
        second = worker(os.getpid, seconds=30)
        with pytest.raises(RuntimeError, match="longer than 1 s"):
            worker(time.sleep, 30, seconds=1)
        assert len({first, second, worker(os.getpid, seconds=30)}) == 3
    finally:
        worker.close()
