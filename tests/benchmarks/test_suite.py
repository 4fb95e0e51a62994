"""The suite of benchmarks: what there is, what is worse than before, and what is told of it."""

import math
import re
import sys
from xml.etree import ElementTree

import pytest

from benchmarks import bench_step, timeline
from benchmarks.sources import ROOT
from benchmarks.suite import registry, report
from benchmarks.suite.compare import compare
from benchmarks.suite.registry import Benchmark
from benchmarks.suite.rows import Row
from benchmarks.suite.stored import Stored

ON_REQUEST = tuple(b.name for b in registry.BENCHMARKS if b.device == "cpu" and b.on_request)


@pytest.mark.parametrize(
    ("names", "device", "expected"),
    [
        ([], "cpu", [b.name for b in registry.BENCHMARKS if b.device == "cpu" and b.name not in ON_REQUEST]),
        (["cpu-scaling", "cpu-ops"], "cpu", ["cpu-scaling", "cpu-ops"]),  # on request: by its whole name alone
        (["cpu-ops"], "cpu", ["cpu-ops"]),
        (["b128", "ops", "b128-fp32"], "cpu", ["cpu-step-mnist-b128-fp32", "cpu-step-mnist-b128-bf16", "cpu-ops"]),
        (["gpu-step-cifar10-cond"], "cuda", ["gpu-step-cifar10-cond"]),  # the whole name of one, a part of another's
        (["cifar10-cond-b"], "cuda", ["gpu-step-cifar10-cond-b16"]),
    ],
)
def test_names_and_parts_of_names_choose(names, device, expected):
    assert [benchmark.name for benchmark in registry.chosen(names, device)] == expected


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cpu-opps", "did you mean cpu-ops?"),
        ("gpu-ops", "gpu-ops needs --device cuda"),
        ("scaling", "did you mean cpu-scaling?"),
        ("gpu-scaling", "gpu-scaling needs --device cuda"),
        ("xyz", "--list names cpu-ops"),
    ],
)
def test_a_wrong_name_is_told_the_right_one(name, told):
    with pytest.raises(ValueError, match=f"expected benchmarks of cpu, got {name}: {re.escape(told)}"):
        registry.chosen(["cpu-busy", name], "cpu")


def test_settings_are_those_of_the_names(monkeypatch):
    """bench_step, called by the registry's command, gets what the benchmark's name says."""
    seen = []
    monkeypatch.setattr(bench_step, "benchmark", lambda arguments: seen.append(arguments) or {"failed": {}})
    monkeypatch.setattr(bench_step, "table", lambda result: "")
    monkeypatch.setattr(bench_step, "resolve_device", lambda name: None)
    steps = [benchmark for benchmark in registry.BENCHMARKS if benchmark.module == "benchmarks.bench_step"]
    for benchmark in steps:
        monkeypatch.setattr(sys, "argv", ["bench_step", *benchmark.arguments])
        bench_step.main()
    found = {b.name: (s.preset, s.batch_size, s.precision, s.ratio, s.memory) for b, s in zip(steps, seen, strict=True)}
    assert found["cpu-step-mnist-b8-bf16"] == ("mnist", 8, "bf16", 10, False)
    assert found["cpu-step-mnist-b128-fp32"] == ("mnist", 128, "fp32", 10, True)
    assert found["cpu-step-cifar10-cond-b2-fp32"] == ("cifar10-cond", 2, "fp32", 1, True)
    suite = [{"preset": s.preset, "batch_size": s.batch_size, "ratio": s.ratio} for s in seen if s.device == "cuda"]
    assert suite == bench_step.SUITE and list(registry.PROFILES) == list(timeline.DEFAULTS)
    assert found["cpu-foreign-b64"] == ("foreign", 64, "fp32", 10, False)
    assert found["cpu-fair-bf16"] == ("mnist", 128, "bf16", 10, False)
    compiled = {b.name for b, s in zip(steps, seen, strict=True) if s.compiled}
    assert compiled == {b.name for b in steps if b.name.startswith(("gpu-", "cpu-fair-"))}


TIME = Row("time", 2.0, "s", ratio=3.0, yardstick="eager")
RATE = Row("rate", 100.0, "images/s", more_is_better=True, ratio=1.5, yardstick="textbook")
COUNT = Row("count", 8, "", is_counted=True)
ALONE = Row("alone", 5.0, "GB")


def changed(row, **changes):
    return Row(**{**vars(row), **changes})


