"""Which native ops the libraries have, as `benchmarks.native_ops` finds it, and the range of torch that is tried."""

import re
from pathlib import Path

import pytest

from benchmarks import kit, native_ops
from fastdmd import _native, ops

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(_native.load("cpu") is not None, reason="needs the native library")
def test_an_op_that_a_library_lacks_is_found(monkeypatch, capsys):
    cuda = ["cpu", "cuda"] if _native.load("cuda") is None else ["cpu"]
    assert native_ops.kernels("dm_loss") == cuda and native_ops.kernels("conv3x3") == ["cpu"]
    assert native_ops.kernels("no_such_op") == []
    monkeypatch.setattr(_native, "load", lambda kind: None)
    monkeypatch.setattr(native_ops, "kernels", lambda name: ["cpu", "cuda"] if name == "fake_loss" else ["cpu"])
    monkeypatch.setattr(ops, "names", lambda: ["conv3x3", "dm_loss", "fake_loss"])
    monkeypatch.setattr(
        ops,
        "unavailable",
        lambda name, device: {"native": "conv3x3 has native code for CPUs alone" if name == "conv3x3" else "no nvcc"},
    )
    assert native_ops.main([]) == 1
    printed, error = capsys.readouterr()
    assert error == "benchmarks.native_ops: error: dm_loss: expected native code for cpu, cuda, got cpu\n"
    assert re.findall(r"^(\w+) +(.*)$", printed, re.MULTILINE)[1:] == [
        ("conv3x3", "cpu"),
        ("dm_loss", "cpu"),
        ("fake_loss", "cpu, cuda"),
    ]


def test_a_library_that_is_not_there_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(_native, "load", lambda kind: "not built" if kind == "cuda" else None)
    assert native_ops.main([]) == 1
    assert capsys.readouterr().err == "benchmarks.native_ops: error: the cuda library: not built\n"


@pytest.mark.parametrize("arguments, code, said", [(["--help"], 0, "usage: "), (["--bogus"], 2, "arguments: --bogus")])
def test_arguments_are_read_before_anything_is_done(arguments, code, said, monkeypatch, capsys):
    monkeypatch.setattr(kit, "fill", lambda: pytest.fail("wheels were asked for"))
    monkeypatch.setattr(native_ops, "faults", lambda: pytest.fail("libraries were loaded"))
    for command in (native_ops, kit):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == code and said in "".join(capsys.readouterr())


def test_the_oldest_and_the_newest_torch_are_tried():
    oldest, beyond = re.search(r'"torch>=([\d.]+),<2\.(\d+)"', (ROOT / "pyproject.toml").read_text()).groups()
    tried = re.search(r"^TORCHES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert tried[0].startswith(f"{oldest}.") and tried[-1].startswith(f"2.{int(beyond) - 1}.")
