"""The lock of a run folder, also where the system knows none, or does not tell who has it."""

import errno
from pathlib import Path

import pytest

from fastdmd.runs import lock
from fastdmd.runs.lock import locked, require_free


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_two_cannot_have_it(path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0)
    require_free(path)  # which is not there yet, and is not made
    assert not path.exists()
    with locked(path):
        for ask in (locked, require_free):
            with pytest.raises(BlockingIOError, match=f"got {path.parent}, where another run writes"):
                ask(path)
    require_free(path)


@pytest.mark.parametrize("table", [OSError(errno.EACCES, "no"), "1: POSIX ADVISORY WRITE 1 00:01:2 0 EOF\n", ""])
def test_without_the_name_of_who_has_it(table, path, monkeypatch):
    """Where /proc/locks cannot be read, or does not have it."""

    def read(self):
        if isinstance(table, str):
            return table
        raise table

    monkeypatch.setattr(lock, "WAIT_SECONDS", 0)
    with locked(path), monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read)
        with pytest.raises(BlockingIOError, match="where another run writes$"):
            locked(path)


def test_file_systems_without_locks_keep_nobody_out(path, monkeypatch):
    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(file, how):
            raise OSError(errno.ENOLCK, "No locks available")

    for system in (NoLocks, None):
        monkeypatch.setattr(lock, "fcntl", system)
        with locked(path) as first, locked(path) as second:
            second.write(b"b")
            second.flush()
            first.write(b"a")
    assert path.read_bytes() == b"baba"
