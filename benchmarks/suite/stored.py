"""Results that are stored: where they lie, what they say, and whether they are of today's sources."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sources import ROOT, source_hashes
from benchmarks.suite import registry
from benchmarks.suite.registry import Benchmark
from benchmarks.suite.rows import Row
from fastdmd.files import write_atomically

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Stored:
    """A result of a benchmark, and its figures."""

    benchmark: Benchmark
    path: Path
    result: dict
    rows: list[Row]

    @property
    def commits(self) -> str:
        """That of all, or those of its rows."""
        of_rows = {row["commit"] for row in self.result.get("results", ()) if "commit" in row}
        return ", ".join(sorted(of_rows)) or str(self.result.get("commit"))

    @property
    def extra(self) -> list[str]:
        """Arguments beyond those of the benchmark."""
        return self.result.get("command", [])[len(self.benchmark.command) :]

    @property
    def came_from(self) -> str:
        return f"{self.result.get('device')}, commit {self.commits}"


def read(path: Path, benchmark: Benchmark) -> Stored:
    """Raises ValueError for what is no result of that benchmark, FileNotFoundError for what is not there."""
    expected = f"expected {path} to be a result of {benchmark.name}"
    try:
        result = json.loads(path.read_text())
        if isinstance(result.get("measured"), dict):  # as `benchmarks.gpu` stores it
            result |= result["measured"]
        return Stored(benchmark, path, result, benchmark.rows(result))
    except FileNotFoundError:
        raise FileNotFoundError(f"{expected}, got no such file") from None
    except OSError as error:
        raise ValueError(f"{expected}, got {error.strerror}") from error
    except (ValueError, AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{expected}, got other contents: {type(error).__name__}: {error}") from error


def write(path: Path, result: dict) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(result, indent=1).encode() + b"\n"))


def found(folder: Path) -> list[Stored]:
    """All results of benchmarks in a folder, of any GPU. Raises ValueError for one that is not what its name says."""
    paths = sorted(folder.glob("*.json"))
    return [read(path, benchmark) for benchmark in registry.BENCHMARKS for path in paths if benchmark.owns(path.name)]


def fault(benchmark: Benchmark, folder: Path = RESULTS, root: Path = ROOT) -> str | None:
    """Why the result that is stored is none of today's sources and command; None where it is one, and for GPUs, whose
    results cannot be measured everywhere: they name their commit."""
    if benchmark.device != "cpu":
        return None
    try:
        result = read(folder / benchmark.file_name(""), benchmark).result
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if "sources" not in result:
        return "it does not say of which sources it is"
    if result.get("command") != benchmark.command:
        return f"expected it to be of {' '.join(benchmark.command)}, got {result.get('command')}"
    today, then = source_hashes(benchmark.sources, root), result["sources"]
    others = sorted(name for name in today.keys() | then.keys() if today.get(name) != then.get(name))
    return f"other sources since: {', '.join(others)}" if others else None
