"""Terminals, pipes, encodings and memory that are not as they should be: an exit code and a line, never a traceback."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdmd import sample, train
from fastdmd.networks import user_code
from fastdmd.runs import cli, terminal
from tests.helpers.tiny_runs import run_train

MAIN = """
import sys
from fastdmd.runs import terminal
@terminal.command("fastdmd.test")
def main(arguments=None):
    print("Fréchet distance × 2 → ½", "\\udcff", flush="flush" in sys.argv)
    print("x" * 200_000)
    if "help" in sys.argv:
        raise SystemExit(0)
    if "bug" in sys.argv:
        raise KeyError("bug")
    terminal.say("said: é")
main()
"""


def run(redirection, *words, **environment):
    """Exit code and stderr of a command whose output goes where a shell puts it."""
    command = f'"$@" {" ".join(words)} {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-c", MAIN],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=Path(__file__).parents[2],
        timeout=60,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stderr, done.stdout


@pytest.mark.parametrize("words", [(), ("help",), ("flush",)])
def test_a_reader_who_left_and_a_full_disk(words):
    code, error, _ = run("| head -c 1", *words)
    assert code == 141 and error in ("", "said: é\n")
    code, error, _ = run("> /dev/full", *words)
    assert code == 1 and "No space left on device" in error and "Traceback" not in error
    assert len(error.splitlines()) <= 2


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&- <&-", "2> /dev/full"])
def test_streams_that_are_closed_take_nothing(redirection):
    code, error, _ = run(redirection)
    assert code == 0 and error in ("", "said: é\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("buffering", [1, -1])
@pytest.mark.parametrize(("kind", "code"), [("full", 1), ("left", 141)])
def test_no_output_ends_a_run(name, buffering, kind, code, tmp_path, monkeypatch, teacher_file):
    """Progress and remarks are written all the time; whoever does not read them has the results nevertheless."""
    if kind == "full":
        stream = open("/dev/full", "w", buffering)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w", buffering)
    monkeypatch.setattr(sys, name, stream)
    context = pytest.raises(SystemExit) if name == "stdout" else contextlib.nullcontext()
    with stream, context as stop:
        run_train(teacher_file, tmp_path / "run", "--num-samples", "0")
    assert stop is None or stop.value.code == code
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outcome"] == "complete"
    assert getattr(sys, name) is stream


@pytest.mark.parametrize("words", [["--help"], ["--teacher", "mnist", "--dry-run"]])
def test_what_is_only_printed_and_cannot_be(words, monkeypatch, capsys):
    with open("/dev/full", "w") as stream, pytest.raises(SystemExit) as stop:
        monkeypatch.setattr(sys, "stdout", stream)
        train.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error == "fastdmd.train: error: expected to write to stdout, got [Errno 28] No space left on device\n"


def test_a_bug_keeps_its_traceback():
    code, error, _ = run("> /dev/null", "bug")
    assert code == 1 and "KeyError: 'bug'" in error


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "Frechet distance x 2 ? 1?2 ?"),
        ("latin-1", None),
        ("utf-8", "Fréchet distance × 2 → ½ ?"),
        ("cp1252:strict", None),
    ],
)
def test_any_encoding_can_be_written(encoding, expected):
    code, error, output = run("| iconv -f latin1 -t utf8" if expected is None else "", PYTHONIOENCODING=encoding)
    assert code == 0 and "Traceback" not in error
    assert output.splitlines()[0] == (expected or "Fréchet distance × 2 ? ½ ?")


@pytest.mark.parametrize("columns", ["1", "0", "-3", "wide", "1000000000"])
def test_the_width_of_help_is_bounded(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with terminal.readable_width():
        assert 40 <= int(os.environ["COLUMNS"]) <= 200
    assert os.environ["COLUMNS"] == columns
    monkeypatch.delenv("COLUMNS")
    with terminal.readable_width():
        pass
    assert "COLUMNS" not in os.environ


def test_help_ends_in_one_column(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit) as stop:
        sample.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and any("--teacher-steps" in line for line in lines)
    assert max(map(len, lines)) < 100 + 80 * 2


@pytest.mark.parametrize("asked", ["", "--verbose", "FASTDMD_TRACEBACK"])
def test_tracebacks_come_when_asked_for(asked, monkeypatch, capsys):
    monkeypatch.setenv("FASTDMD_TRACEBACK", "1" if asked == "FASTDMD_TRACEBACK" else "0")
    with pytest.raises(SystemExit) as stop:
        sample.main(["mnist", "--num", "0", *(["--verbose"] if asked == "--verbose" else [])])
    first, *rest = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and first == "fastdmd.sample: error: expected --num >= 1, got 0"
    assert (rest[:1] == ["Traceback (most recent call last):"]) == bool(asked)
    assert rest == [] or rest[-1] == "ValueError: expected --num >= 1, got 0"


OUT_OF_MEMORY = [
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((10**12,), np.dtype(float)),
    torch.OutOfMemoryError("CUDA"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError('torch_call_dispatcher( "aten::empty_like", "", stack.data(), ( ((0ULL + 2)'),
    RuntimeError('torch_call_dispatcher( "aten::new_empty", "", stack'),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("could not create a memory object"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("context", [cli.user_errors, cli.run_errors])
def test_out_of_memory_says_so(error, context, capsys):
    with pytest.raises(SystemExit) as stop, context("fastdmd.test", "testing", "buy more"):
        raise error
    assert stop.value.code == 1
    assert capsys.readouterr().err == "fastdmd.test: error: out of memory while testing; buy more\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device (while testing)"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "[Errno 32] Broken pipe (while testing)"),
        (ValueError("fastdmd.data: expected x,\n got y"), "fastdmd.data: expected x, got y (while testing)"),
        (TypeError("fastdmd.x: expected y"), "fastdmd.x: expected y (while testing)"),
    ],
)
def test_a_run_that_fails_for_a_reason_of_the_users(error, line, capsys):
    with pytest.raises(SystemExit) as stop, cli.run_errors("fastdmd.test", "testing"):
        raise error
    assert stop.value.code == 1 and capsys.readouterr().err == f"fastdmd.test: error: {line}\n"


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EIO"])
def test_a_disk_that_ends_is_no_mistake_of_the_users(name, capsys):
    error = OSError(getattr(errno, name), "no more")
    with pytest.raises(SystemExit) as stop, cli.user_errors("fastdmd.test"):
        raise error
    assert stop.value.code == 1 and capsys.readouterr().err == f"fastdmd.test: error: {error}\n"


@pytest.mark.parametrize("error", [ValueError("memory of elephants"), RuntimeError("shapes"), KeyError("x")])
def test_other_errors_of_a_run_pass(error, monkeypatch):
    monkeypatch.setattr(user_code, "LIBRARIES", user_code.LIBRARIES | {os.path.dirname(__file__)})  # this file is ours
    with pytest.raises(type(error)), cli.run_errors("fastdmd.test", "testing"):
        raise error


LIMITED = """
import resource, torch, numpy
from fastdmd import ops
from fastdmd.runs import cli
x = torch.ones(16, 64, 64, 64)  # 17 MB
gradient = ops.dm_loss(x[:1, :1], x[:1, :1] + 1, x[:1, :1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 8_000_000, -1))
attempts = {
    "torch": lambda: torch.empty(10**8), "numpy": lambda: numpy.ones(10**8),
    "native": lambda: ops.dm_loss(x.requires_grad_(), x + 1, x), "list": lambda: [0] * 10**9,
    "convolution": lambda: torch.nn.functional.conv2d(x, torch.ones(64, 64, 1, 1)),
}
for name, attempt in attempts.items():
    try:
        attempt()
        print(name, "fitted")
    except Exception as error:
        print(name, cli.ran_out_of_memory(error))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its limit")
def test_real_limits_are_told():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == [
        "torch",
        "True",
        "numpy",
        "True",
        "native",
        "True",
        "list",
        "True",
        "convolution",
        "True",
    ], done.stdout + done.stderr


def test_more_than_there_is_is_refused_before_it_is_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for num in ("2000000000", "2147483648"):
        with pytest.raises(SystemExit) as stop:
            sample.main(["mnist", "--num", num, "--device", "cpu"])
        assert stop.value.code == 2 and f"expected --num {num} to fit into memory" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
