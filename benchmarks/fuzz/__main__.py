"""Bad inputs, each read by a process that is watched.

    python -m benchmarks.fuzz [--count 2000] [--seed 0] [--jobs 1] [--only INDEX] [--json FILE]

An input is spoilt in a way that the seed and its index give. The package has to refuse it with one line and exit code
2, or to accept it with the values that another reader finds; see `sandbox.attempt`. Some inputs go through a whole
command, some of these in a process of its own. Prints how often which kind was refused and accepted, and how to repeat
what was wrong, which makes for exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import describe, of_process
from benchmarks.fuzz import datasets, flags, mutations, runs, weights
from benchmarks.fuzz.kind import Kind
from benchmarks.fuzz.sandbox import Outcome, attempt, judge_line

KINDS = datasets.KINDS + weights.KINDS + runs.KINDS
WEIGHTS = np.array([0.3 if kind.goes_on else 1.0 for kind in KINDS])
WEIGHTS /= WEIGHTS.sum()
OUTCOMES = ("refused", "accepted", "wrong")
FLAGS_SHARE = 0.2  # of all inputs
COMMAND_SHARE, PROCESS_SHARE = 0.1, 0.1  # of files a whole command reads; and of these a process
PROCESS_SECONDS = 240  # with its imports, on a machine that others use, too


class Inputs:
    """Good inputs of every kind, and bad ones by their index."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.others: list[Path] = []
        for kind in KINDS:
            good = folder / "good" / kind.name
            good.mkdir(parents=True)
            kind.make(good)
            self.others += [path for path in sorted(good.rglob("*")) if path.is_file()][:2]
            if not kind.goes_on:
                kind.read(good / kind.named)  # what is imported at first use, is so before a process is watched

    def run(self, index: int) -> tuple[str, str, Outcome]:
        """The kind of the input, how it was spoilt, and what became of it."""
        rng = np.random.default_rng([self.seed, index])
        place = self.folder / f"{index}"
        place.mkdir()
        try:
            if rng.random() < FLAGS_SHARE:
                (place / "input").mkdir()
                line = flags.draw(rng, str(place / "out"))
                outcome = attempt(line.read, line.right, place / "input", place / "scratch", is_command=True)
                return f"flags of {line.command}", "flags: words", outcome
            kind = KINDS[rng.choice(len(KINDS), p=WEIGHTS)]
            shutil.copytree(self.folder / "good" / kind.name, place / "input")
            how = mutations.spoil(rng, place / "input", kind.named, self.others)
            return kind.name, how, _outcome(rng, kind, place)
        finally:
            shutil.rmtree(place)


def _outcome(rng: np.random.Generator, kind: Kind, place: Path) -> Outcome:
    named = place / "input" / kind.named
    if not kind.command or rng.random() >= COMMAND_SHARE:
        how = {"is_command": kind.is_command, "goes_on": kind.goes_on}
        return attempt(lambda: kind.read(named), lambda: kind.right(named), place / "input", place / "scratch", **how)
    command, *words = [word.format(named, out=place / "out") for word in kind.command]
    if rng.random() < PROCESS_SHARE:
        return _process(command, words, place)

    def run() -> str:
        try:
            importlib.import_module(command).main(words)
        except SystemExit as stop:
            if stop.code not in (0, None):
                assert not [*place.glob("out*")], "something half written"
                raise
        return "done"

    # What a command accepts is compared where the file alone is read.
    return attempt(run, lambda: "done", place / "input", place / "scratch", is_command=True)


def _process(command: str, words: list[str], place: Path) -> Outcome:
    """As a user would start it."""
    (place / "scratch").mkdir()
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", command, *words],
            cwd=place / "scratch",
            env=of_process(PYTHONWARNINGS="ignore"),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROCESS_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Outcome("wrong", f"more than {PROCESS_SECONDS} s", PROCESS_SECONDS, 0)
    seconds = time.monotonic() - began
    if done.returncode == 0:
        return Outcome("accepted", "", seconds, 0)
    fault = judge_line(done.returncode, done.stderr)
    if fault is None and [*place.glob("out*"), *(place / "scratch").iterdir()]:
        fault = "something half written"
    return Outcome("refused" if fault is None else "wrong", fault or done.stderr.strip(), seconds, 0)


def _results(inputs: Inputs, indices: Sequence[int], num_jobs: int) -> Iterator[tuple[str, str, Outcome]]:
    """In the order of the indices."""
    if num_jobs == 1:
        yield from map(inputs.run, indices)
        return
    with multiprocessing.get_context("fork").Pool(num_jobs) as pool:
        yield from pool.imap(inputs.run, indices)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the index of one input, of which all is said")
    parser.add_argument("--jobs", type=int, default=1, help="processes that work side by side")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    wrong: list[dict[str, Any]] = []
    environment = describe("cpu")  # of the sources as they are now
    largest = 0
    indices = range(options.count) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory(prefix="fastdmd-fuzz-") as folder:
        inputs = Inputs(Path(folder).resolve(), options.seed)
        for index, (kind, how, outcome) in zip(indices, _results(inputs, indices, options.jobs), strict=True):
            counts[kind, how.partition(":")[0], outcome.kind] += 1
            largest = max(largest, outcome.num_bytes)
            if options.only is not None:
                print(f"{kind}, {how}: {outcome}")
            if outcome.kind == "wrong":
                repeat = f"python -m benchmarks.fuzz --seed {options.seed} --only {index}"
                wrong.append({"input": kind, "spoilt": how, "wrong": outcome.what, "repeat": repeat})
                print(f"WRONG {kind}, {how}: {outcome.what}\n    {repeat}", flush=True)
    rows = [
        {"input": kind, "spoilt": group} | {outcome: counts[kind, group, outcome] for outcome in OUTCOMES}
        for kind, group in sorted({(kind, group) for kind, group, _ in counts})
    ]
    print("".join(f"{name:>26}" if name == "input" else f"{name:>10}" for name in ("input", "spoilt", *OUTCOMES)))
    for row in rows:
        print("".join(f"{value:>26}" if name == "input" else f"{value:>10}" for name, value in row.items()))
    print("in all:", ", ".join(f"{sum(row[outcome] for row in rows)} {outcome}" for outcome in OUTCOMES))
    print(f"none took more than {largest >> 20} MiB; wrong: {len(wrong)} of {len(indices)}")
    if options.json is not None:
        result = {"environment": environment, "seed": options.seed, "count": options.count, "rows": rows}
        result |= {"most_mib": largest >> 20, "wrong": wrong}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
