"""Checkpoints whose checksums are right and whose content is not: refused by the name of the entry, none taken over."""

import copy
import math

import pytest
import torch

from fastdmd.quality.settings import Monitor
from fastdmd.quality.watch import Watch
from fastdmd.runs import checkpoint, quality_plot
from fastdmd.runs.checkpoints import Checkpoints, CheckpointSettings
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.course import Course
from fastdmd.runs.distillation import Distillation
from fastdmd.runs.folder import ReopenedFolder, RunFolder
from fastdmd.runs.loop import Loop
from tests.helpers.networks import make_network
from tests.runs.test_course import Judge
from tests.runs.test_going_on import REFERENCE

CONFIG = TrainConfig().replace(
    iterations=6, batch_size=2, warmup_iterations=0, log_every=4, snapshots=2, ema_halflives=(2.0, 9.0)
)
DISTANCES = {step: (4.0, 3.0) for step in range(7)}


def loop(folder, iterations=6):
    teacher = make_network()
    config = CONFIG.replace(out=folder.path, iterations=iterations, gan_guidance_weight=0).for_teacher(teacher)
    training = Distillation(config, teacher, folder)
    judge = Judge(DISTANCES)
    judge.measure = lambda sampler, **_: Judge(DISTANCES).floor
    course = Course(training, Monitor(eval_every=2, eval_samples=30, stop_after=0), judge, folder, 2)
    watch = Watch(REFERENCE, training.model.class_sums)
    checkpoints = Checkpoints(folder, CheckpointSettings(checkpoint_every="3"), {"versions": {}}, lambda origin: None)
    return Loop(training, config, folder, course, watch, checkpoints), training


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A loop at its end, its training, and what its checkpoint of iteration 3 holds."""
    with pytest.MonkeyPatch.context() as patch, RunFolder(tmp_path_factory.mktemp("whole") / "run", {}) as folder:
        patch.setattr(quality_plot, "draw", lambda *_, **__: None)
        patch.setattr(quality_plot, "require", lambda: None)
        own, training = loop(folder)
        own.run()
        yield own, training, checkpoint.read(folder.path / "checkpoints" / "00000003")


def at(state, path):
    for name in path[:-1]:
        state = state[name]
    return state, path[-1]


def put(*path, value):
    def change(state):
        owner, name = at(state, path)
        owner[name] = value

    return change


def tensor(*path, to):
    def change(state):
        owner, name = at(state, path)
        owner[name] = to(owner[name].clone())

    return change


def broken(x):
    x.view(-1)[0] = math.nan
    return x


def negative(x):
    x.view(-1)[0] = -1
    return x


MODEL = ("training", "model")
WEIGHT = "map_noise.0.weight"
PARAM = (*MODEL, "fake_score", "optimizer", "param", WEIGHT)
FORGED = {
    "weights of another dtype": (
        tensor(*PARAM, to=torch.Tensor.double),
        f"fake_score.param.{WEIGHT} of torch.float32 .* got torch.float64",
    ),
    "weights of another shape": (
        tensor(*PARAM, to=lambda x: x[:-1]),
        rf"fake_score.param.{WEIGHT} of torch.float32 \(32, 8\), got torch.float32 \(31, 8\)",
    ),
    "moments that are NaN": (
        tensor(*MODEL, "generator", "optimizer", "exp_avg", WEIGHT, to=broken),
        f"generator.exp_avg.{WEIGHT} to be numbers, got NaN",
    ),
    "negative moments": (
        tensor(*MODEL, "generator", "optimizer", "exp_avg_sq", WEIGHT, to=negative),
        f"exp_avg_sq of {WEIGHT} finite, not negative",
    ),
    "an average of half precision": (
        tensor(*MODEL, "generator", "optimizer", "ema_2", WEIGHT, to=torch.Tensor.half),
        f"generator.ema_2.{WEIGHT} of torch.float32 .*float16",
    ),
    "more updates than turns": (
        put(*MODEL, "generator", "optimizer", "num_updates", value=7),
        "generator.num_updates to be 2, got 7",
    ),
    "more steps than updates": (
        put(*MODEL, "fake_score", "optimizer", "steps", value=[torch.tensor([9])]),
        "fake_score.steps <= 3",
    ),
    "another tensor": (
        put(*MODEL, "fake_score", "optimizer", "param", "more", value=torch.zeros(1)),
        "fake_score.param to have",
    ),
    "sums that are NaN": (
        tensor(*MODEL, "generator_tally", "sums", to=broken),
        "generator_tally.sums to be numbers, got NaN",
    ),
    "sums of float64": (
        tensor(*MODEL, "guidance_tally", "sums", to=torch.Tensor.double),
        r"guidance_tally.sums of torch.float32 \(2,\), got torch.float64",
    ),
    "sums of one more": (
        tensor(*MODEL, "guidance_tally", "sums", to=lambda x: x.repeat(2)),
        r"guidance_tally.sums of torch.float32 \(2,\), got torch.float32 \(4,\)",
    ),
    "negative counts": (tensor(*MODEL, "guidance_tally", "counts", to=negative), "guidance_tally.counts of a tally"),
    "a fault without a name": (
        put(*MODEL, "guidance_tally", "first", value=torch.tensor([99, 2])),
        "guidance_tally.first of a tally",
    ),
    "class sums that are NaN": (
        tensor(*MODEL, "class_sums", "sums", to=broken),
        "class_sums.sums to be numbers, got NaN",
    ),
    "negative class counts": (
        tensor(*MODEL, "class_sums", "within", to=negative),
        "class_sums.within finite, of counts not negative",
    ),
    "a negative iteration": (
        put("progress", "iterations", value=-3),
        "progress.iterations to be 3, which the checkpoint is of, got -3",
    ),
    "an iteration beyond": (put("progress", "iterations", value=99), "progress.iterations to be 3, .* got 99"),
    "an iteration that is none": (put("progress", "iterations", value="3"), "progress.iterations to be 3, .* got '3'"),
    "another next one": (put("training", "next", value=4), "training.next to be 3, which the checkpoint is of, got 4"),
    "an outcome": (
        put("progress", "outcome", value="complete"),
        "expected progress to have iterations, .* got .*outcome",
    ),
    "negative counts of updates": (
        put("progress", "skipped_updates", value=-1),
        "progress.skipped_updates to be a whole number >= 0, got -1",
    ),
    "seconds that are infinite": (put("seconds", value=math.inf), "run.seconds to be a number >= 0, got inf"),
    "a log of seconds before": (put("log", "since", value=-1.0), "log.since to be a number >= 0, got -1.0"),
    "a watch of texts": (
        put("log", "watch", "history", value=[{"spread": "wide"}]),
        "watch.history to be a list of numbers by name",
    ),
    "a watch without rules": (put("log", "watch", "seen", value={}), "watch.seen to have"),
    "a curve of nothing": (put("course", "curves", value={}), "course.curves to have"),
    "a best of nobody": (
        put("course", "best", value={"iteration": 2, "average": "x", "frechet_distance": 1.0}),
        "course.best.average to be out of",
    ),
    "pictures of integers": (
        put("samples", "columns", value=[torch.zeros(10, 1, 28, 28, dtype=torch.int32)]),
        "samples.columns to be images",
    ),
    "no random state": (put("random", value=[1]), "run.random to be entries by name"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_states_are_refused_by_the_name_of_the_entry(saved, kind):
    own, _, content = saved
    change, message = FORGED[kind]
    forged = copy.deepcopy(content["run"])
    change(forged)
    with pytest.raises(ValueError, match=message) as error:
        own.load_state_dict(forged, 3)
    assert "\n" not in str(error.value) and str(error.value).startswith(("expected ", "fastdmd.AdamWEMA: expected "))


def test_what_is_not_forged_is_taken_over(saved):
    """The same way, so that the others are refused for what was changed."""
    own, training, content = saved
    own.load_state_dict(content["run"], 3)
    found, expected = training.state_dict()["model"], content["run"]["training"]["model"]
    for kind in ("param", "exp_avg_sq", "ema_2"):
        tensors = expected["generator"]["optimizer"][kind]
        assert all(torch.equal(x, tensors[name]) for name, x in found["generator"]["optimizer"][kind].items())
    assert torch.equal(found["guidance_tally"]["sums"], expected["guidance_tally"]["sums"])


def test_a_checkpoint_beyond_the_run(saved, tmp_path):
    """With right checksums, on the disk: one line, and the folder stays as it was."""
    *_, content = saved
    with RunFolder(tmp_path / "run", {}) as folder:
        (folder.path / "checkpoints").mkdir()
        checkpoint.write(folder.path / "checkpoints" / "00000003", {**content, "reached": folder.reached()})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    refusal = pytest.raises(ValueError, match="expected a checkpoint of 2 iterations or less, got 3")
    with ReopenedFolder(tmp_path / "run", {}) as folder, refusal:
        loop(folder, iterations=2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
