"""What one process alone meets: other files, a full disk, features that are not finite, a death as it begins."""

import errno
import json
import os
import signal
import time

import pytest
import torch
from torch import nn

from benchmarks.soak import differences, prepare
from fastdmd import evaluate, pairs, pretrain, teachers, train
from fastdmd.data.settings import DataSettings
from fastdmd.runs import distillation, outputs, pretraining, resume
from tests.helpers.gloo import spoil_teacher, started_as_torchrun_does
from tests.helpers.kills import no_budget
from tests.helpers.tiny_runs import QUIET

SHORT = ["--iterations", "4", "--snapshots", "1", "--eval-every", "0", "--num-samples", "0", *QUIET]
MEASURED = ["--num-samples", "300", "--eval-samples", "300", "--ema-halflives", "2", "--eval-every"]
SAME = "expected the same files in all processes, got others of ranks 1: "


@pytest.fixture(autouse=True)
def without_a_budget(monkeypatch):
    monkeypatch.setattr(train, "budget_of", no_budget)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Arguments of a run, with a teacher and data."""
    return [*prepare(tmp_path_factory.mktemp("made")), *SHORT]


def value(arguments, flag):
    return arguments[arguments.index(flag) + 1]


def of_second(change):
    """For `before`."""
    return lambda rank: change() if rank else None


def spoil_data():
    load = DataSettings.load_named

    def changed(self, *given, **named):
        dataset = load(self, *given, **named)
        dataset.images[0] = 255 - dataset.images[0]
        return dataset

    DataSettings.load_named = changed


def refused(folder, command, arguments, before, message):
    codes, said = started_as_torchrun_does(2, command, arguments, folder, before)
    errors = [line for text in said for line in text.splitlines() if "error: " in line]
    assert codes == [2, 2] and len(errors) == 1 and message in errors[0], (codes, said)
    assert not (folder / "run").exists()


def test_other_data_or_another_network_of_one_process_are_refused(made, tmp_path):
    refused(tmp_path, train, made, of_second(spoil_data), f"{SAME}the content of --data ")
    arguments = [value(made, "--teacher"), "--num-samples", "300", "--device", "cpu"]
    refused(tmp_path, evaluate, arguments, of_second(spoil_teacher), f"{SAME}the network ")
    arguments = ["--teacher", value(made, "--teacher"), "--num", "4", "--batch-size", "2", "--device", "cpu"]
    refused(tmp_path, pairs, arguments, of_second(spoil_teacher), f"{SAME}the teacher ")


def test_a_full_disk_is_no_mistake_in_flags_for_any_process(made, tmp_path):
    """Only the first one looks at --out."""

    def fill(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    def fill_first(rank):
        if rank == 0:
            outputs._try_folder = fill

    codes, said = started_as_torchrun_does(2, train, made, tmp_path, fill_first)
    assert codes == [1, 1]
    # By whoever hears of it first.
    assert sorted(said) == [
        "",
        "fastdmd.train: error: expected --out to be writable, got run: No space left on device\n",
    ]


def test_a_process_that_dies_as_it_begins_is_no_mistake_in_flags(made, tmp_path):
    def die():
        teachers.read = lambda *given: os.kill(os.getpid(), signal.SIGKILL)

    codes, said = started_as_torchrun_does(2, train, made, tmp_path, of_second(die))
    assert codes == [1, -signal.SIGKILL]
    assert said[0].count("error: fastdmd: expected an answer of all 2 processes, got one that ended") == 1
    assert not (tmp_path / "run").exists()


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(784, 6)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        return self.linear(x.flatten(1))


class NanOfMany(Features):
    """Features, which are NaN for as many images as are sampled at a time."""

    def forward(self, x):
        return super().forward(x) * (torch.nan if len(x) == 250 else 1)


def test_features_that_the_first_process_does_not_take_are_no_measurement_in_all(made, tmp_path):
    """It alone looks at them, while the others would wait for its next word."""
    features = ["--feature-network", f"{__name__}:NanOfMany"]
    codes, said = started_as_torchrun_does(2, train, [*made, *MEASURED, "2", *features], tmp_path)
    assert codes == [0, 0], said
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["fault"] == "fastdmd.frechet.update: expected finite features, got 250 of 250 not finite"


def test_best_weights_that_the_disk_does_not_take_are_not_there_for_any_process(made, tmp_path):
    """All end a run together which has had no better measurement since: the second one here, by the first's disk."""

    def fill_disk(rank):
        save = distillation.Distillation._save

        def changed(self, name, iteration, **information):
            if name == "best.safetensors":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            save(self, name, iteration, **information)

        distillation.Distillation._save = changed

    def fill_first(rank):
        return fill_disk(rank) if rank == 0 else None

    features = ["--feature-network", f"{__name__}:Features", "--stop-after", "2"]
    codes, said = started_as_torchrun_does(2, train, [*made, *MEASURED, "1", *features], tmp_path, fill_first)
    assert codes == [0, 0], said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reason"] == "ended early: no Fréchet distance in 2 measurements" and summary["iterations"] == 2


