"""Folders of runs in which something is lost, foreign or another process's: nothing of a run is overwritten for it."""

import json
import os
import signal
import threading

import pytest
import torch

from fastdmd.networks.weights import save_network
from fastdmd.runs.checkpoints import Checkpoints, CheckpointSettings, found
from fastdmd.runs.cli import to_json
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.folder import ReopenedFolder, RunFolder
from fastdmd.runs.lock import locked
from fastdmd.runs.resume import Past, open_folder, past_of
from tests.helpers.networks import make_network

LINES = [{"iteration": 50, "seconds": 30.0}, {"iteration": 100, "seconds": 70.0}]


@pytest.fixture
def config(tmp_path):
    return TrainConfig().replace(out=tmp_path / "run", resume="auto")


def begun(config, lines=(), summary=None):
    """The folder of a run with these lines in its log, which no process has."""
    with RunFolder(config.out, to_json(config)) as folder:
        for line in lines:
            folder.log(**line)
        if summary is not None:
            folder.write_json("summary.json", summary)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(folder, **settings):
    return Checkpoints(folder, CheckpointSettings(**settings), {"versions": {}}, lambda origin: None)


def state(number):
    return lambda: {"number": number, "tensor": torch.full((3,), float(number))}


@pytest.mark.parametrize(
    ("every", "seconds", "summary", "is_refused"),
    [
        ("10m", 70, None, False),
        ("1m", 70, None, True),
        ("101", 70, None, False),
        ("100", 70, None, True),
        ("10m", 70, {"outcome": "complete", "reason": None, "iterations": 100}, True),
        ("10m", 70, {"outcome": "interrupted"}, False),
        ("10m", 70, {}, False),
        ("10m", 70, {"outcome": "complete", "reason": 5, "iterations": "many"}, True),
    ],
)
def test_a_run_that_must_have_had_checkpoints_does_not_begin_again(config, capsys, every, seconds, summary, is_refused):
    config = config.replace(checkpoint_every=every)
    begun(config, LINES, summary)
    before, past = contents(config.out), Past.of(config.out)
    if is_refused:
        with pytest.raises(
            ValueError, match="expected a checkpoint in .*run, got none of a run of 100 iterations; begin"
        ):
            past.require_same(config)
    else:
        past.require_same(config)
        assert "has no checkpoint yet: the run begins again, with its first 100 iterations" in capsys.readouterr().err
    assert contents(config.out) == before


@pytest.mark.parametrize(
    ("iterations", "minutes", "summary", "is_refused"),
    [
        (0, 0, None, None),
        (40, 9, None, False),
        (40, 11, None, True),
        (0, 0, {"outcome": "complete", "iterations": 3}, True),
    ],
)
def test_what_weights_and_summary_tell_counts_where_the_log_does_not(
    config, capsys, iterations, minutes, summary, is_refused
):
    """As with --log-every 5000, or where metrics.jsonl was lost."""
    begun(config.replace(checkpoint_every="10m"), (), summary)
    weights = config.out / "generator.safetensors"
    save_network(weights, make_network(), kind="generator", conditioning_sigma=80.0, iterations=iterations)
    began = (config.out / "config.json").stat().st_mtime
    os.utime(weights, (began, began + 60 * minutes))
    before, past = contents(config.out), Past.of(config.out)
    if is_refused:
        with pytest.raises(
            ValueError, match=f"expected a checkpoint in .*run, got none of a run of {iterations or 3} it"
        ):
            past.require_same(config)
    else:
        past.require_same(config)
        said = capsys.readouterr().err
        assert ("the run begins again, with its first 40 iterations" in said) == (is_refused is False) == bool(said)
    assert contents(config.out) == before


