"""The timeline of a GPU: arithmetic of intervals, what a trace says, and what a loop is found to do."""

import argparse
import json
import random
import warnings
from collections import Counter

import pytest
import torch

from benchmarks import timeline
from benchmarks.gpu_trace import Activity, family, length, read_trace, summarize, union


def test_a_union_of_intervals():
    assert union([]) == [] and length([]) == 0
    assert union([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]  # out of order, overlapping, touching
    assert union([(0, 10), (2, 3), (4, 10), (10, 10)]) == [(0, 10)]  # one in another


def test_a_union_covers_the_same_points():
    generator = random.Random(0)
    for _ in range(200):
        starts = [generator.randrange(40) for _ in range(generator.randrange(1, 12))]
        intervals = [(start, start + generator.randrange(1, 9)) for start in starts]
        merged = union(intervals)
        covered = {point for start, end in intervals for point in range(start, end)}
        assert [point for start, end in merged for point in range(start, end)] == sorted(covered)
        assert length(merged) == len(covered)
        assert all(end < start for (_, end), (start, _) in zip(merged, merged[1:], strict=False))


ACTIVITIES = [
    Activity(10.0, 14.0, "kernel", "triton_poi_fused_silu_0", 7),
    Activity(12.0, 20.0, "kernel", "sm90_xmma_fprop", 13),
    Activity(23.0, 24.0, "memcpy", "Memcpy HtoD (Pageable -> Device)", 7),
    Activity(24.0, 25.0, "memcpy", "Memcpy DtoD (Device -> Device)", 7),
    Activity(30.0, 34.0, "kernel", "triton_poi_fused_silu_0", 7),
    Activity(35.0, 37.0, "memset", "Memset (Device)", 7),
]


def test_a_summary_of_activities():
    summary = summarize(ACTIVITIES)
    assert (summary["span_us"], summary["busy_us"], summary["busy_with_kernels_us"]) == (27, 18, 14)
    assert summary["idle_share"] == pytest.approx(9 / 27) and summary["overlap"] == pytest.approx(20 / 18)
    assert summary["counts"] == {"kernel": 3, "memcpy": 2, "memset": 1}
    assert (summary["streams"], summary["host_to_device"]) == (2, 1)
    assert list(summary["kernels"].items())[:2] == [
        ("triton_poi_fused_silu_0", {"us": 8, "share": 0.4, "count": 2}),
        ("sm90_xmma_fprop", {"us": 8, "share": 0.4, "count": 1}),
    ]
    assert summary["families"] == {
        "fused by Inductor": {"us": 8, "share": 0.4, "count": 2},
        "convolutions and matrix products": {"us": 8, "share": 0.4, "count": 1},
        "copies and casts": {"us": 4, "share": 0.2, "count": 3},
    }
    assert [(gap["us"], gap["after"][:11], gap["before"][:11]) for gap in summary["gaps"]] == [
        (5, "Memcpy DtoD", "triton_poi_"),
        (3, "sm90_xmma_f", "Memcpy HtoD"),
        (1, "triton_poi_", "Memset (Dev"),
    ]


def test_one_activity_leaves_nothing_idle():
    summary = summarize(ACTIVITIES[:1])
    assert (summary["span_us"], summary["idle_share"], summary["overlap"], summary["gaps"]) == (4, 0, 1, [])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("triton_poi_fused__scaled_dot_product_flash_attention_convolution_3", "fused by Inductor"),
        ("triton_tem_fused_convolution_12", "convolutions and matrix products"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwc", "convolutions and matrix products"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "convolutions and matrix products"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float>(...)", "copies and casts"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", "copies and casts"),
        ("Memset (Device)", "copies and casts"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("fastdmd::group_norm_apply_vectors<__nv_bfloat16>", "norms"),
        ("forward_kernel", "norms"),
        ("norm_kernel", "optimizer"),
        ("fastdmd::adamw_ema_vectors<float>", "optimizer"),
        ("dm_kernel", "noise and losses"),
        ("fastdmd::add_noise_any<float>", "noise and losses"),
        ("void at::native::distribution_elementwise_grid_stride_kernel<...>", "torch's own and others"),
    ],
)
def test_a_kernel_belongs_to_a_family(name, expected):
    assert family(name) == expected


def test_a_trace_is_read(tmp_path):
    def event(category, name, ts, dur, ph="X", **arguments):
        return {"ph": ph, "cat": category, "name": name, "ts": ts, "dur": dur, "args": arguments}

    path = tmp_path / "trace.json"
    events = [
        event("kernel", "b", 20.5, 1.5, stream=7),
        event("kernel", "a", 10, 2, stream=13),
        event("gpu_memcpy", "Memcpy HtoD", 15, 1, stream=7),
        event("gpu_memset", "Memset", 16, 1, stream=7),
        event("gpu_user_annotation", "cycle", 0, 100, stream=7),
        event("cuda_runtime", "cudaGraphLaunch", 1, 1),
        event("cuda_runtime", "cudaGraphLaunch", 5, 1),
        event("cuda_driver", "cuLaunchKernel", 6, 1),
        event("ac2g", "ac2g", 6, 0, ph="s"),
        {"ph": "M", "name": "process_name", "args": {}},
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    activities, calls = read_trace(path)
    assert activities == [
        Activity(10, 12, "kernel", "a", 13),
        Activity(15, 16, "memcpy", "Memcpy HtoD", 7),
        Activity(16, 17, "memset", "Memset", 7),
        Activity(20.5, 22, "kernel", "b", 7),
    ]
    assert calls == {"cudaGraphLaunch": 2, "cuLaunchKernel": 1}


class Loop:
    """A loop that does nothing, but what a test makes it do in an iteration."""

    def __init__(self, ratio=2, never=False, iterate=lambda step: None, device="cpu"):
        self.ratio, self.step, self.draws, self.model, self.device = ratio, 0, None, self, torch.device(device)
        self.executor, self.config = argparse.Namespace(name="captured"), argparse.Namespace(batch_size=4)
        self._never, self._then, self._num_calls = never, iterate, Counter()

    @property
    def captured_turns(self):
        """At its third call, as CapturedTurn is; or never."""
        return {turn for turn, n in self._num_calls.items() if n >= 3 and not (turn == "guidance" and self._never)}

    def iterate(self, step, draws):
        self._num_calls["generation" if step % self.ratio else "generator"] += 1
        self._num_calls["guidance"] += 1
        self._then(step)

    def synchronize(self):
        pass


def test_a_loop_is_warm_when_all_its_turns_are_captured():
    records = timeline.warm_up(Loop(ratio=2))
    assert len(records) == 8  # three cycles until the last turn has its graph, and a whole one after
    assert {r["iteration"]: r["captured"] for r in records if r["captured"]} == {
        2: ["guidance"],
        4: ["generator"],
        5: ["generation"],
    }
    assert len(timeline.warm_up(Loop(ratio=1))) == 4  # nothing is generated ahead
    with pytest.raises(RuntimeError, match=r"expected all turns captured after 16 iterations, got \['generation'"):
        timeline.warm_up(Loop(never=True))


@pytest.fixture
def cuda(monkeypatch):
    """What `steady` asks of CUDA, of a machine that has none; holds the bytes allocated."""
    state = argparse.Namespace(allocated=1000, mode="default")
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 64},
        {"segment_pool_id": (0, 3), "total_size": 32},
        {"segment_pool_id": (0, 5), "total_size": 8},
    ]
    for name, function in {
        "memory_allocated": lambda device: state.allocated,
        "max_memory_allocated": lambda device: 5000,
        "max_memory_reserved": lambda device: 6000,
        "reset_peak_memory_stats": lambda device: None,
        "memory_snapshot": lambda: segments,
        "set_sync_debug_mode": lambda mode: setattr(state, "mode", mode),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return state


def test_a_steady_loop_has_no_fault(cuda):
    result = timeline.steady(Loop(ratio=4, device="cuda"), 10)
    assert result["iterations"] == 12 and cuda.mode == "default"
    assert result["images_per_second"] == pytest.approx(48 / result["seconds"])
    assert result["seconds_per_cycle"] == pytest.approx(result["seconds"] / 3)
    assert result["memory"]["reserved_bytes"] == {"others": 64, "graphs": 40}
    assert result["host_syncs"] == 0 and timeline.faults({"steady": result}) == []


def test_syncs_and_growing_memory_are_faults(cuda):
    def iterate(step):
        assert cuda.mode == "warn"
        cuda.allocated += 8
        warnings.warn("a word about something else", stacklevel=1)
        if step % 2:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)

    result = timeline.steady(Loop(ratio=4, device="cuda", iterate=iterate), 12)
    assert result["host_syncs"] == 6 and list(result["host_syncs_by_line"].values()) == [6]
    assert next(iter(result["host_syncs_by_line"])).startswith("test_timeline.py:")
    assert result["memory"]["allocated_bytes"] == {"first": 1032, "last": 1096, "least": 1032, "most": 1096}
    first, second = timeline.faults({"steady": result})
    assert first.startswith("expected no host sync, got 6") and second.startswith("expected flat memory")


def test_what_needs_no_cuda_runs_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "timeline.json"
    options = ["--device", "cpu", "--execution", "eager", "--batch-size", "1", "--ratio", "2", "--iterations", "1"]
    assert timeline.main([*options, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["steady"]["iterations"] == 2 and result["execution"] == "eager" and "cycle" not in result
    assert result["steady"]["memory"] is result["steady"]["host_syncs"] is None
    utilisation = result["flops_per_cycle"] / result["steady"]["seconds_per_cycle"] / result["matmul_peak"]
    assert result["utilisation"]["of a large matrix product"] == pytest.approx(utilisation) and utilisation > 0
    assert "images/s over 2 iterations, eager" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--device", "cuda:99"], "got cuda:99"),
        (["--device", "cpu", "--ratio", "0"], "--ratio of at least 1, got 0"),
        (["--device", "cpu", "--iterations", "-1"], "--iterations of at least 1, got -1"),
        (["--device", "cpu", "--json", "no/such/folder.json"], "got no/such/folder.json"),
    ],
)
def test_mistakes_are_one_line(options, expected, capsys):
    assert timeline.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.timeline: error: expected") and expected in error and error.count("\n") == 1
