"""Progress on a narrow terminal, in a pipe and in a notebook."""

import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastdmd import bars

STEPS = """
import time
from fastdmd.bars import bar
with bar(total=400, unit="it", initial=100) as shown:
    for step in range(300):
        time.sleep(0.002)
        shown.update()
        shown.set_postfix({"loss_dm": "0.7245", "loss_fake": "0.6156", "images/s": "30.23"}, refresh=False)
        if step == 150:
            shown.write("a remark")
            for _ in bar(range(3), leave=False, desc="inside"):
                pass
"""
COMMAND = [sys.executable, "-c", STEPS]
HERE = Path(__file__).parents[1]


def test_forty_columns_hold_a_state_with_the_time_left():
    """Each overwrites the one before, which needs all of them to end within the line."""
    pty = pytest.importorskip("pty", reason="no terminals of this kind")
    import fcntl
    import termios

    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    process = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=terminal, cwd=HERE)
    os.close(terminal)
    written = b""
    while True:
        try:
            part = os.read(reader, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        written += part
    assert process.wait() == 0
    os.close(reader)
    states = [state.replace(bars.UP, "").strip() for state in written.decode().split("\r") if "/400" in state]
    assert len(states) > 3 and max(map(len, states)) < 40
    assert all("/400 [" in state and "<" in state for state in states)
    assert states[-1].startswith("100%") and "400/400" in states[-1]


def test_a_pipe_has_whole_lines_and_few():
    done = subprocess.run(COMMAND, capture_output=True, text=True, cwd=HERE, check=True)
    first, last = done.stderr.splitlines()
    assert "\r" not in done.stderr and "100/400" in first
    assert "400/400" in last and "loss_dm=0.7245" in last and done.stdout == "a remark\n"


@pytest.mark.parametrize("is_notebook", [True, False])
def test_a_notebook_moves(is_notebook, monkeypatch, capsys):
    if is_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert list(bars.bar(range(3))) == [0, 1, 2]
    assert ("\r" in capsys.readouterr().err) == is_notebook
