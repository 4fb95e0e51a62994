"""Results that are stored are of today's sources, or name their commit; the README's figures are theirs."""

import argparse
import json
import re
import sys

import pytest

from benchmarks import environment, loops
from benchmarks.sources import ROOT, source_hashes
from benchmarks.suite import readme, registry, report, stored
from benchmarks.suite.compare import compare
from benchmarks.suite.registry import Benchmark
from benchmarks.suite.rows import Row
from fastdmd.distill import execution

CPU = [measured for measured in registry.BENCHMARKS if measured.device == "cpu" and not measured.on_request]


@pytest.mark.parametrize("measured", CPU, ids=lambda measured: measured.name)
def test_stored_results_are_of_these_sources(measured):
    """Those that are not are measured anew by `python -m benchmarks --stale`, on a quiet machine."""
    assert stored.fault(measured) is None


def test_what_is_made_of_stored_results_is_of_them():
    """If not, `python -m benchmarks --write-readme` makes it."""
    for path, text in readme.pages().items():
        assert path.read_text() == text, path


def test_stored_results_of_gpus_name_their_commits():
    results = [result for result in stored.found(stored.RESULTS) if result.benchmark.device == "cuda"]
    assert len(results) >= 8
    for result in results:
        assert re.fullmatch(r"[0-9a-f]{7}(, [0-9a-f]{7})*", result.commits), result.path
        assert result.commits in result.came_from and result.came_from in report.markdown([result], {})


def test_every_stored_figure_can_be_compared_once():
    for result in stored.found(stored.RESULTS):
        labels = [row.label for row in result.rows]
        assert labels and len(set(labels)) == len(labels)
        assert set(compare([result.rows], [result.rows], "itself", same_machine=True).times.values()) == {1.0}


@pytest.mark.parametrize("measured", registry.BENCHMARKS, ids=lambda measured: measured.name)
def test_sources_are_there(measured):
    hashes = source_hashes(measured.sources)
    assert measured.module.replace(".", "/") + ".py" in hashes
    times_kernels = measured.name != "cpu-busy" and not measured.name.startswith("inspect")
    assert ("csrc/cpu/conv3x3.cpp" in hashes) == times_kernels
    assert ("fastdmd/kernels/dm_loss.py" in hashes) == (not measured.name.startswith("cpu"))


def test_a_name_of_no_file_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"expected files named fastdmd/nothing\*.py, got none"):
        source_hashes(["benchmarks/sources.py", "fastdmd/nothing*.py"])


def test_what_a_cycle_runs_is_among_its_sources():
    files = set()

    def note(frame, event, argument):
        if event == "call":
            files.add(frame.f_code.co_filename)

    arguments = argparse.Namespace(
        preset="mnist",
        device="cpu",
        batch_size=1,
        ratio=1,
        precision="fp32",
        execution="auto",
        compile_mode=execution.COMPILE_MODE,
    )
    for name in ("fastdmd", "textbook"):
        loop = loops.make(name, arguments)
        sys.setprofile(note)
        try:
            loop.cycle()
        finally:
            sys.setprofile(None)
    ran = {name for name in source_hashes(["fastdmd/**/*.py", "benchmarks/*.py"]) if str(ROOT / name) in files}
    assert {"fastdmd/distill/turns.py", "fastdmd/ops/_math.py", "benchmarks/textbook.py"} <= ran
    assert ran <= source_hashes(registry.STEP).keys()


@pytest.fixture
def folder(tmp_path):
    """Sources of a benchmark, `BENCHMARK`, and a result of them."""
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    hashes = source_hashes(BENCHMARK.sources, tmp_path)
    assert list(hashes) == ["a.py", "b.py"] and all(re.fullmatch("[0-9a-f]{16}", hash) for hash in hashes.values())
    result = {"seconds": 2.0, "command": BENCHMARK.command, "sources": hashes, "device": "CPU", "commit": "abc1234"}
    stored.write(tmp_path / "cpu-ours.json", result)
    return tmp_path


def figures(result):
    return [Row("one", result["seconds"], "s", ratio=4 / result["seconds"], yardstick="eager")]


BENCHMARK = Benchmark("cpu-ours", "one thing", "ours", ("--fast",), figures, ("*.py",), 1)


def test_a_result_of_today_is_not_stale(folder):
    assert stored.fault(BENCHMARK, folder, folder) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "a.py").write_text("a = 2\n"), "other sources since: a.py"),
        (lambda folder: (folder / "c.py").write_text(""), "other sources since: c.py"),
        (lambda folder: (folder / "b.py").unlink(), "other sources since: b.py"),
        (lambda folder: (folder / "cpu-ours.json").unlink(), "got no such file"),
        (lambda folder: (folder / "cpu-ours.json").write_text('{"seco'), "got other contents: JSONDecodeError"),
        (lambda folder: (folder / "cpu-ours.json").write_text("[1]"), "got other contents: AttributeError"),
        (lambda folder: (folder / "cpu-ours.json").write_text("{}"), "got other contents: KeyError: 'seconds'"),
        (lambda folder: (folder / "cpu-ours.json").write_text('{"seconds": 1}'), "not say of which sources"),
        (
            lambda folder: edit(folder / "cpu-ours.json", command=["-m", "ours"]),
            "of -m ours --fast, got ['-m', 'ours']",
        ),
    ],
)
def test_what_makes_a_result_stale(change, told, folder):
    change(folder)
    assert told in stored.fault(BENCHMARK, folder, folder)


def edit(path, **changes):
    stored.write(path, {**json.loads(path.read_text()), **changes})


def test_results_lie_under_the_name_of_their_card(folder, monkeypatch):
    gpu = Benchmark("gpu-ours", "the same", "ours", (), figures, (), 1)
    monkeypatch.setattr(registry, "BENCHMARKS", (BENCHMARK, gpu))
    assert BENCHMARK.file_name("h100") == "cpu-ours.json" and gpu.file_name("l40s") == "l40s-ours.json"
    for name in ("h100-ours", "l40s-ours", "h100-more-ours", "h100-ours-b2"):
        stored.write(folder / f"{name}.json", {"stage": "ours", "measured": {"seconds": 3.0}})
    found = stored.found(folder)
    assert [result.path.stem for result in found] == ["cpu-ours", "h100-ours", "l40s-ours"]
    assert [result.rows[0].value for result in found] == [2.0, 3.0, 3.0]
    assert stored.fault(gpu, folder, folder) is None


def test_the_name_of_a_gpu(monkeypatch):
    for device, name in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA L40S", "l40s"), ("Something", "gpu")):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device=device: device)
        assert environment.gpu_name() == name
