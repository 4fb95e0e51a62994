"""Memory that ends: one line that says what to try, and the last checkpoint as it was, to go on from."""

import pytest
import torch

from fastdmd import pretrain
from fastdmd.distill.budget import Budget
from fastdmd.memory import half

ERRORS = {
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    "python": MemoryError(),
    "gpu": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}


def ends(error, at):
    def spoil(training, iteration):
        if iteration == at:
            raise error

    return spoil


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_says_what_to_try_and_goes_on_with_that(begun, tmp_path, capsys):
    code, summary, _, checkpoints = begun(ends(ERRORS["cpu"], 5))
    assert (code, summary["outcome"], summary["iterations"]) == (1, "failed", 5)
    line = capsys.readouterr().err.splitlines()[-1]
    expected = "out of memory while distilling; try --batch-size 4 or --accumulation-steps 2"
    assert line == f"fastdmd.train: error: {expected}"
    assert checkpoints == ["00000002", "00000004"]
    before = contents(tmp_path / "run" / "checkpoints")
    code, summary, lines, _ = begun(ends(ERRORS["gpu"], 4), "--resume", "auto")
    assert code == 1 and contents(tmp_path / "run" / "checkpoints") == before
    code, summary, lines, _ = begun(lambda *_: None, "--resume", "auto", "--accumulation-steps", "2")
    assert (code, summary["outcome"], summary["iterations"]) == (0, "complete", 13)
    assert "the run was begun with --accumulation-steps 1, now 2: from here on it may" in capsys.readouterr().err


def test_pretraining_says_it_too(begun, tmp_path, capsys):
    sizes = [
        "--teacher-steps",
        "2",
        "--iterations",
        "4",
        "--batch-size",
        "6",
        "--model-channels",
        "8",
        "--num-samples",
        "0",
        "--device",
        "cpu",
    ]
    given = ["--data", str(tmp_path / "data.npz"), "--out", "run", "--warmup-iterations", "0", *sizes]
    code, summary, *_ = begun(ends(ERRORS["python"], 2), command=pretrain, given=given)
    assert (code, summary["outcome"]) == (1, "failed")
    expected = "out of memory while training; try --batch-size 3 or a smaller --model-channels"
    assert capsys.readouterr().err.splitlines()[-1] == f"fastdmd.pretrain: error: {expected}"


@pytest.mark.parametrize(
    ("batch_size", "steps", "advice"),
    [
        (48, 1, "try --batch-size 24 or --accumulation-steps 2"),
        (7, 1, "try --batch-size 3 or --accumulation-steps 7"),
        (280, 7, "try --batch-size 140 or --accumulation-steps 14"),
        (9, 3, "try --batch-size 3 or --accumulation-steps 9"),
        (6, 6, "one image at a time is all that --batch-size 6 leaves; use a larger device"),
        (1, None, "one image at a time is all that --batch-size 1 leaves; use a larger device"),
        (250, None, "try --batch-size 125"),
    ],
)
def test_half_of_what_was_tried(batch_size, steps, advice):
    assert half(batch_size, steps) == advice
    if steps is not None and "try" in advice:  # and what it says can be
        smaller, more = (int(word) for word in advice.split() if word.isdigit())
        assert smaller % steps == 0 and batch_size % more == 0 and more > steps


@pytest.mark.parametrize(
    ("batch_size", "steps", "num_steps", "advice"),
    [
        (12, 1, 4, "try --batch-size 4 or --accumulation-steps 3"),
        (64, 2, 4, "try --batch-size 32 or --accumulation-steps 4"),
        (6, 1, 3, "try --batch-size 3 or --accumulation-steps 2"),
        (8, 2, 4, "an image of each of 4 steps at a time is all that --batch-size 8 leaves; use a larger device"),
    ],
)
def test_half_is_of_parts_that_the_steps_divide(batch_size, steps, num_steps, advice):
    assert half(batch_size, steps, num_steps=num_steps) == advice
    fitting = Budget(batch_size, steps, 10, 1, 1, 1, 1, None, None, num_steps=num_steps)
    assert fitting.smaller() == advice


def test_an_estimate_comes_before_half():
    budget = Budget(64, 2, 10, 1, 1, 100, 1000, available_bytes=500, largest_batch_size=22)
    assert budget.smaller() == "try --batch-size 22 or --accumulation-steps 8" and budget.smaller() in budget.advice()
    fitting = Budget(64, 2, 10, 1, 1, 100, 400, available_bytes=500, largest_batch_size=None)
    assert fitting.smaller() == "try --batch-size 32 or --accumulation-steps 4" and fitting.advice() is None
