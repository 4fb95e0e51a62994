"""The README's blocks of figures, of results with known ones."""

import pytest

from benchmarks.suite import readme, readme_tables, registry


def test_blocks_of_the_readme_are_filled(monkeypatch, tmp_path):
    (tmp_path / "x.json").write_text('{"n": 7}')
    monkeypatch.setattr(
        readme, "BLOCKS", {"a": lambda read: f"it is {read('x')['n']}", "b": lambda read: "| long |\n|---|"}
    )
    text = "before\n<!-- benchmarks: a -->\nold\n<!-- end -->\nbetween\n<!-- benchmarks: b -->\n<!-- end -->\nafter\n"
    expected = "before\n<!-- benchmarks: a -->\n\nit is 7\n\n<!-- end -->\nbetween\n"
    expected += "<!-- benchmarks: b -->\n\n| long |\n|---|\n\n<!-- end -->\nafter\n"
    assert readme.filled(text, tmp_path) == expected == readme.filled(expected, tmp_path)
    for wrong in (
        text.replace(": b", ": c"),
        text.replace(": b", ": a"),
        text.replace("<!-- end -->\nafter", "after"),
        "",
    ):
        with pytest.raises(ValueError, match="expected a block each of a, b, got"):
            readme.filled(wrong, tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="expected results to make a of, got others: KeyError: 'n'"):
        readme.filled(text, tmp_path)


def test_figures_of_the_readme():
    assert [readme_tables.digits(x) for x in (0.0317, 31.66, 40429.1, 0.9999, 2455.4)] == [
        "0.0317", "31.7", "40,400", "1.00", "2,460",
    ]  # fmt: skip
    assert readme_tables.span([3.0, 1.0, 2.0], readme_tables.digits) == "1.00 to 3.00"
    assert readme_tables.span([2.0, 2.001], readme_tables.digits) == "2.00"


def ops_result():
    def row(variant, op, dtype, elements, seconds):
        return {"op": op, "variant": variant, "dtype": dtype, "elements": elements, "seconds": seconds}

    rows = [row("copy", "copy", "float32", 1000, 1e-7)]
    for elements, eager, compiled, native in ((1000, 6e-6, 3e-6, 2e-6), (2000, 8e-6, 8e-6, 2e-6)):
        times = (("eager", eager), ("compiled", compiled), ("native", native), ("reference", 1.0))
        rows += [row(variant, "dm_loss", "float32", elements, seconds) for variant, seconds in times]
    rows += [row(v, "conv3x3 4-4 2", "float32", 4000, s) for v, s in (("eager", 9e-6), ("native", 6e-6))]
    return {"device": "CPU, AVX2", "commit": "abc1234", "results": rows}


def test_the_ops_of_the_readme():
    said, table = readme_tables.ops(lambda name: ops_result()).split("\n\n")
    assert said.startswith("On one thread of a CPU, AVX2") and "commit abc1234" in said
    assert table.splitlines()[2:] == [
        "| `dm_loss` and its gradient | 1.0 to 2.0 | 3.0 to 4.0 | 1.5 to 4.0 | | | |",
        "| `conv3x3`, forward and backward | 1.5 | 1.5 | | | | |",
    ]
    rows = {row.label: (row.value, row.ratio) for row in registry.BENCHMARKS[0].rows(ops_result())}
    assert rows == {
        "dm_loss, float32, 0.004 MB": pytest.approx((2.0, 3.0)),
        "dm_loss, float32, 0.008 MB": pytest.approx((1.0, 4.0)),
        "conv3x3 4-4 2, float32, 0.016 MB": pytest.approx((1.5, 1.5)),
    }


def step_result(precision, ratio):
    return {
        "commit": f"of {precision}",
        "settings": {"batch_size": 128, "ratio": 10},
        "peak_bytes": {"fastdmd": 2e9, "textbook": 3e9} if precision == "fp32" else {},
        "images_per_second": {"fastdmd": 50.0 if precision == "fp32" else 60.0},
        "ratio_to_textbook": ratio,
        "time_over_floor": 0.9,
        "seconds_per_cycle": {"fastdmd": [4.0, 5.0, 100.0]},
        "seconds_by_op": {
            "native::conv3x3": 2.0,
            "aten::convolution_backward": 1.0,
            "group_norm_silu": 0.5,
            "add": 9.0,
        },
        "seconds_by_part": {"optimizer": 0.02},
    }


