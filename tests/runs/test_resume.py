"""Runs that are killed and go on: they end as if nothing had been; and what does not go on, and says why."""

import json
import os
import random
import shutil
import signal

import pytest

from benchmarks.soak import differences, prepare
from fastdmd import train
from fastdmd.networks.weights import save_network
from fastdmd.runs.lock import locked
from tests.helpers.kills import training
from tests.helpers.networks import make_network
from tests.helpers.tiny_runs import refuses

SHORT = ["--iterations", "13", "--snapshots", "4"]
AUTO = ["--resume", "auto"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What runs are made of, a run that nobody killed, and how often it touches its files."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = [*prepare(folder), *SHORT]
    code, error = training(folder, arguments)
    assert code == 0, error
    return folder, arguments, int((folder / "touches").read_text())


@pytest.fixture
def ended(whole, tmp_path, monkeypatch, capsys):
    """A copy of that run, in the folder where the command is called, and its arguments, which would go on with it."""
    folder, arguments, _ = whole
    shutil.copytree(folder / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run", [*arguments, "--out", "run", *AUTO]


def send(number):
    return lambda: os.kill(os.getpid(), number)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(3))
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


def test_a_signal_leaves_a_checkpoint_and_sigusr1_writes_one(whole, tmp_path):
    """Of the moment before the last line of the log and the last snapshot, which a run without a signal does not have."""
    folder, arguments, _ = whole
    never = [*arguments, "--checkpoint-every", "1000"]
    code, error = training(tmp_path, never, at_iteration=(4, send(signal.SIGUSR1)))
    run = tmp_path / "run"
    assert code == 0 and [path.name for path in sorted((run / "checkpoints").iterdir())] == ["00000005", "00000013"]
    shutil.rmtree(run)
    code, error = training(tmp_path, never, at_iteration=(7, send(signal.SIGTERM)))
    assert code == 128 + signal.SIGTERM, error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000008"]
    assert json.loads((run / "summary.json").read_text())["outcome"] == "interrupted"
    code, error = training(tmp_path, ["--resume", "run", "--log-every", "3"])  # all else it knows
    assert code == 0 and "left out" not in error, error
    assert differences(folder / "run", run) == []


def test_a_run_without_a_checkpoint_begins_again(whole, tmp_path):
    """But not where nobody wanted any, and what there is has been worth something."""
    folder, arguments, _ = whole
    code, _ = training(tmp_path, [*arguments, "--checkpoint-every", "10m"], at_iteration=(7, send(signal.SIGKILL)))
    run = tmp_path / "run"
    assert code == -signal.SIGKILL and len((run / "metrics.jsonl").read_text().splitlines()) == 2
    code, error = training(tmp_path, [*arguments, *AUTO])
    assert code == 0 and differences(folder / "run", run) == [], error
    shutil.rmtree(run)
    training(tmp_path, [*arguments, "--checkpoint-every", "0"], at_iteration=(7, send(signal.SIGTERM)))
    before = contents(run)
    assert not (run / "checkpoints").exists() and before
    code, error = training(tmp_path, [*arguments, *AUTO])
    assert code == 2 and "expected a checkpoint in run, got a run with --checkpoint-every 0\n" in error
    assert contents(run) == before


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
        "expected no --out beside --resume run, got elsewhere",
    ),
    "no run": (
        ["--resume", "nowhere", "--out", "nowhere"],
        "expected --resume to be the folder of a run with a .*nowhere",
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
        refuses(train, arguments, "expected a run folder that nobody writes to, got run, where a run goes on", capsys)
    assert contents(run) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BROKEN = {
    "cut": lambda path: cut(path / "state.safetensors"),
    "flipped": lambda path: flip(path / "state.safetensors"),
    "settings": lambda path: flip(path / "state.json"),
    "missing": lambda path: (path / "state.json").unlink(),
    "no sums": lambda path: (path / "SHA256SUMS").unlink(),
    "best": lambda path: cut(path / "best.safetensors"),
    "metrics": lambda path: (path.parents[1] / "metrics.jsonl").write_text(""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_left_out_for_an_older_one(ended, whole, kind, capsys):
    run, arguments = ended
    interrupted(run)
    newest = run / "checkpoints" / "00000013"
    BROKEN[kind](newest)
    if kind == "metrics":  # which none of them fits
        before = contents(run)
        with pytest.raises(SystemExit) as exit_:
            train.main(arguments)
        assert exit_.value.code == 2 and contents(run) == before
        assert "expected at least" in capsys.readouterr().err.splitlines()[-1]
        return
    train.main(arguments)
    said = capsys.readouterr().err
    assert "run/checkpoints/00000013 left out: expected a whole checkpoint in" in said
    assert "; going on from 00000012\n" in said
    assert differences(whole[0] / "run", run) == []
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000012", "00000013"]
