"""`fastdmd.pairs` twice at once, with one folder."""

import os

import pytest

from fastdmd import pairs
from fastdmd.runs.lock import locked
from tests.commands.test_pairs import TINY, contents, run_pairs
from tests.helpers.tiny_runs import refuses


def test_two_do_not_write_to_one_folder(teacher_file, tmp_path, capsys):
    out = run_pairs(teacher_file, tmp_path / "pairs")
    (out / "pairs-00001.safetensors").unlink()
    before = contents(out)
    capsys.readouterr()
    with locked(out / "pairs.lock"):
        message = f"nobody writes to, got {out}, where another run writes, of process {os.getpid()}$"
        refuses(pairs, ["--teacher", str(teacher_file), "--out", str(out), *TINY], message, capsys)
    assert contents(out) == before


def test_of_two_that_start_at_once_one_is_refused(teacher_file, tmp_path, monkeypatch, capsys):
    """The other one has begun the folder after this one looked: with another seed its noise would be another."""
    out, open_folder = tmp_path / "pairs", pairs.open_folder

    def late(*given):
        opened = open_folder(*given)
        with monkeypatch.context() as patched:
            patched.setattr(pairs, "open_folder", open_folder)
            run_pairs(teacher_file, out, "--seed", "1")
        return opened

    monkeypatch.setattr(pairs, "open_folder", late)
    with pytest.raises(SystemExit) as exit_:
        run_pairs(teacher_file, out, "--seed", "0")
    assert exit_.value.code == 1 and "expected pairs of seed 0 in" in capsys.readouterr().err
    monkeypatch.setattr(pairs, "open_folder", open_folder)
    before = contents(out)
    assert contents(run_pairs(teacher_file, out, "--seed", "1")) == before and len(before) == 5