def test_a_disk_that_fills_up_takes_no_part_of_a_line(config):
    """The next line would be glued to it, and both were lost."""
    resource = pytest.importorskip("resource")
    folder = begun(config, LINES)
    before = (config.out / "metrics.jsonl").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError):
            folder.log(iteration=150, text="x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (config.out / "metrics.jsonl").read_bytes() == before
    folder.log(iteration=200)
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [50, 100, 200]


def test_checkpoints_that_are_no_folder(config, tmp_path):
    begun(config, LINES)
    place = config.out / "checkpoints"
    for make in (lambda: place.symlink_to(tmp_path / "not mounted"), place.touch):
        make()
        with pytest.raises(ValueError, match="expected a folder in .*, got something else, or a link"):
            Past.of(config.out)
        place.unlink()


def test_a_folder_that_another_process_has_changed_meanwhile_is_left_alone(config):
    begun(config, LINES)
    past = Past.of(config.out)
    with open_folder(config, past) as other:  # a process that is quicker: it begins, and ends
        checkpoints(other).write(50, state(50))
        other.log(iteration=50)
    before = contents(config.out)
    with pytest.raises(
        BlockingIOError, match="expected .*run to stay as it was, got changes by another process meanwhile"
    ):
        open_folder(config, past)
    assert contents(config.out) == before
    open_folder(config, Past.of(config.out)).close()  # the lock is free
    assert contents(config.out) == before


def test_two_that_begin_at_once(config):
    """The slower one is told of the other, not of the other's files."""
    with RunFolder(config.out, {}):
        before = contents(config.out)
        for open_ in (lambda: RunFolder(config.out, {}), lambda: Past.of(config.out), lambda: past_of(config)):
            with pytest.raises(BlockingIOError, match=f"where another run writes, of process {os.getpid()}$"):
                open_()
        assert contents(config.out) == before
    with pytest.raises(FileExistsError, match="which already holds a run's config.json; --resume auto goes on"):
        RunFolder(config.out, {})


def test_who_asks_for_a_lock_keeps_nobody_from_it(config):
    folder = begun(config)
    asking = locked(folder.path / "metrics.jsonl")
    threading.Timer(0.03, asking.close).start()
    locked(folder.path / "metrics.jsonl").close()


def test_foreign_names_are_neither_gone_on_from_nor_counted(config):
    with begun(config) as folder:
        own = checkpoints(folder, keep_last=1)
        own.write(2, state(2))
        (config.out / "checkpoints" / "99999999").mkdir()
        (config.out / "checkpoints" / "００００００１２").mkdir()
        (config.out / "checkpoints" / "00000007").touch()
        (config.out / "checkpoints" / "00000001.broken").touch()
        own.write(4, state(4))
        assert [path.name for path in found(config.out)] == ["99999999", "00000004"]
        assert not list((config.out / "checkpoints").glob(".*")) and not list(config.out.rglob("*.broken"))
    Past.of(config.out).require_same(config)  # 99999999 is no iteration that it has reached
    loaded = []
    with ReopenedFolder(config.out, to_json(config)) as folder:
        assert checkpoints(folder).restore(lambda state, iteration: loaded.append(state))
    assert loaded[0]["number"] == 4 and torch.equal(loaded[0]["tensor"], torch.full((3,), 4.0))


def test_a_checkpoint_that_breaks_twice_is_put_aside_twice(config, capsys):
    with begun(config) as folder:
        own = checkpoints(folder)
        own.write(2, state(2))
        own.write(4, state(4))
        (config.out / "checkpoints" / "00000004" / "state.json").write_text("{}")
        (config.out / "checkpoints" / "00000004.broken").mkdir()
        (config.out / "checkpoints" / "00000004.broken" / "x").touch()
        assert checkpoints(folder).restore(lambda state, iteration: None)
    assert "00000004 left out: " in capsys.readouterr().err
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["00000002", "00000004.broken"]
    assert not (config.out / "checkpoints" / "00000004.broken" / "x").exists()


@pytest.mark.parametrize("fault", ["changed", "zeros", "cut", "gone", "longer"])
def test_a_log_that_does_not_begin_as_it_did_is_not_cut(config, fault):
    with begun(config, LINES) as folder:
        checkpoints(folder).write(100, state(100))
    log = config.out / "metrics.jsonl"
    text = log.read_bytes()
    if fault == "gone":
        log.unlink()
    else:
        changed = {"changed": text.replace(b"50", b"51"), "zeros": bytes(len(text)), "cut": text[:-1]}
        log.write_bytes(changed.get(fault, text + b'{"iteration": 150'))
    with ReopenedFolder(config.out, to_json(config)) as folder:
        before = contents(config.out)
        if fault == "longer":  # by what was logged after the checkpoint
            assert checkpoints(folder).restore(lambda state, iteration: None) and log.read_bytes() == text
            return
        with pytest.raises(ValueError, match=r"expected (at least \d+ bytes of|.*/metrics.jsonl to begin with what)"):
            checkpoints(folder).restore(lambda state, iteration: None)
        assert contents(config.out) == before


@pytest.mark.parametrize("kept", [[], {"x": 1}, {"checkpoint_every": 5}, {"checkpoint_every": "now"}])
def test_settings_that_are_none(config, kept):
    begun(config, LINES)
    content = json.loads((config.out / "config.json").read_text())
    (config.out / "config.json").write_text(json.dumps(content | {"checkpoint": kept}))
    with pytest.raises(
        ValueError, match="expected a run's settings in .*config.json, got|expected the settings that the"
    ):
        Past.of(config.out).require_same(config)
