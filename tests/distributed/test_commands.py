"""Commands that are started several times are one run: the first process writes what one alone would have written."""

import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.soak import differences, prepare
from fastdmd import evaluate, pairs, pretrain, sample, train
from fastdmd.runs import distillation
from tests.helpers.gloo import spoil_teacher, started_as_torchrun_does
from tests.helpers.kills import no_budget, training
from tests.helpers.tiny_runs import QUIET

SHORT = ["--iterations", "12", "--snapshots", "3", "--eval-every", "6", *QUIET]
AUTO = ["--resume", "auto"]
ROUNDED = {"rel": 2e-3, "abs": 1e-5}  # of float32, after some iterations of Adam
DIFFERENT = {"spread", "seconds", "images_per_second", "resident_bytes"}  # spread: within a process, see docs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Arguments of a run, and the folder of one process."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = [*prepare(folder), *SHORT]
    code, error = training(folder, arguments)
    assert code == 0, error
    return arguments, folder / "run"


def several(folder, arguments, size=2, before=lambda rank: None, command=train):
    train.budget_of = no_budget
    return started_as_torchrun_does(size, command, arguments, folder, before)


@pytest.fixture(autouse=True)
def with_a_budget(monkeypatch):
    monkeypatch.setattr(train, "budget_of", train.budget_of)  # put back


def at_iteration(iteration, rank, action):
    """For `before`: what one process does then; None: each."""

    def prepare_rank(own):
        if rank not in (None, own):
            return
        iterate = distillation.Distillation.iterate

        def changed(self, now):
            if now == iteration:
                action()
            iterate(self, now)

        distillation.Distillation.iterate = changed

    return prepare_rank


def require_same_run(run, other):
    """To rounding: every file, every number, what was measured and which weights."""
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}
    weights, others = load_file(run / "generator.safetensors"), load_file(other / "generator.safetensors")
    assert weights.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-3)
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        mine, theirs = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()] for folder in (run, other)
        )
        assert len(mine) == len(theirs) > 1
        for line, expected in zip(mine, theirs, strict=True):
            assert line.keys() == expected.keys()
            for key in line.keys() - DIFFERENT:
                number = isinstance(expected[key], float)
                assert line[key] == (pytest.approx(expected[key], **ROUNDED) if number else expected[key]), key
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, other))
    assert mine.keys() == theirs.keys() and mine["outcome"] == "complete"
    assert mine["generator"]["frechet_distance"] == pytest.approx(theirs["generator"]["frechet_distance"], **ROUNDED)
    assert mine["floor"] == theirs["floor"]


def test_several_processes_are_one_run(alone, tmp_path):
    arguments, run = alone
    codes, said = several(tmp_path, arguments, 4)
    assert codes == [0] * 4, said
    assert said[1:] == [""] * 3
    require_same_run(tmp_path / "run", run)


@pytest.mark.parametrize("sizes", [(4, 2), (4, 1), (1, 2)])
def test_a_signal_ends_all_and_others_go_on(alone, tmp_path, sizes):
    """Sent to one of them, of several twice, as by a scheduler and by torchrun; what they leave goes on in as many
    processes as there are then, to rounding."""
    arguments, run = alone
    times = range(min(2, sizes[0]))
    send = at_iteration(7, sizes[0] - 1, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in times])
    codes, said = several(tmp_path, arguments, sizes[0], send)
    assert codes == [128 + signal.SIGTERM] * sizes[0], said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["outcome"] == "interrupted" and 8 <= summary["iterations"] <= 11
    codes, said = several(tmp_path, [*arguments, *AUTO], sizes[1])
    assert codes == [0] * sizes[1], said
    assert "processes" in said[0] and "by its roundings" in said[0]
    require_same_run(tmp_path / "run", run)


