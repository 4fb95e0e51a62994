"""Signals outside of a training, and files that are whole whatever happens."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastdmd import files
from fastdmd.runs import interrupts

PROGRAM = """
import os, signal, sys
from fastdmd import files
from fastdmd.runs import interrupts
interrupts.exit_on_signals("fastdmd.train")

class Last:
    def __del__(self):  # where an exception would be printed and forgotten
        os.kill(os.getpid(), signal.Signals({number}))

def write(file):
    file.write(b"half")
    file.flush()
    Last()
    file.write(b" and half")

from pathlib import Path
files.write_atomically(Path(sys.argv[1]), write)
print("went on")
"""


def start(code, *arguments, **options):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_of_a_write_keeps_the_old_file(number, tmp_path):
    (tmp_path / "weights").write_text("old")
    result = start(PROGRAM.format(number=int(number)), tmp_path / "weights")
    assert (result.returncode, result.stdout) == (128 + number, "")
    assert result.stderr.strip() == f"fastdmd.train: ended by {number.name}"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"weights": "old"}


def test_ignored_signals_stay_ignored(tmp_path):
    """As under nohup."""
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    result = start(PROGRAM.format(number=int(signal.SIGHUP)), tmp_path / "weights", preexec_fn=ignore)
    assert (result.returncode, result.stdout, result.stderr) == (0, "went on\n", "")
    assert (tmp_path / "weights").read_text() == "half and half"


def test_only_the_first_signal_is_deferred():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outside"))
    try:
        with interrupts.deferred() as received:
            assert received() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert received() == signal.SIGTERM and seen == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == ["outside"]
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["outside"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_echo_counts_once():
    """As where a scheduler signals a whole job, and torchrun passes on what it got."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outside"))
    try:
        with interrupts.deferred(echo_seconds=600.0) as received:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert received() == signal.SIGTERM and seen == []
        with interrupts.deferred(echo_seconds=0.01) as received:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)
            assert received() == signal.SIGTERM and seen == ["outside"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights"
    files.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, fail)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"weights": b"old"}


def test_commands_say_which_signal_ended_them(tmp_path):
    """During set-up, here in somebody's slow code: one line, nothing left behind."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    (tmp_path / "slow.py").write_text("import time, pathlib\npathlib.Path('there').touch()\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdmd.train", "--teacher", "slow:Net", "--parameterization", "x0", "--out", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(files.__file__).rpartition("fastdmd")[0]])},
    )
    while not (tmp_path / "there").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error.strip()) == (130, "", "fastdmd.train: ended by SIGINT")
    assert not (tmp_path / "run").exists()
