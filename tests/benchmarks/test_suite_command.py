"""`python -m benchmarks` with benchmarks that take no time: what it compares with, writes, tells, and leaves."""

import dataclasses
import json
import os
import subprocess
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import environment
from benchmarks.suite import measure, registry, stored
from benchmarks.suite.registry import Benchmark
from benchmarks.suite.rows import Row

# Writes seconds from a file beside it, and notes in another that it ran, of which commit, and after which build.
STUB = """
import json, os, subprocess, sys
from pathlib import Path
here, name, log, path = Path(__file__).parent, sys.argv[1], sys.argv[2], sys.argv[-1]
with open(log, "a") as file:
    print(name, os.environ["FASTDMD_COMMIT"], (here / "built").read_text(), *sys.argv[3:-2], file=file)
if name == "fails":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(log).with_name("child").write_text(str(child.pid))
    sys.exit("no")
if name == "changes":
    (here / "seconds").write_text("3")
seconds = float((here / "seconds").read_text())
Path(path).write_text(json.dumps({"seconds": seconds, "eager": 4.0, "commit": os.environ["FASTDMD_COMMIT"]}))
"""
SETUP = """
import os, sys
assert sys.argv[1:] == ["-q", "build_ext", "--inplace"] and os.environ["FASTDMD_NATIVE"] == "1"
with open("built", "w") as file:
    file.write(open("seconds").read())
"""


def figures(result):
    ratio = result["eager"] / result["seconds"]
    return [Row("a call", result["seconds"], "s", ratio=ratio, yardstick="eager")]