def test_dropout_of_all_processes_goes_on_to_the_bit(made, tmp_path):
    flags = ["--data", value(made, "--data"), "--iterations", "8", "--batch-size", "4", "--model-channels", "8"]
    flags += ["--dropout", "0.3", "--warmup-iterations", "0", "--log-every", "4", "--checkpoint-every", "2"]
    arguments = [*flags, "--num-samples", "0", "--snapshots", "1", "--device", "cpu", *QUIET]
    assert started_as_torchrun_does(2, pretrain, arguments, tmp_path / "whole")[0] == [0, 0]

    def kill(rank):
        iterate = pretraining.Pretraining.iterate

        def changed(self, iteration):
            if iteration == 5 and rank:
                os.kill(os.getpid(), signal.SIGKILL)
            iterate(self, iteration)

        pretraining.Pretraining.iterate = changed

    assert started_as_torchrun_does(2, pretrain, arguments, tmp_path / "killed", kill)[0] == [1, -signal.SIGKILL]
    codes, said = started_as_torchrun_does(2, pretrain, [*arguments, "--resume", "auto"], tmp_path / "killed")
    assert codes == [0, 0], said
    assert differences(tmp_path / "whole" / "run", tmp_path / "killed" / "run") == []


def test_a_slow_process_does_not_look_at_what_the_first_one_writes(made, tmp_path):
    """A run that was ended before it had begun begins: by then one process may have seen it otherwise."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    has_begun = tmp_path / "run" / "checkpoints"

    def wait():
        require = resume.Past.require_same

        def changed(self, config):
            while not (tmp_path / "run" / "config.json").exists():
                pass
            require(self, config)

        resume.Past.require_same = changed

    codes, said = started_as_torchrun_does(2, train, [*made, "--resume", "auto"], tmp_path, of_second(wait))
    assert codes == [0, 0] and has_begun.exists(), said


def test_other_arithmetic_of_one_process_is_refused(made, tmp_path):
    """By which the weights would go apart: after thirty updates, nine of ten had another last digit."""

    def change():
        os.environ["FASTDMD_BACKEND"] = "reference"

    message = "expected the same arithmetic in all processes, got others of ranks 1: FASTDMD_BACKEND reference"
    refused(tmp_path, train, made, of_second(change), message)


def test_an_error_before_processes_join_is_said_by_the_one_that_has_it(made, tmp_path):
    """As on a machine that does not see the folder of a run."""

    def fail(rank):
        def refuse(arguments):
            while rank == 0 and "error" not in (tmp_path / "stderr-1").read_text():
                time.sleep(0.02)
            raise ValueError(f"expected a run that rank {rank} sees, got none")

        resume.with_those_of_run = refuse

    codes, said = started_as_torchrun_does(2, train, made, tmp_path, fail)
    assert codes == [2, 2]
    assert said == ["", "fastdmd.train: error: expected a run that rank 1 sees, got none\n"]
