"""Runs that are killed and go on: they end as if nothing had been; and what does not go on, and says why."""

import json
import os
import random
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.soak import differences, prepare
from fastdmd import pretrain, train
from fastdmd.networks.weights import save_network
from fastdmd.runs.lock import locked
from tests.helpers.kills import counted_touches, no_budget, training
from tests.helpers.networks import make_network
from tests.helpers.tiny_runs import QUIET, refuses

SHORT = ["--iterations", "13", "--snapshots", "4", "--eval-every", "7", *QUIET]
AUTO = ["--resume", "auto"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What runs are made of, a run that nobody killed, and how often it touches its files."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = [*prepare(folder), *SHORT]
    with pytest.MonkeyPatch.context() as patch, counted_touches() as touches:
        patch.chdir(folder)
        patch.setattr(train, "budget_of", no_budget)
        train.main([*arguments, "--out", "run"])
    return folder, arguments, touches[0]


@pytest.fixture
def ended(whole, tmp_path, monkeypatch, capsys):
    """A copy of that run, in the folder where the command is called, and its arguments, which would go on with it."""
    folder, arguments, _ = whole
    shutil.copytree(folder / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "budget_of", no_budget)
    return tmp_path / "run", [*arguments, "--out", "run", *AUTO]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_ends_as_if_nothing_had_been(whole, tmp_path, seed):
    """At any touch of a file: inside a checkpoint, between two files, as it begins, and as it goes on."""
    folder, arguments, num_touches = whole
    rng = random.Random(seed)
    for _ in range(2):
        code, error = training(tmp_path, [*arguments, *AUTO], kill_at=rng.randrange(1, num_touches))
        assert code in (-signal.SIGKILL, 0), error
    code, error = training(tmp_path, [*arguments, *AUTO])
    assert code == 0, error
    assert differences(folder / "run", tmp_path / "run") == []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 13


def test_signals_leave_checkpoints(whole, tmp_path):
    """SIGUSR1 ends nothing. One that does leaves the state before the last line of the log and the last snapshot."""
    folder, arguments, _ = whole
    sends = {4: signal.SIGUSR1, 7: signal.SIGTERM}
    code, error = training(tmp_path, [*arguments, "--checkpoint-every", "1000"], sends=sends)
    assert code == 128 + signal.SIGTERM, error
    run = tmp_path / "run"
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["00000005", "00000008"]
    assert json.loads((run / "summary.json").read_text())["outcome"] == "interrupted"
    code, error = training(tmp_path, ["--resume", "run", "--log-every", "3"])  # all else it knows
    assert code == 0 and "left out" not in error, error
    assert differences(folder / "run", run) == []
    seconds = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    assert seconds == sorted(seconds) and seconds[-1] < summary["train_seconds"] < summary["seconds"]
    assert 0 < summary["first_iteration_seconds"] < summary["seconds"] and summary["evaluation_seconds"] > 0


def test_a_run_without_a_checkpoint_begins_again(whole, tmp_path):
    """But not where nobody wanted any, and what there is has been worth something."""
    folder, arguments, _ = whole
    code, error = training(tmp_path, [*arguments, "--checkpoint-every", "0"], sends={5: signal.SIGTERM})
    assert code == 128 + signal.SIGTERM, error
    run = tmp_path / "run"
    before = contents(run)
    assert not (run / "checkpoints").exists() and len((run / "metrics.jsonl").read_text().splitlines()) == 2
    code, error = training(tmp_path, [*arguments, *AUTO])
    assert code == 2 and "expected a checkpoint in run, got a run with --checkpoint-every 0\n" in error
    assert contents(run) == before
    config = json.loads((run / "config.json").read_text())
    config["checkpoint"]["checkpoint_every"] = "10m"
    (run / "config.json").write_text(json.dumps(config))
    code, error = training(tmp_path, [*arguments, *AUTO])
    assert code == 0 and differences(folder / "run", run) == [], error


def test_pretraining_goes_on(whole, tmp_path):
    """With dropout, which draws from torch's own generator."""
    data = str(whole[0] / "data.npz")
    sizes = ["--iterations", "9", "--batch-size", "8", "--model-channels", "8", "--log-every", "2", "--snapshots", "3"]
    arguments = ["--data", data, *sizes, "--dropout", "0.3", "--label-emphasis", "1.2", "--device", "cpu"]
    arguments += ["--warmup-iterations", "0", "--num-samples", "30", "--teacher-steps", "2"]
    code, error = training(tmp_path / "whole", arguments, command=pretrain)
    assert code == 0, error
    for sends, expected in (({5: signal.SIGUSR1, 7: signal.SIGKILL}, -signal.SIGKILL), ({}, 0)):
        code, error = training(tmp_path / "other", [*arguments, *AUTO], sends=sends, command=pretrain)
        assert code == expected, error
    assert differences(tmp_path / "whole" / "run", tmp_path / "other" / "run") == []
    code, error = training(tmp_path / "other", ["--resume", "run", "--dropout", "0.2"], command=pretrain)
    assert code == 2 and error.endswith("expected the settings that the run was begun with: --dropout 0.3, got 0.2\n")


def test_a_run_whose_rates_stay_may_become_longer(whole, tmp_path):
    """Even one that is complete; it is then as if it had been so long from the start."""
    _, arguments, _ = whole
    constant = [*arguments, "--lr-schedule", "constant", "--eval-every", "0", "--num-samples", "0", "--iterations"]
    for iterations in ("6", "10"):
        code, error = training(tmp_path / "longer", [*constant, iterations, *AUTO])
        assert code == 0, error
    code, error = training(tmp_path / "whole", [*constant, "10"])
    assert code == 0, error
    weights = [load_file(tmp_path / name / "run" / "networks.safetensors") for name in ("longer", "whole")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()) and len(weights[0]) > 100
    code, error = training(tmp_path / "longer", [*constant, "8", *AUTO])
    assert code == 2 and error.endswith("expected --iterations >= 10, which the run has reached, got 8\n")


def test_what_is_no_run_is_neither_gone_on_with_nor_touched(ended, capsys):
    """What a run that was killed as it was made leaves is empty; all else somebody may want."""
    run, arguments = ended
    for keep in ("generator.safetensors", "metrics.jsonl", "checkpoints"):
        folder = run.parent / f"only-{keep}"
        (folder if keep != "checkpoints" else folder / keep).mkdir(parents=True)
        if keep != "checkpoints":
            shutil.copy(run / keep, folder / keep)
        before = contents(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            train.main([*arguments, "--out", folder.name])
        assert exit_.value.code == 2 and contents(folder) == before
        expected = f"expected a run's config.json in {folder.name}, got {keep} without\n"
        assert capsys.readouterr().err.endswith(expected)


def test_a_run_that_is_complete_stays_as_it_is(ended, capsys):
    run, arguments = ended
    before = contents(run)
    train.main(arguments)
    assert "run holds a run that is complete; nothing is left to do" in capsys.readouterr().out
    train.main(["--resume", str(run)])
    assert f"{run} holds a run that is complete; nothing is left to do" in capsys.readouterr().out
    assert contents(run) == before


REFUSED = {
    "another setting": (
        ["--batch-size", "12", "--seed", "1"],
        "--batch-size 8, got 12; .*--seed 0, got 1|--seed 0, .*",
    ),
    "another end": (["--iterations", "20"], "--iterations 13, got 20"),
    "other measurements": (["--eval-samples", "20"], "--eval-samples 40, got 20"),
    "another folder": (
        ["--resume", "run", "--out", "elsewhere"],
        "no --out beside --resume run, got elsewhere",
    ),
    "no run": (
        ["--resume", "nowhere", "--out", "nowhere"],
        "the folder of a run with a checkpoint, got nowhere",
    ),
    "no folder": (["--out", "None"], "expected --resume together with --out, got auto"),
    "no checkpoints": (["--keep-last", "0"], "expected --keep-last >= 1, got 0"),
    "another rhythm": (["--checkpoint-every", "1h"], "expected --checkpoint-every as minutes .*, got 1h"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_may_not_change_is_refused_by_name(ended, kind, capsys):
    run, arguments = ended
    options, message = REFUSED[kind]
    before = contents(run)
    refuses(train, [*arguments, *options], message, capsys)
    assert contents(run) == before and not (run.parent / "elsewhere").exists()


def interrupted(run):
    """As if it had been killed after its last checkpoint."""
    (run / "summary.json").unlink()


def test_what_may_change_does(ended, capsys):
    run, arguments = ended
    interrupted(run)
    train.main([*arguments, "--num-samples", "30", "--eval-samples", "40", "--keep-last", "1"])
    assert json.loads((run / "summary.json").read_text())["generator"]["num_images"] == 30
    assert json.loads((run / "config.json").read_text())["evaluation"]["num_samples"] == 30


def test_another_teacher_is_refused(ended, tmp_path, capsys):
    run, arguments = ended
    interrupted(run)
    save_network(tmp_path / "other.safetensors", make_network(), kind="teacher")
    before = contents(run)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train.main([*arguments, "--teacher", str(tmp_path / "other.safetensors")])
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and last.startswith(
        "fastdmd.train: error: expected the teacher that the run was begun"
    )
    assert contents(run) == before


def test_two_runs_in_one_folder_are_one_too_many(ended, capsys):
    run, arguments = ended
    interrupted(run)
    before = contents(run)
    with locked(run / "metrics.jsonl"):
        message = f"a run folder that nobody writes to, got run, where another run writes, of process {os.getpid()}$"
        refuses(train, arguments, message, capsys)
        refuses(train, arguments[:-2], message, capsys)  # of two that start at once, that which is slower
    assert contents(run) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_a_broken_checkpoint_is_left_out_for_an_older_one(ended, whole, capsys):
    run, arguments = ended
    interrupted(run)
    cut(run / "checkpoints" / "00000013" / "state.safetensors")
    train.main(arguments)
    said = capsys.readouterr().err
    assert "run/checkpoints/00000013 left out: expected a whole checkpoint in run/checkpoints/00000013, got ano" in said
    assert "; going on from 00000012\n" in said
    assert differences(whole[0] / "run", run) == []
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000012", "00000013"]


def test_a_checkpoint_of_another_moment_or_run_is_left_out(ended, capsys):
    run, arguments = ended
    interrupted(run)
    checkpoints = run / "checkpoints"
    (checkpoints / "00000013").rename(checkpoints / "00000012.mine")
    (checkpoints / "00000012").rename(checkpoints / "00000013")
    before = contents(run)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and contents(run) == before
    assert last == (
        "fastdmd.train: error: expected a checkpoint of iteration 13 in run/checkpoints/00000013, got another's"
    )


def test_where_no_checkpoint_fits_nothing_changes(ended, capsys):
    run, arguments = ended
    interrupted(run)
    (run / "metrics.jsonl").write_text("{}\n")
    cut(run / "checkpoints" / "00000012" / "state.json")
    before = contents(run)
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments)
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and "left out" not in said
    assert re.search(r"error: expected at least \d{4} bytes of run/metrics.jsonl, got 3$", said.splitlines()[-1])
    assert contents(run) == before
