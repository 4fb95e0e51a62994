"""A plugin of pytest: what became of each test, in a file that is whole at every moment, whatever ends the run.

    python -m pytest -p benchmarks.record_tests --record FILE

Written whenever a test begins or ends: `counts` by outcome, `failures` with their text, `running`, the slowest.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

from fastdmd.files import write_atomically

MESSAGE_CHARACTERS = 4000  # of a failure, its end


def pytest_addoption(parser) -> None:
    parser.addoption("--record", type=Path, help="file for what becomes of each test")


def pytest_configure(config) -> None:
    if config.option.record and not hasattr(config, "workerinput"):  # the processes of xdist report to this one
        config.pluginmanager.register(Record(config.option.record))


class Record:
    """`running` are tests that began and did not end, as when the process was killed in the middle of them."""

    def __init__(self, path: Path):
        self.path, self.running = path, {}
        self.counts, self.failures, self.seconds = Counter(), {}, {}
        self.save()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = time.perf_counter()
        self.save()

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failures.setdefault(report.nodeid, report.longreprtext[-MESSAGE_CHARACTERS:])
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration
        self.save()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)
        self.save()

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.counts["not collected"] += 1
            self.failures[report.nodeid] = report.longreprtext[-MESSAGE_CHARACTERS:]
            self.save()

    def save(self) -> None:
        now = time.perf_counter()
        slowest = sorted(self.seconds, key=self.seconds.get, reverse=True)[:10]
        content = {
            "counts": dict(self.counts),
            "failures": self.failures,
            "running": {name: round(now - started, 1) for name, started in self.running.items()},
            "slowest": {name: round(self.seconds[name], 1) for name in slowest},
        }
        write_atomically(self.path, lambda file: file.write(json.dumps(content, indent=1).encode()))
