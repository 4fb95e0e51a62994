"""Trainings in processes of their own that end in the middle: at a touch of a file, or by what a test does to them."""

import os
import signal
import sys
import traceback

from fastdmd import train
from fastdmd.runs import distillation

TOUCHES = {"open", "os.rename", "os.remove", "os.truncate", "os.link", "os.mkdir", "os.rmdir", "shutil.rmtree"}
FAILED = 99


def training(folder, arguments, *, kill_at=None, at_iteration=None):
    """Runs `fastdmd.train` with `--out run` in a folder, in a fork; returns its exit code and what it said on stderr.

    Before it touches a file of its run for the `kill_at`-th time, SIGKILL ends it; without, how often it did is in the
    file `touches`. `at_iteration` is a number and a function that is called before the iteration of that number.
    """
    folder.mkdir(exist_ok=True)
    process = os.fork()
    if process == 0:
        os._exit(_run(folder, arguments, kill_at, at_iteration))
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), (folder / "stderr").read_text()


def _run(folder, arguments, kill_at, at_iteration):
    os.chdir(folder)
    with open("stderr", "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
        touches = 0

        def touch(event, given):
            nonlocal touches
            is_read = event == "open" and given[1] in ("r", "rb")
            if event not in TOUCHES or is_read or not str(given[0]).startswith("run"):
                return
            touches += 1
            if touches == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        if at_iteration is not None:
            number, function = at_iteration
            iterate = distillation.Distillation.iterate

            def iterate_after(self, iteration):
                if iteration == number:
                    function()
                iterate(self, iteration)

            distillation.Distillation.iterate = iterate_after
        sys.addaudithook(touch)
        try:
            train.main([*arguments, "--out", "run"])
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = FAILED
    if kill_at is None:
        with open("touches", "w") as file:
            file.write(str(touches))
    return code
