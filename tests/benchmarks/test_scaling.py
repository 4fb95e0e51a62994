"""The scaling of a cycle: what is counted, what is not measured twice, and what is told of known numbers."""

import json
import re
import sys
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bench_scaling
from benchmarks.bench_scaling import Cycle, Point
from benchmarks.sources import ROOT, source_hashes
from benchmarks.suite import lines, registry, report, scaling
from benchmarks.suite.registry import Benchmark
from benchmarks.suite.stored import Stored


def products(network, image_size):
    """FLOPs of a forward pass of an image in convolutions and matrix products, from their shapes."""
    found = []

    def note(module, _, output):
        weight = module.weight.numel()
        found.append(2 * weight * (output.shape[-2] * output.shape[-1] if output.ndim == 4 else 1))

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(note)
    network(torch.zeros(1, 1, image_size, image_size), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    return sum(found)


def test_flops_of_a_width():
    """Of two iterations: two images made, teacher and fake score, a backward; and twice a forward and a backward, of
    which each is two forwards but for the first layers, whose inputs have no gradient; attention comes on top."""
    counted = {}
    for width in (8, 16):
        cycle = Cycle(Point("width", 1, 1, width, 16), device="cpu", precision="fp32", execution="eager")
        counted[width] = cycle.count_flops()
        forward = products(bench_scaling.make_network(width, 16), 16)
        assert 0.9 * 6 * forward < counted[width] < 1.03 * 6 * forward
    assert 3.5 < counted[16] / counted[8] < 4
    larger = Cycle(Point("resolution", 1, 1, 8, 32), device="cpu", precision="fp32", execution="eager").count_flops()
    assert 3.5 < larger / counted[8] < 4.3  # of attention, more than 4
    assert bench_scaling.make_network(8, 32).config.attention_resolutions == (8,)  # the coarsest of 16 and 8


def test_a_point_is_measured():
    point = Point("batch", 3, 1, 8, 16)
    threads = torch.get_num_threads()
    try:
        measured = Cycle(point, device="cpu", precision="fp32", execution="eager").measure(2, 0.0)
    finally:
        torch.set_num_threads(threads)
    assert len(measured["seconds_per_cycle"]) == 2
    assert measured["images_per_second"] == 2 * 3 / min(measured["seconds_per_cycle"])
    assert measured["peak_bytes"] >= measured["rest_bytes"] > 2**20
    assert measured["execution"] == "eager" and measured["matmul_peak"] > 1e8


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["bench_scaling", "--device", "cpu", *options])
    bench_scaling.main()


def test_what_a_file_has_is_not_measured_again(monkeypatch, tmp_path, capsys):
    """A point that fails, for memory perhaps, ends its series of its number of threads."""
    asked = []

    def in_a_process(point, method, *arguments, **options):
        asked.append((method, point.batch_size, point.threads, point.model_channels))
        if method == "count_flops":
            return 1e9 * point.model_channels
        if point.batch_size >= 8 and point.threads == 1:
            raise RuntimeError("out of memory")
        rate = 10.0 * point.threads
        return {"images_per_second": rate, "peak_bytes": 2e9, "rest_bytes": 1e9, "matmul_peak": 1e12}

    monkeypatch.setattr(bench_scaling, "in_a_process", in_a_process)
    monkeypatch.setattr(bench_scaling, "BATCHES", {"cpu": 4})
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    file = tmp_path / "scaling.json"
    run(monkeypatch, "--series", "batch", "--json", str(file))
    measured = [(batch, threads) for method, batch, threads, _ in asked if method == "measure"]
    assert measured == [(1, 1), (2, 1), (4, 1), (8, 1), *((batch, 2) for batch in (1, 2, 4, 8, 16))]
    assert [method for method, *_ in asked].count("count_flops") == 1  # of one network
    assert "out of memory" in capsys.readouterr().out
    asked.clear()
    run(monkeypatch, "--series", "batch,width", "--json", str(file))
    assert [one[1:3] for one in asked if one[0] == "measure"] == [(8, 1)] + [(bench_scaling.BATCH_SIZE, 2)] * 5
    result = json.loads(file.read_text())
    assert len(result["results"]) == 8 + 5 and result["settings"]["ratio"] == 2
    assert list(result["sources"]) == list(source_hashes(registry.sources_on_request("scaling", "cpu")))
    rows = {row.label: (row.value, row.ratio) for row in scaling.rows(result)}
    assert rows["batch 4, 2 threads"] == (20.0, pytest.approx(20 * 48e9 / 1e12)) and rows["batch 1, 1 thread"][0] == 10
    asked.clear()
    run(monkeypatch, "--series", "width", "--precision", "bf16", "--json", str(file))
    assert len([one for one in asked if one[0] == "measure"]) == 5 and len(json.loads(file.read_text())["results"]) == 5
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, "--series", "depth")
    assert (
        raised.value.code == 2
        and "expected series out of batch, width, resolution, got depth" in capsys.readouterr().err
    )


def row(series, rate, **changes):
    base = {"series": series, "batch_size": 48, "threads": 2, "model_channels": 48, "image_size": 28}
    measured = {"images_per_second": rate, "flops_per_image": 1e9, "matmul_peak": 1e12, "rest_bytes": 300_000_000}
    batch = changes.get("batch_size", 48)
    return base | measured | {"peak_bytes": 400_000_000 + 2_000_000 * batch} | changes


