"""Runs with NaN in them: what ends them is said in one line, and nothing good on the disk is lost for it."""

import math

import pytest
from safetensors.torch import load_file

from fastdmd import pretrain


def broken_teacher(*iterations):
    """Its output is NaN in these, the first of which is 0."""

    def spoil(training, iteration):
        hooks = training.model.teacher._forward_hooks
        hooks.clear()
        if iteration in iterations:
            training.model.teacher.register_forward_hook(lambda module, given, x: x * math.nan)

    return spoil


def all_finite(path):
    tensors = load_file(path)
    return len(tensors) > 20 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_stop_ends_a_run_at_the_first_fault_and_skip_goes_on_from_there(begun, tmp_path):
    """A generator turn comes every third iteration, a checkpoint every second, a line of the log every third."""
    code, summary, lines, checkpoints = begun(broken_teacher(6), "--nan-policy", "stop")
    reason = "NaN or infinity in teacher's output, iteration 7"
    assert code.startswith(f"fastdmd.train: error: {reason}; the last good snapshot is kept") and "\n" not in code
    assert (summary["outcome"], summary["reason"], summary["iterations"]) == ("diverged", reason, 7)
    assert checkpoints == ["00000004", "00000006"] and lines[-1]["iteration"] == 7
    assert (lines[-1]["not_finite"], lines[-1]["not_finite_at"]) == ("teacher's output", 7)
    run = tmp_path / "run"
    assert all_finite(run / "networks.safetensors") and all_finite(run / "generator.safetensors")

    code, summary, lines, checkpoints = begun(broken_teacher(6), "--nan-policy", "skip", "--resume", "auto")
    assert (code, summary["outcome"], summary["skipped_updates"]) == (0, "complete", 1)
    assert [line["iteration"] for line in lines] == [3, 6, 9, 12, 13] and checkpoints == ["00000012", "00000013"]
    assert [line.get("not_finite_at") for line in lines] == [None, None, 7, None, None]


def test_many_in_a_row_end_a_run_with_skip(begun):
    code, summary, lines, _ = begun(broken_teacher(*range(3, 13)))
    assert summary["outcome"] == "diverged" and "teacher's output, iteration" in code and " in a row left out: " in code


@pytest.mark.parametrize(
    ("owner", "kind", "name"),
    [
        ("guidance_optimizer", "param", "weights of the fake score"),
        ("generator_optimizer", "ema", "ema of the generator"),
    ],
)
def test_broken_weights_replace_neither_a_checkpoint_nor_a_snapshot(begun, tmp_path, owner, kind, name):
    def spoil(training, iteration):
        if iteration == 8:  # before the checkpoint of iteration 10, which no generator turn is before
            next(iter(getattr(training.model, owner).state_views()[kind].values())).view(-1)[0] = math.nan

    code, summary, _, checkpoints = begun(spoil, "--log-every", "13")
    assert summary["outcome"] == "diverged" and summary["iterations"] == 10
    assert f"there is NaN or infinity in {name}, map_label.weight; the last good snapshot is kept" in code
    assert checkpoints == ["00000006", "00000008"]
    run = tmp_path / "run"
    names = [
        "networks.safetensors",
        "generator.safetensors",
        *(f"checkpoints/{name}/state.safetensors" for name in checkpoints),
    ]
    assert all(all_finite(run / name) for name in names)


def test_pretraining_stops_at_a_broken_image(begun, tmp_path):
    data = ["--data", str(tmp_path / "data.npz"), "--out", "run", "--device", "cpu", "--num-samples", "0"]
    sizes = ["--iterations", "9", "--batch-size", "8", "--model-channels", "8", "--log-every", "4", "--snapshots", "3"]
    given = [*data, *sizes, "--warmup-iterations", "0", "--teacher-steps", "2", "--checkpoint-every", "2"]

    def spoil(training, iteration):
        if iteration == 4:
            batch = training._batch

            def broken(step, rows):
                images, *rest = batch(iteration, rows)
                return images * (math.nan if step == 4 else 1), *rest

            training._batch = broken

    code, summary, _, checkpoints = begun(spoil, "--nan-policy", "stop", command=pretrain, given=given)
    assert code.startswith("fastdmd.pretrain: error: NaN or infinity in real image, iteration 5; ")
    assert summary["iterations"] == 5 and checkpoints == ["00000002", "00000004"]
    assert all_finite(tmp_path / "run" / "teacher.safetensors")
    code, summary, lines, _ = begun(spoil, "--resume", "auto", command=pretrain, given=given)
    assert (code, summary["outcome"], summary["skipped_updates"]) == (0, "complete", 1)
    assert [line.get("not_finite") for line in lines] == [None, "real image", None]
