"""Runs benchmarks, compares them with stored results or with another commit, and tells in JSON, Markdown and SVG.

    python -m benchmarks [NAME ...] [--device auto|cpu|cuda] [--out FOLDER] [--arguments ...]
    python -m benchmarks --list
    python -m benchmarks [NAME ...] --against FILE|FOLDER|COMMIT [--factor 1.1] [--rounds 3]
    python -m benchmarks --stale

A NAME is that of a benchmark, or a part of one: `step`, `mnist-b8`; what `--list` says is on request needs its whole
name, and is neither among all nor among what is stale otherwise. Each runs in processes of its own, on native
libraries that are built of these sources before; one that fails is reported, and the others go on. Another commit is
measured here, too, by its own benchmarks, in alternation: its figures are compared themselves, by the medians of the
rounds. Stored results may be another machine's: theirs are compared by ratios, to eager PyTorch, the textbook loop or
a copy, which were measured in the same run. Exit code 1 if a figure is worse by more than --factor, if one is gone, or
if a benchmark failed; 2 for a mistake.

The project's own results are in benchmarks/results, and the README's figures are made of them. `--stale` measures those
for a CPU whose sources have changed since, and writes all that follows; `--store` does so with benchmarks of choice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.environment import gpu_name
from benchmarks.sources import ROOT
from benchmarks.suite import measure, readme, registry, report, stored
from benchmarks.suite.compare import Comparison, compare
from benchmarks.suite.measure import Sources
from benchmarks.suite.registry import Benchmark
from benchmarks.suite.stored import RESULTS, Stored
from fastdmd.files import write_atomically
from fastdmd.runs.cli import resolve_device
from fastdmd.runs.startup import THREAD_SETTINGS

OUT = ROOT / "build" / "benchmarks"
SPOILING = (*THREAD_SETTINGS, "ATEN_CPU_CAPABILITY", "FASTDMD_BACKEND", "FASTDMD_NATIVE")  # would be stored unseen


@dataclasses.dataclass(frozen=True)
class Opponent:
    """What is compared with: stored results by benchmark, or another commit."""

    name: str
    results: dict[str, Stored]
    commit: str | None = None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a benchmark, or a part of it (default: all)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--list", action="store_true", help="what there is, how long it takes, what is stored of it")
    parser.add_argument("--against", metavar="FILE|FOLDER|COMMIT", help="what to compare with")
    parser.add_argument("--factor", type=float, default=1.1, help="a figure that is worse by more is an error")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side, against a commit")
    parser.add_argument("--out", type=Path, help="folder to write to (default: build/benchmarks)")
    parser.add_argument("--store", action="store_true", help="writes to benchmarks/results, and the README of these")
    parser.add_argument("--stale", action="store_true", help="as --store, what is not of today's sources")
    parser.add_argument("--write-readme", action="store_true", help="measures nothing, writes what is made of results")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="for the benchmarks' own commands")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that mean nothing, alone or together."""
    if not 1 <= options.factor < math.inf:
        raise ValueError(f"expected --factor of at least 1, got {options.factor:g}")
    if options.rounds < 1:
        raise ValueError(f"expected --rounds of at least 1, got {options.rounds}")
    if (options.store or options.stale) and (options.out or options.arguments):
        raise ValueError("expected --store and --stale without --out and --arguments, got both")
    spoiling = [name for name in SPOILING if name in os.environ]
    if (options.store or options.stale) and spoiling:
        raise ValueError(f"expected --store and --stale in an environment of defaults, got {', '.join(spoiling)}")
    if options.stale and options.device == "cuda":
        raise ValueError("expected --stale for a CPU, got --device cuda: results of GPUs name their commit")


def opponent(against: str | None, benchmarks: Sequence[Benchmark], gpu: str) -> Opponent | None:
    """Raises ValueError for what is neither results of all these benchmarks nor a commit."""
    if against is None:
        return None
    path = Path(against)
    if path.is_dir():
        results = {b.name: stored.read(path / b.file_name(gpu), b) for b in benchmarks}
        return Opponent(against, results)
    if path.is_file():
        if len(benchmarks) != 1:
            raise ValueError(f"expected one benchmark to compare with the file {against}, got {len(benchmarks)}")
        return Opponent(against, {benchmarks[0].name: stored.read(path, benchmarks[0])})
    if (commit := measure.resolve_commit(against)) is None:
        raise ValueError(f"expected --against to be a file, a folder or a commit, got {against}")
    return Opponent(commit, {}, commit)