@pytest.mark.parametrize(
    ("now", "same_machine", "times", "faulty"),
    [
        ([changed(TIME, value=2.2)], True, {"time": 2 / 2.2}, []),
        (
            [changed(TIME, value=2.21)],
            True,
            {"time": 2 / 2.21},
            ["time: 1.10 times as bad as at x, expected at most 1.1"],
        ),
        ([changed(TIME, value=1.0, ratio=2.0)], False, {"time": 2 / 3}, ["time: 1.50 times as bad"]),
        ([changed(TIME, value=1.0, ratio=2.0)], True, {"time": 2.0}, []),
        ([changed(RATE, value=50.0)], True, {"rate": 0.5}, ["rate: 2.00 times as bad"]),
        ([changed(RATE, value=50.0)], False, {"rate": 1.0}, []),
        ([changed(COUNT, value=10)], False, {"count": 0.8}, ["count: 1.25 times as bad"]),
        ([changed(ALONE, value=6.0)], True, {"alone": 5 / 6}, ["alone: 1.20 times as bad"]),
    ],
)
def test_what_is_worse_is_a_fault(now, same_machine, times, faulty):
    before = [row for row in (TIME, RATE, COUNT, ALONE) if row.label == now[0].label]
    comparison = compare([now], [before], "x", same_machine=same_machine)
    assert comparison.times == pytest.approx(times) and comparison.before == {before[0].label: before[0]}
    faults = comparison.faults(1.1)
    assert len(faults) == len(faulty) and all(
        fault.startswith(told) for fault, told in zip(faults, faulty, strict=True)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, None])
def test_a_figure_that_is_gone_is_a_fault(value):
    now = [RATE] if value is None else [RATE, changed(TIME, value=value)]
    comparison = compare([now], [[RATE, TIME]], "x", same_machine=True)
    assert comparison.times == {"rate": 1.0} and comparison.missing == ["time"]
    assert comparison.faults(1.1) == ["time: expected a figure, as at x, got none"]


def test_only_what_was_to_be_measured_is_missed():
    part = compare([[RATE]], [[RATE, TIME]], "x", same_machine=True, is_part=True)
    assert part.times == {"rate": 1.0} and part.faults(1.1) == []
    broken = compare([[RATE, changed(TIME, value=math.nan)]], [[RATE, TIME]], "x", same_machine=True, is_part=True)
    assert broken.missing == ["time"]


def test_nothing_compared_is_a_fault():
    comparison = compare([[ALONE]], [[ALONE]], "x", same_machine=False)
    assert comparison.left_out == ["alone"] and comparison.faults(1.1) == [
        "expected figures to compare with x, got none"
    ]
    assert compare([[RATE]], [[]], "x", same_machine=True).faults(1.1) == comparison.faults(1.1)


def test_rounds_are_compared_in_pairs_by_their_median():
    """A machine that is slow for a while is so for both."""
    now = [[changed(TIME, value=value)] for value in (2.0, 20.0, 3.0)]
    before = [[changed(TIME, value=value)] for value in (1.0, 10.0, 30.0)]
    assert compare(now, before, "x", same_machine=True).times == {"time": 0.5}
    assert compare([[TIME], [RATE]], [[TIME], [TIME]], "x", same_machine=True).missing == ["time"]
    with pytest.raises(ValueError):
        compare(now, before[:2], "x", same_machine=True)


def results():
    one = Benchmark("cpu-ours", "one thing", "ours", (), lambda result: [], (), 1)
    said = {"device": "CPU, AVX2", "commit": "abc1234"}
    return [Stored(one, ROOT / "cpu-ours.json", said, [TIME, RATE, ALONE])]


def test_the_page():
    before = [changed(TIME, value=4.0), RATE, Row("old", 1.0, "s")]
    comparisons = {"cpu-ours": compare([results()[0].rows], [before], "def5678", same_machine=True)}
    _, said, head, where, table = report.markdown(results(), comparisons).split("\n\n")
    assert (
        head == "## cpu-ours"
        and where == "Of one thing; CPU, AVX2, commit abc1234."
        and "how many times as good" in said
    )
    assert table.splitlines() == [
        "| | measured | × eager or textbook | × def5678 |",
        "|---|---|---|---|",
        "| time | 2 s | 3.00 | 2.00 |",
        "| rate | 100 images/s | 1.50 | 1.00 |",
        "| alone | 5 GB | | |",
        "| old | none | | gone |",
    ]
    assert report.markdown(results(), {}).splitlines()[-1] == "| alone | 5 GB | |"


def test_the_picture():
    """Bars from 1 to the ratio, on a logarithmic axis, and a mark where it was before."""
    now = [changed(TIME, label="a < b", ratio=4.0), changed(RATE, ratio=0.5), ALONE]
    comparisons = {"cpu-ours": compare([now], [[changed(RATE, ratio=2.0)]], "x", same_machine=True)}
    drawn = [Stored(results()[0].benchmark, ROOT / "cpu-ours.json", {}, now)]
    tree = ElementTree.fromstring(report.picture(drawn, comparisons))
    of = lambda kind: [e for e in tree.iter() if e.get("class") == kind]  # noqa: E731
    (one,) = of("one")
    place = float(re.match(r"M([\d.]+)", one.get("d"))[1])
    better, worse = ((float(bar.get("x")), float(bar.get("width"))) for bar in of("bar"))
    assert better[0] == place and worse[0] + worse[1] == pytest.approx(place, abs=0.11)
    assert better[1] == pytest.approx(2 * worse[1], abs=0.3)  # log 4 and log 2
    (before,) = of("before")
    assert float(re.match(r"M([\d.]+)", before.get("d"))[1]) == pytest.approx(place + worse[1], abs=0.2)
    texts = [text.text for text in tree.iter() if text.tag.endswith("text")]
    assert "a < b" in texts and "4.00" in texts and "alone" not in texts