def test_the_cycles_of_the_readme():
    made = readme_tables.cycles(lambda name: step_result(name[-4:], 1.5 if name.endswith("fp32") else 2.0))
    table, said = made.split("\n\n")
    assert table.splitlines()[2] == "| MNIST | 128 | 10 | 1.50× | 2.00× | 2.00 GB (3.00 GB) |"
    assert said.startswith(
        "Files `cpu-step-*` in [results](benchmarks/results), commit of fp32, of bf16. Images a second"
    )
    assert " in float32 times 1.20 on MNIST, 1.20 on CIFAR-10. " in said and "0.90 of the time" in said
    assert said.endswith("60 % convolutions, 10 % GroupNorm and SiLU, 0 % attention, 0.4 % the optimizer.")
    cycles, memory = registry.chosen(["b128-fp32"], "cpu")[0].rows(step_result("fp32", 1.5))
    assert (cycles.value, cycles.more_is_better, cycles.ratio) == (50.0, True, 1.5)
    assert (memory.value, memory.more_is_better, memory.ratio) == (2.0, False, 1.5)


def test_the_cycles_on_a_gpu_of_the_readme():
    def read(name):
        seconds = {"fastdmd": [0.1, 0.2, 0.2], "compiled": 0.4, "compiled, before": 0.8, "textbook": 1.0, "floor": 0.1}
        settings = {"preset": name.split("-", 2)[2], "batch_size": 8, "ratio": 5}
        return {"commit": f"of {name}", "settings": settings, "seconds_per_cycle": seconds}

    lines = [line.split(" | ") for line in readme_tables.gpu_cycles(read).splitlines()]
    assert lines[0][1] == "MNIST, batch 8, ratio 5, H200" and lines[0][2] == "CIFAR-10, batch 8, ratio 5, H100"
    assert [line[1] for line in lines[2:5]] == [
        "200 ms, 200 images/s",
        "400 to 800 ms, 50.0 to 100 images/s",
        "1,000 ms, 40.0 images/s",
    ]
    assert [line[1] for line in lines[5:7]] == ["2.00 to 4.00×", "5.00×"]
    assert lines[7][1] == "[of h200-step-mnist](benchmarks/results/h200-step-mnist.json)"


def test_the_kernels_of_the_readme():
    """The better one of ours, on tensors of 64 MB alone; not what PyTorch compiles."""

    def row(implementation, percent, shape=(16_000_000,), **others):
        named = {"op": "adamw_ema_", "dtype": "float32", "layout": "contiguous", "seconds": 1.0, **others}
        return {**named, "implementation": implementation, "percent_of_copy": percent, "shape": list(shape)}

    norm = {"op": "group_norm_silu", "layout": "channels_last"}
    results = [row("triton", 80.0), row("native", 90.0), row("eager", 30.0), row("compiled", 99.0)]
    results += [row("native", 97.0, (64_000_000,)), row("triton", 5.0, dtype="bfloat16", commit="def5678")]
    results += [row("native", 60.0, (20, 192, 64, 64), **norm), row("native", 70.0, (41, 384, 32, 32), **norm)]
    results += [{key: value for key, value in row("native", 0, (20, 192, 64, 64), **norm).items() if key != "seconds"}]
    cells = {op: readme_tables.kernel(op, op, results, "abc1234") for op in ("adamw_ema_", "group_norm_silu")}
    assert cells["adamw_ema_"] == ["adamw_ema_", "90", "5", "30", "", "abc1234, def5678"]
    assert cells["group_norm_silu"] == ["group_norm_silu", "60 to 70", "", "", "", "abc1234"]


def test_where_the_time_goes_on_a_gpu():
    def read(name):
        families = {"norms": {"share": 0.25}} | ({"optimizer": {"share": 0.0005}} if "imagenet" in name else {})
        return {
            "commit": "abc1234",
            "settings": {"preset": name.split("-", 2)[2]},
            "cycle": {"families": families},
            "utilisation": {"of a large matrix product": 0.5, "of nominal": 0.38},
            "idle_share_without_profiler": 0.021,
            "steady": {"host_syncs": 0, "iterations": 500, "memory": {"peak_reserved_bytes": 24.9e9}},
            "first_iteration_seconds": 53.4,
        }

    lines = readme_tables.profiles(read).splitlines()
    assert lines[0] == "| of a cycle's time | MNIST, H200 | MNIST, H100 | CIFAR-10, H100 | ImageNet-64, H100 |"
    assert lines[2:4] == ["| norms | 25 % | 25 % | 25 % | 25 % |", "| optimizer | | | | 0.05 % |"]
    assert [line.split(" | ")[1] for line in lines[4:-1]] == [
        "50 %",
        "38 %",
        "2 %",
        "0 times in 500",
        "24.9 GB",
        "53 s",
    ]