def run(
    benchmark: Benchmark, options: argparse.Namespace, here: Sources, there: Sources | None, other: Opponent | None
) -> tuple[Stored, Comparison | None]:
    """Its result, and how it compares. Raises RuntimeError if it fails."""
    measured: dict[Sources, list[Stored]] = {sources: [] for sources in (here, there) if sources}
    if there and (names := measure.measured_otherwise(benchmark, here, there)):
        print(f"benchmarks: at {there.commit} the benchmark is another: {', '.join(names)}", file=sys.stderr)
    for number in range(options.rounds if there else 1):
        for sources in reversed(measured) if number % 2 else measured:
            where = sources.commit if there else benchmark.measures
            print(f"\n{benchmark.name}: {where}, about {benchmark.minutes:g} minutes", flush=True)
            measured[sources].append(measure.measure(benchmark, options.arguments, sources))
    if other is None:
        return measured[here][-1], None
    before = measured[there] if there else [other.results[benchmark.name]]
    rounds = ([result.rows for result in results] for results in (measured[here], before))
    is_part = bool(options.arguments)
    return measured[here][-1], compare(*rounds, other.name, same_machine=there is not None, is_part=is_part)


@contextlib.contextmanager
def built(other: Opponent | None) -> Iterator[tuple[Sources, Sources | None]]:
    """The sources here and those of another commit, with their native libraries. Raises RuntimeError."""
    with contextlib.ExitStack() as stack:
        here = Sources.here()
        there = stack.enter_context(measure.of_commit(other.commit)) if other and other.commit else None
        for sources in filter(None, (here, there)):
            print(f"building the native libraries of {sources.commit}", flush=True)
            sources.build()
        yield here, there


def run_all(benchmarks: Sequence[Benchmark], options: argparse.Namespace, other: Opponent | None, gpu: str) -> int:
    """Runs them, writes what each measures at once and the report at the end; tells faults; the exit code."""
    faults, comparisons, measured = [], {}, []
    with built(other) as (here, there):
        for benchmark in benchmarks:
            path = options.out / benchmark.file_name(gpu)
            try:
                result, comparison = run(benchmark, options, here, there, other)
            except RuntimeError as error:
                faults.append(f"{benchmark.name} failed: {error}")
                continue
            stored.write(path, result.result)
            measured.append(dataclasses.replace(result, path=path))
            if comparison:
                comparisons[path.stem] = comparison
                faults += [f"{benchmark.name}: {line}" for line in comparison.faults(options.factor)]
    print(report.markdown(measured, comparisons), flush=True)
    for fault in faults:
        print(f"benchmarks: error: {fault}", file=sys.stderr)
    if options.out == RESULTS:
        write_pages()
    else:
        results = stored.found(options.out)
        write_text(options.out / "report.md", report.markdown(results, comparisons, "report.svg"))
        pictures = {"report.svg": report.picture(results, comparisons), **report.curves(results)}
        for name, text in pictures.items():
            write_text(options.out / name, text)
    return 1 if faults else 0


def write_pages() -> None:
    for path, text in readme.pages().items():
        write_text(path, text)


def make_folder(path: Path) -> None:
    """Raises ValueError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"expected --out to be a folder, got {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def listing() -> str:
    """A line for each benchmark."""
    results = stored.found(RESULTS)
    lines = [f"{'':<30}{'minutes':>7}  measures; stored"]
    for benchmark in registry.BENCHMARKS:
        own = [result for result in results if result.benchmark == benchmark]
        told = [f"{result.path.name} of {result.commits}" for result in own] or ["nothing"]
        state = " (stale)" if own and stored.fault(benchmark) else ""
        state += "; on request" if benchmark.on_request else ""
        lines.append(f"{benchmark.name:<30}{benchmark.minutes:>7g}  {benchmark.measures}; {', '.join(told)}{state}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        check(options)
        if options.list:
            print(listing())
            return 0
        if options.write_readme:
            write_pages()
            return 0
        device = "cpu" if options.stale else resolve_device(options.device).type
        benchmarks = registry.chosen(options.names, device)
        if options.stale:
            benchmarks = [benchmark for benchmark in benchmarks if stored.fault(benchmark)]
            if not benchmarks:
                print("benchmarks: nothing is stale")
                write_pages()
                return 0
        gpu = gpu_name() if device == "cuda" else ""
        other = opponent(options.against, benchmarks, gpu)
        options.out = RESULTS if options.store or options.stale else options.out or OUT
        make_folder(options.out)
    except (ValueError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    try:
        return run_all(benchmarks, options, other, gpu)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1


def end(number: int, _) -> None:
    """As by an error: what runs is ended, and a folder of another commit removed."""
    sys.exit(f"benchmarks: error: ended by {signal.Signals(number).name}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    sys.exit(main())
