"""Trainings in processes of their own that end in the middle: at a touch of a file, or by what a test does to them."""

import contextlib
import os
import signal
import sys
import traceback

import pytest
import torch

from fastdmd import train
from fastdmd.runs import distillation, pretraining
from tests.helpers.tiny_runs import QUIET

TOUCHES = {"open", "os.rename", "os.remove", "os.truncate", "os.link", "os.mkdir", "os.rmdir", "shutil.rmtree"}
FAILED = 99


def training(folder, arguments, *, kill_at=None, sends=None, command=train):
    """Runs a command with `--out run` in a folder, in a fork; returns its exit code and what it said on stderr.

    Before it touches a file of its run for the `kill_at`-th time, SIGKILL ends it. `sends` are signals that it gets
    before the iterations of these numbers.
    """
    if torch.cuda.is_initialized():
        pytest.skip("a fork of a process that has used a GPU differentiates nothing")
    folder.mkdir(exist_ok=True)
    process = os.fork()
    if process == 0:
        os._exit(_forked(folder, arguments, kill_at, sends or {}, command))
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), (folder / "stderr").read_text()


@contextlib.contextmanager
def counted_touches(kill_at=None):
    """A list, of which the only number says how often files of the run have been touched inside."""
    touches = [0]
    is_over = False  # no such hook is ever removed

    def touch(event, given):
        if is_over or event not in TOUCHES or not str(given[0]).startswith("run"):
            return
        if event == "open" and given[1] in ("r", "rb"):
            return
        touches[0] += 1
        if touches[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touch)
    try:
        yield touches
    finally:
        is_over = True


def no_budget(*_):
    """Of what takes a third of the time of so small a run."""


def _forked(folder, arguments, kill_at, sends, command):
    owner = distillation.Distillation if command is train else pretraining.Pretraining
    iterate = owner.iterate

    def iterate_after(self, iteration):
        if iteration in sends:
            os.kill(os.getpid(), sends[iteration])
        iterate(self, iteration)

    owner.iterate = iterate_after
    train.budget_of = no_budget
    os.chdir(folder)
    with open("stderr", "w") as sys.stderr, open(os.devnull, "w") as sys.stdout, counted_touches(kill_at):
        try:
            command.main([*arguments, *QUIET, "--out", "run"])
            return 0
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return FAILED
