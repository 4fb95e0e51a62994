"""Runs a benchmark, of these sources or of another commit's, in a process of its own."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environment
from benchmarks.sources import ROOT, source_hashes
from benchmarks.suite import stored
from benchmarks.suite.registry import Benchmark
from benchmarks.suite.stored import Stored


@dataclass(frozen=True)
class Sources:
    """A folder with the package and its benchmarks, and the commit that it is of."""

    root: Path
    commit: str | None

    @classmethod
    def here(cls) -> Sources:
        return cls(ROOT, environment.commit())

    def environment(self) -> dict[str, str]:
        commit = {"FASTDMD_COMMIT": self.commit} if self.commit else {}
        return environment.of_process(self.root, **commit)

    def build(self) -> None:
        """The native libraries, in place; of those that are of these sources nothing is compiled. With FASTDMD_NATIVE=0
        there are none. Raises RuntimeError."""
        variables = {"FASTDMD_NATIVE": "1", **self.environment()}
        if variables["FASTDMD_NATIVE"] != "0":
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            built = subprocess.run(command, cwd=self.root, env=variables, capture_output=True, text=True)
            if built.returncode:
                raise RuntimeError(f"the build of {self.commit} failed: {_last_line(built.stderr)}")


@contextlib.contextmanager
def of_commit(commit: str) -> Iterator[Sources]:
    """The sources of another commit, in a folder that goes at the end; not built. Raises RuntimeError."""
    with tempfile.TemporaryDirectory(prefix="fastdmd-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
        if archive.returncode:
            raise RuntimeError(f"git gives nothing of {commit}: {_last_line(archive.stderr.decode())}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Sources(Path(folder), commit)


def measured_otherwise(benchmark: Benchmark, here: Sources, there: Sources) -> list[str]:
    """Files of the benchmark itself that are others there, or not there: figures may differ for that alone."""
    paths = [path for pattern in benchmark.sources for path in here.root.glob(pattern)]
    names = [path.relative_to(here.root) for path in paths if path.is_relative_to(here.root / "benchmarks")]
    others = [name for name in names if _text(here.root / name) != _text(there.root / name)]
    return [str(name) for name in others]


def resolve_commit(name: str) -> str | None:
    """The short hash of what git calls so, or None."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--short", f"{name}^{{commit}}"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        return None


def measure(benchmark: Benchmark, extra: Sequence[str], sources: Sources) -> Stored:
    """What it measures now. Raises RuntimeError if it fails, or where its sources change meanwhile."""
    try:
        before = source_hashes(benchmark.sources, sources.root)
    except FileNotFoundError:  # another commit, which has other files
        before = None
    with tempfile.TemporaryDirectory() as folder:
        path, command = Path(folder) / "measured.json", [*benchmark.command, *extra]
        _run([sys.executable, *command, "--json", str(path)], sources)
        try:
            result = stored.read(path, benchmark)
        except (FileNotFoundError, ValueError) as error:
            raise RuntimeError(str(error)) from error
    if not result.rows:
        raise RuntimeError("expected figures, got none")
    if before:
        if source_hashes(benchmark.sources, sources.root) != before:
            raise RuntimeError("its sources have changed while it was measured")
        result.result.update(command=command, sources=before)
    return result


def _run(command: Sequence[str], sources: Sources) -> None:
    """Ends with all that the command has started, however this process ends but by SIGKILL."""
    process = subprocess.Popen(command, cwd=sources.root, env=sources.environment(), start_new_session=True)
    try:
        if code := process.wait():
            raise RuntimeError(f"exit code {code} at {sources.commit}, see above")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]