def test_a_process_that_dies_ends_all_with_one_line_and_the_run_goes_on_to_the_bit(alone, tmp_path):
    arguments, _ = alone
    whole, codes = tmp_path / "whole", several(tmp_path / "whole", arguments)[0]
    assert codes == [0, 0]
    kill = at_iteration(7, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    codes, said = several(tmp_path / "killed", arguments, before=kill)
    assert codes == [1, -signal.SIGKILL]
    assert said[0].count("error: fastdmd: expected an answer of all 2 processes, got one that ended") == 1
    assert json.loads((tmp_path / "killed" / "run" / "summary.json").read_text())["outcome"] == "failed"
    codes, said = several(tmp_path / "killed", [*arguments, *AUTO])
    assert codes == [0, 0], said
    assert differences(whole / "run", tmp_path / "killed" / "run") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_is_said_once(alone, tmp_path, rank):
    arguments, _ = alone

    def fail():
        raise ValueError("fastdmd.test: expected nothing, got this")

    codes, said = several(tmp_path, arguments, 4, at_iteration(2, rank, fail))
    assert codes == [1] * 4
    assert "".join(said).count("error: ") == 1
    assert "fastdmd.test: expected nothing, got this (while distilling)" in said[rank]


def refused(folder, arguments, message, before=lambda rank: None, size=2):
    codes, said = several(folder, arguments, size, before)
    errors = [line for text in said for line in text.splitlines() if "error: " in line]
    assert codes == [2] * size and len(errors) == 1 and message in errors[0], (codes, said)
    assert not (folder / "run").exists()


def test_what_processes_do_not_divide_is_refused(alone, tmp_path):
    refused(tmp_path, alone[0], "expected --batch-size that 3 processes divide, got 8", size=3)
    more = [*alone[0], "--accumulation-steps", "8"]
    refused(tmp_path, more, "expected --batch-size that 2 processes divide, with 8 --accumulation-steps each, got 8")
    steps = [*alone[0], "--generator-sigmas", "8,7,6,5,4,3,2,1"]
    expected = "expected --batch-size that 2 processes divide, with 8 steps of --generator-sigmas each, got 8"
    refused(tmp_path, steps, expected)


def test_other_settings_or_another_teacher_of_one_process_are_refused_by_its_rank(alone, tmp_path, monkeypatch):
    from fastdmd.runs import cli

    def others(rank):
        if rank == 1:
            parse = cli.parse
            cli.parse = lambda *given: parse(*given).replace(seed=5)

    refused(tmp_path, alone[0], "expected the same settings in all processes, got others of ranks 1: --seed", others)

    def other_teacher(rank):
        if rank == 1:
            spoil_teacher()

    refused(tmp_path, alone[0], "expected the same teacher in all processes, got others of ranks 1: ", other_teacher)


def test_a_device_that_all_would_share_is_refused(alone, tmp_path):
    arguments = [*alone[0], "--device", "cuda:0"]
    refused(tmp_path, arguments, "expected --device auto, cuda or cpu of 2 processes, got cuda:0")


def test_commands_of_one_process_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_:
        sample.main(["mnist", "--out", str(tmp_path / "a.png")])
    assert exit_.value.code == 2 and not (tmp_path / "a.png").exists()
    assert "fastdmd.sample: error: expected one process, got 2 (WORLD_SIZE)" in capsys.readouterr().err


def test_pretraining(alone, tmp_path):
    data = alone[0][alone[0].index("--data") + 1]
    flags = ["--data", data, "--iterations", "6", "--batch-size", "8", "--model-channels", "8", "--log-every", "3"]
    arguments = [*flags, "--num-samples", "0", "--teacher-steps", "2", "--snapshots", "1", "--device", "cpu", *QUIET]
    weights = []
    for name, size in (("one", 1), ("two", 2)):
        codes, said = several(tmp_path / name, arguments, size, command=pretrain)
        assert codes == [0] * size, said
        weights.append(load_file(tmp_path / name / "run" / "teacher.safetensors"))
    lines = [(tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for mine, theirs in zip(*(map(json.loads, text) for text in lines), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-4)


def test_evaluation_is_the_same_to_the_bit(alone, tmp_path):
    """Batches are measured in their order, whoever sampled them: 700 images are three batches."""
    arguments = [alone[0][alone[0].index("--teacher") + 1], "--num-samples", "700", "--teacher-steps", "1"]
    found = []
    for size in (1, 2):
        codes, said = several(tmp_path / str(size), [*arguments, "--device", "cpu"], size, command=evaluate)
        assert codes == [0] * size, said
        found.append(json.loads((tmp_path / str(size) / "run").read_text()))
    for row in ("teacher", "floor"):
        speed = found[1][row].pop("images_per_second")
        found[0][row].pop("images_per_second")
        assert found[0][row] == found[1][row]
        assert row == "floor" or (math.isfinite(found[0][row]["frechet_distance"]) and speed > 0)


def test_pairs_are_the_same_to_the_bit(alone, tmp_path):
    arguments = ["--teacher", alone[0][alone[0].index("--teacher") + 1], "--num", "11", "--batch-size", "2"]
    for size in (1, 4):
        given = [*arguments, "--teacher-steps", "2", "--device", "cpu"]
        codes, said = several(tmp_path / str(size), given, size, command=pairs)
        assert codes == [0] * size, said
    files = sorted(path.name for path in (tmp_path / "1" / "run").iterdir())
    assert len(files) == 6 + 3 and files == sorted(path.name for path in (tmp_path / "4" / "run").iterdir())
    for name in files:
        assert (tmp_path / "1" / "run" / name).read_bytes() == (tmp_path / "4" / "run" / name).read_bytes(), name