def stub(name, log):
    return Benchmark(f"cpu-{name}", name, "stub", (name, str(log)), figures, ("stub.py", "seconds"), 0.1)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with a commit that takes 1 second, tagged so, and one that takes 2; results of 1 in `stored`."""
    root, log = tmp_path / "clone", tmp_path / "log"
    root.mkdir()

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    (root / "stub.py").write_text(STUB)
    (root / "setup.py").write_text(SETUP)
    (root / ".gitignore").write_text("built\n/out/\n__pycache__/\n")
    git("init")
    for seconds, tag in (("1", "one-second"), ("2", "two-seconds")):
        (root / "seconds").write_text(seconds)
        git("add", ".")
        git("commit", "-m", tag)
        git("tag", tag)
    monkeypatch.delenv("FASTDMD_COMMIT", raising=False)
    for name in command.SPOILING:
        monkeypatch.delenv(name, raising=False)
    for module in (measure, environment):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(registry, "BENCHMARKS", tuple(stub(name, log) for name in ("fine", "fails", "changes")))
    monkeypatch.setattr(command, "OUT", root / "out")
    (tmp_path / "stored").mkdir()
    stored.write(tmp_path / "stored" / "cpu-fine.json", {"seconds": 10.0, "eager": 80.0, "commit": "abc1234"})
    return root


def commit_of(clone, name):
    return subprocess.check_output(["git", "rev-parse", "--short", name], cwd=clone, text=True).strip()


def log_of(clone):
    return [line.split() for line in (clone.parent / "log").read_text().splitlines()]


def test_a_slower_commit_is_an_error(clone, capsys):
    """Both are built and measured, by turns; nothing is left of the other."""
    one, two = commit_of(clone, "one-second"), commit_of(clone, "two-seconds")
    assert command.main(["fine", "--device", "cpu", "--against", "one-second"]) == 1
    said = capsys.readouterr()
    assert said.err == f"benchmarks: error: cpu-fine: a call: 2.00 times as bad as at {one}, expected at most 1.1\n"
    assert "| a call | 2 s | 2.00 | 0.50 |\n" in said.out and f"| × {one} |" in said.out
    order = [(two, "2"), (one, "1"), (one, "1"), (two, "2"), (two, "2"), (one, "1")]  # commits and their builds
    assert log_of(clone) == [["fine", *which] for which in order]
    result = json.loads((clone / "out" / "cpu-fine.json").read_text())
    assert result["seconds"] == 2.0 and result["commit"] == two and result["command"][:2] == ["-m", "stub"]
    assert list(result["sources"]) == ["stub.py", "seconds"]
    assert {path.name for path in (clone / "out").iterdir()} == {"cpu-fine.json", "report.md", "report.svg"}
    worktrees = subprocess.check_output(["git", "worktree", "list"], cwd=clone, text=True)
    assert len(worktrees.splitlines()) == 1 and commit_of(clone, "HEAD") == two


def test_a_faster_commit_or_a_greater_factor_is_none(clone, capsys):
    options = ["fine", "--device", "cpu", "--rounds", "1", "--against"]
    assert command.main([*options, "one-second", "--factor", "2.01"]) == 0
    subprocess.run(["git", "checkout", "-q", "one-second"], cwd=clone, check=True)
    assert command.main([*options, "two-seconds"]) == 0
    assert "| a call | 1 s | 4.00 | 2.00 |" in capsys.readouterr().out
    (clone / "stub.py").write_text(STUB + "\n")  # sources that are in no commit yet are those here
    assert command.main([*options, "HEAD", "--factor", "1"]) == 0
    assert log_of(clone)[-2][1] == commit_of(clone, "HEAD") + "+changes"


@pytest.mark.parametrize("against", ["stored", "stored/cpu-fine.json"])
def test_stored_results_are_compared_by_ratios(against, clone, capsys):
    """Eight times as fast as eager then, twice now: four times as bad, though it takes 2 seconds and not 10."""
    against = str(clone.parent / against)
    assert command.main(["fine", "--device", "cpu", "--against", against]) == 1
    said = f"cpu-fine: a call: 4.00 times as bad as at {against}, expected at most 1.1"
    assert capsys.readouterr().err == f"benchmarks: error: {said}\n"
    assert len(log_of(clone)) == 1
    assert command.main(["fine", "--device", "cpu", "--against", against, "--factor", "4"]) == 0


def test_one_that_fails_is_told_and_the_others_go_on(clone, capsys):
    """What it had started is ended; what changes under the measurement is no result."""
    assert command.main(["--device", "cpu"]) == 1
    errors = capsys.readouterr().err.splitlines()[-2:]
    assert errors == [
        f"benchmarks: error: cpu-fails failed: exit code 1 at {commit_of(clone, 'HEAD')}, see above",
        "benchmarks: error: cpu-changes failed: its sources have changed while it was measured",
    ]
    assert {path.name for path in (clone / "out").glob("*.json")} == {"cpu-fine.json"}
    child = int((clone.parent / "child").read_text())
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        pytest.fail(f"the child is still there: {state}")


def test_what_is_stale_is_measured_and_stored(clone, monkeypatch, capsys):
    results, written = clone.parent / "stored", []
    monkeypatch.setattr(registry, "BENCHMARKS", registry.BENCHMARKS[:1])
    for module, name, value in (
        (command, "RESULTS", results),
        (command, "write_pages", lambda: written.append(json.loads((results / "cpu-fine.json").read_text()))),
        (stored, "fault", lambda benchmark, fault=stored.fault: fault(benchmark, results, clone)),
    ):
        monkeypatch.setattr(module, name, value)
    assert command.main(["--stale"]) == 0
    assert len(written) == 1 and written[0]["seconds"] == 2.0 and len(log_of(clone)) == 1
    assert command.main(["--stale"]) == 0 and capsys.readouterr().out.endswith("nothing is stale\n")
    assert len(written) == 2 and len(log_of(clone)) == 1
    (clone / "seconds").write_text("5")
    assert command.main(["--stale"]) == 0 and len(log_of(clone)) == 2
    assert json.loads((results / "cpu-fine.json").read_text())["seconds"] == 5.0 and not (clone / "out").exists()


def test_results_of_a_gpu_have_the_name_of_the_card(clone, monkeypatch):
    gpu = dataclasses.replace(registry.BENCHMARKS[0], name="gpu-fine")
    monkeypatch.setattr(registry, "BENCHMARKS", (*registry.BENCHMARKS, gpu))
    monkeypatch.setattr(command, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(command, "gpu_name", lambda: "h100")
    assert command.main([]) == 0 and len(log_of(clone)) == 1
    assert json.loads((clone / "out" / "h100-fine.json").read_text())["seconds"] == 2.0
    assert "## h100-fine\n" in (clone / "out" / "report.md").read_text()
    monkeypatch.setattr(command, "gpu_name", lambda: "h200")  # another card's are no results of this one
    assert command.main(["--against", str(clone / "out")]) == 2
    assert command.main(["--against", str(clone / "out" / "h100-fine.json")]) == 0


def test_arguments_are_for_the_benchmark(clone):
    assert command.main(["fine", "--device", "cpu", "--arguments", "-k", "dm_loss"]) == 0
    assert log_of(clone)[0][3:] == ["-k", "dm_loss"]
    assert "Of fine, with -k dm_loss; " in (clone / "out" / "report.md").read_text()
    assert json.loads((clone / "out" / "cpu-fine.json").read_text())["command"][-2:] == ["-k", "dm_loss"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["fune"], "got fune: did you mean cpu-fine?"),
        (["fine", "--against", "no-such"], "expected --against to be a file, a folder or a commit, got no-such"),
        (["--against", "{stored}"], "to be a result of cpu-fails, got no such file"),
        (["--against", "{stored}/cpu-fine.json"], "expected one benchmark to compare with the file"),
        (["fine", "--against", "{clone}/stub.py"], "to be a result of cpu-fine, got other contents: JSONDecodeError"),
        (["fine", "--factor", "0.9"], "expected --factor of at least 1, got 0.9"),
        (["fine", "--factor", "nan"], "expected --factor of at least 1, got nan"),
        (["fine", "--rounds", "0"], "expected --rounds of at least 1, got 0"),
        (["fine", "--out", "{clone}/stub.py"], "expected --out to be a folder, got"),
        (["--stale", "--arguments", "-k"], "expected --store and --stale without --out and --arguments"),
        (["--store", "--out", "x"], "expected --store and --stale without --out and --arguments"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(options, told, clone, capsys):
    options = [option.format(stored=clone.parent / "stored", clone=clone) for option in options]
    assert command.main(["--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks: error: expected") and told in error and error.count("\n") == 1
    assert not (clone / "built").exists() and not (clone.parent / "log").exists()


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "FASTDMD_BACKEND"])
def test_nothing_is_stored_of_settings_of_ones_own(name, clone, monkeypatch, capsys):
    monkeypatch.setenv(name, "1")
    assert command.main(["--stale"]) == 2
    assert capsys.readouterr().err.endswith(f"in an environment of defaults, got {name}\n")


def test_a_build_that_fails_is_an_error(clone, capsys):
    (clone / "setup.py").write_text("raise SystemExit('no compiler')")
    assert command.main(["fine", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.endswith("+changes failed: no compiler\n") and not (clone.parent / "log").exists()