def result():
    """Two iterations of batch 1 take 20 ms, 4 ms of them arithmetic at the best rate of 500 images/s."""
    rates = {1: 100.0, 2: 180.0, 4: 300.0, 16: 460.0, 64: 500.0, 128: 400.0}
    found = [row("batch", rate, batch_size=batch) for batch, rate in rates.items()]
    found += [
        row("batch", rate / (1 if batch == 1 else 1.6), batch_size=batch, threads=1) for batch, rate in rates.items()
    ]
    found += [row("width", 900.0, model_channels=24, flops_per_image=0.25e9), row("width", 450.0)]
    caches = {"L1": 2**15, "L2": 2**20, "L3": 2**25}
    return {"results": found, "settings": {"ratio": 2, "precision": "fp32"}, "caches": caches}


def test_what_is_told_of_known_numbers():
    dispatch, caches, threads, memory, width = scaling.told(result()).split("\n\n")
    assert "at batch 64, an image of an iteration takes 2.00 ms (500 GFLOP/s)" in dispatch
    assert "takes 20.0 ms, of which 16.0 ms are beyond that" in dispatch and "8.00 ms an iteration" in dispatch
    assert "Batch 4 is the first with half of the best rate, batch 16 the first with nine tenths" in dispatch
    assert "an image is 37.6 kB" in caches  # 48 x 14 x 14 x 4 bytes
    assert "L2 (1.0 MB) is full at batch 56: from 16 to 64 images the rate rises, 460 to 500" in caches
    assert "L3 (32 MB) is full at batch 890, which was not crossed" in caches
    assert "Batch 128 has 0.80 of the best rate" in caches
    assert "1.00 times as fast as 1 at batch 1, 1.60 times at batch 128, and at most 1.60" in threads
    assert (
        "Batch 1 takes 402 MB, 300 MB of it before anything is built; from batch 64 to 128 every image adds 2.00 MB"
        in memory
    )
    assert "from 24 to 48 4.0 and 2.0 times: 0.23 of a matrix product's rate at first, 0.45 at last" in width


def test_what_is_on_request_is_stale_only_where_it_is_named(monkeypatch, capsys):
    long = Benchmark("cpu-long", "more", "more", (), lambda result: [], ("README.md",), 100, on_request=True)
    monkeypatch.setattr(registry, "BENCHMARKS", (long,))
    monkeypatch.setattr(command, "write_pages", lambda: None)
    run = []
    monkeypatch.setattr(command, "run_all", lambda benchmarks, *_: run.extend(benchmarks) or 0)
    for name in command.SPOILING:
        monkeypatch.delenv(name, raising=False)
    assert command.main(["--stale"]) == 0 and run == []
    assert "nothing is stale" in capsys.readouterr().out
    assert command.main(["--stale", "cpu-long"]) == 0 and run == [long]
    assert command.main(["--list"]) == 0 and "nothing; on request" in capsys.readouterr().out


def test_pages_with_curves():
    """A picture of its own, in place of bars; and the paragraphs below the table."""
    own = next(b for b in registry.BENCHMARKS if b.name == "cpu-scaling")
    stored = Stored(own, ROOT / "cpu-scaling.json", result(), scaling.rows(result()))
    page = report.markdown([stored], {}, "benchmarks.svg")
    assert "![Curves of cpu-scaling](cpu-scaling.svg)" in page and "**Where dispatch ends.**" in page
    assert "cpu-scaling" not in report.picture([stored], {})
    tree = ElementTree.fromstring(report.curves([stored])["cpu-scaling.svg"])
    texts = [text.text for text in tree.iter() if text.tag.endswith("text")]
    assert "L2 is full" in texts and "L3 is full" not in texts and texts.count("2 threads") == 1


def test_curves_are_where_their_numbers_are():
    panel = lines.Panel("rate", "batch", {"a": [(4.0, 10.0), (1.0, 1.0), (2.0, 1.0)], "none": []}, levels={"b": 10.0})
    tree = ElementTree.fromstring(lines.picture([panel]))
    (line,) = (path for path in tree.iter() if path.get("class") == "line")
    places = [tuple(map(float, place.split())) for place in re.split("[ML]", line.get("d"))[1:]]
    left, right, bottom = lines.LEFT, lines.WIDTH - lines.RIGHT, lines.HEIGHT - lines.BOTTOM
    top = lines.HEAD + 2 * lines.LINE  # below one line of names
    assert [x for x, _ in places] == pytest.approx([left, (left + right) / 2, right], abs=0.1)
    assert [y for _, y in places] == [bottom, bottom, top]
    (level,) = (path for path in tree.iter() if path.get("class") == "level")
    assert level.get("d") == f"M{left} {float(top)}H{right}"
    texts = [text.text for text in tree.iter() if text.tag.endswith("text")]
    assert {"rate", "batch", "a", "b", "1", "2", "4", "10"} == set(texts)
    alone = ElementTree.fromstring(lines.picture([lines.Panel("rate", "batch", {"a": [(0.3, 7.0)]})]))
    ticks = [text.text for text in alone.iter() if text.get("class") == "tick"]
    assert ticks == ["0.2", "0.5", "5", "10"]
    with pytest.raises(ValueError, match="benchmarks.lines: expected a point in rate, got none"):
        lines.picture([lines.Panel("rate", "batch", {"none": []})])
