"""The stages of `benchmarks.gpu`: what they need, which tests they hold, and what is left of one that is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, kit

ROOT = Path(__file__).parents[2]
TESTS = {"tests-ops": gpu.OP_TESTS, "tests-steps": gpu.STEP_TESTS}
# The last waits for what the others came to, and kills the whole stage as a time limit would.
FAILING = """
import json, os, signal, time
from pathlib import Path
import pytest

def test_right(): pass
def test_wrong(): assert 6 * 9 == 42, "the answer"
@pytest.mark.skip(reason="not today")
def test_left_out(): pass
def test_endless(request):
    while True:
        record = json.loads(Path(request.config.option.record).read_text())
        if sum(record["counts"].values()) == 3 and len(record["running"]) == 1:
            os.killpg(0, signal.SIGKILL)
        time.sleep(0.05)
"""


def test_every_cuda_test_is_in_one_stage():
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^@pytest\.mark\.cuda|, DEVICES\)$", path.read_text(), re.MULTILINE)
    }
    assert len(marked) > 4 and sorted(marked) == sorted(gpu.OP_TESTS + gpu.STEP_TESTS)


def test_a_stage_says_what_became_of_it(stage, capsys):
    write = "import pathlib, sys; print('so far'); pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    result = stage("-c", write, "{json}", '{{"ms": 3}}')
    assert (result["outcome"], result["exit_code"], result["measured"]) == ("ended", 0, {"ms": 3})
    assert result["output"] == ["so far"] and "so far" in capsys.readouterr().out
    result = stage("-c", write + "; sys.exit(7)", "{json}", '{{"ms": ')
    assert (result["exit_code"], result["measured"]) == (7, {"not whole": '{"ms": '})
    result = stage("-c", "pass", needs=("torch", "no_such_module"))
    assert result["exit_code"] is None and result["measured"] is None
    assert result["outcome"] == "not started: expected no_such_module to be installed or in the kit, got neither"


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_runs_too_long_is_killed_with_all_that_it_started(stage, tmp_path):
    pid = tmp_path / "pid"
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '1000']); open(sys.argv[1], 'w').write(str(p.pid))"
    for wait, outcome, exit_code in ((True, "killed after 2 s", -signal.SIGKILL), (False, "ended", 0)):
        result = stage("-c", f"{child}; p.wait()" if wait else child, str(pid), seconds=2 if wait else 30)
        assert (result["outcome"], result["exit_code"]) == (outcome, exit_code)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and runs(pid.read_text()):
            time.sleep(0.05)
        assert not runs(pid.read_text())


def test_a_failure_is_stored_whatever_comes_after(stage, tmp_path):
    (tmp_path / "test_failing.py").write_text(FAILING)
    recorded = ["-p", "benchmarks.record_tests", "--record", "{json}", "--tb=short", "-n", "2"]
    result = stage("-m", "pytest", "-q", "-p", "no:cacheprovider", *recorded, str(tmp_path))
    measured = result["measured"]
    assert result["exit_code"] == -signal.SIGKILL
    assert measured["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    ((name, message),) = measured["failures"].items()
    assert name.endswith("test_failing.py::test_wrong") and "AssertionError: the answer" in message
    assert [name.split("::")[1] for name in measured["running"]] == ["test_endless"]


def test_tests_that_cannot_be_collected_are_failures(stage, tmp_path):
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    recorded = ["-p", "benchmarks.record_tests", "--record", "{json}"]
    result = stage("-m", "pytest", "-q", "-p", "no:cacheprovider", *recorded, str(tmp_path))
    assert result["exit_code"] == 2 and result["measured"]["counts"] == {"not collected": 1}
    assert "No module named 'no_such_module'" in str(result["measured"]["failures"])


def test_results_lie_where_they_are_asked_for(stage, tmp_path, monkeypatch, capsys):
    for name, value in (("is_available", True), ("get_device_name", "NVIDIA H200 NVL")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(gpu, "build", lambda: None)
    monkeypatch.setattr(gpu, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(kit, "FOLDER", tmp_path / "none")
    stages = {"good": gpu.Stage(["-c", "print(1)"], ()), "bad": gpu.Stage(["-c", "raise SystemExit(3)"], ())}
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["gpu", "--results", str(tmp_path / "out" / "here")])
    with pytest.raises(SystemExit, match="^benchmarks.gpu: error: failed: bad$"):
        gpu.main()
    stored = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out" / "here").iterdir()}
    assert {name: result["exit_code"] for name, result in stored.items()} == {"h200-good.json": 0, "h200-bad.json": 3}
    output = capsys.readouterr().out
    assert re.search(r"^bad: ended, exit code 3 after [\d.]+ s, .*/out/here/h200-bad.json$", output, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--seconds", "-5"], 2, "error: expected --seconds to be greater than 0, got -5"),
        (["--seconds", "nan"], 2, "error: expected --seconds to be greater than 0, got nan"),
        (
            ["--results", "{file}"],
            1,
            "benchmarks.gpu: error: expected --results to be a folder, got {file}: File exists",
        ),
        (["--results", "{file}/in"], 1, "expected --results to be a folder, got {file}/in: Not a directory"),
    ],
)
def test_arguments_are_checked_before_a_build(arguments, code, said, tmp_path):
    """A stage of no time would have replaced its earlier results."""
    (tmp_path / "file").touch()
    alone = "import torch; torch.cuda.is_available = lambda: True; from benchmarks import gpu; "
    alone += "gpu.build = lambda: print('built'); gpu.STAGES = {}; gpu.main()"
    arguments = [argument.format(file=tmp_path / "file") for argument in arguments]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", alone, *arguments], cwd=ROOT, text=True, capture_output=True
    )
    assert run.returncode == code and "built" not in run.stdout, run.stderr
    assert run.stderr.splitlines()[-1].endswith(said.format(file=tmp_path / "file"))


# The stage ends with its runner, so that none outlives the tests.
KILLED = """
import os, sys
from pathlib import Path
from benchmarks import environment, gpu
gpu.describe, gpu.SNAPSHOT_SECONDS = lambda device: environment.describe("cpu"), 0.1
code = '''
import os, time
print("begun", flush=True)
while os.getppid() == int(os.environ["RUNNER"]):
    time.sleep(0.05)
'''
os.environ["RUNNER"] = str(os.getpid())
gpu.STAGES["ours"] = gpu.Stage(["-c", code], ())
gpu.end_on_sigterm()
gpu.run_stage("ours", 600, [], Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_the_file_survives_whoever_kills_the_runner(tmp_path, number):
    """SIGKILL ends the runner at once; SIGTERM, which `timeout` sends first, lets it end its stage."""
    path = tmp_path / "stored.json"
    own = {**os.environ, "TMPDIR": str(tmp_path)}  # what is killed cleans up nothing
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, env=own)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (path.exists() and "begun" in path.read_text()):
            time.sleep(0.1)
        process.send_signal(number)
        process.wait(30)
    finally:
        process.kill()
    result = json.loads(path.read_text())
    assert result["output"] == ["begun"]
    assert result["outcome"] == ("running" if number == signal.SIGKILL else "interrupted")


# The stages as on a machine that has what they say they need, and nothing else of all this. Those that need least come
# first, because what one has imported is there for the next.
ALONE = """
import runpy, sys
LACKED = {"tyro", "tqdm", "safetensors", "PIL", "scipy", "hypothesis", "diffusers", "onnx", "onnxscript", "xdist"}
record, needs = sys.argv[1], set()

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in LACKED - needs:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from benchmarks import gpu
for stage in sorted(gpu.STAGES, key=lambda stage: len(gpu.STAGES[stage].needs)):
    needs |= set(gpu.STAGES[stage].needs)
    _, *sys.argv = (part.format(folder="/nowhere", json=record) for part in gpu.STAGES[stage].command)
    if sys.argv[0] == "pytest":
        sys.argv += ["--collect-only", "-q"]
    print("stage", stage, flush=True)
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(end if isinstance(end.code, str) else f"exit code {end.code}", flush=True)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the stages would run")
def test_stages_need_what_they_say_and_then_a_gpu(tmp_path):
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path / "json")],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    outputs = {part.split("\n")[0]: part for part in run.stdout.split("stage ")[1:]}
    assert run.returncode == 0 and outputs.keys() == gpu.STAGES.keys(), run.stdout
    for stage, output in outputs.items():
        assert "Traceback" not in output and "ModuleNotFoundError" not in output, output
        if stage.startswith("tests"):
            assert re.search(r"^exit code 0$", output, re.MULTILINE), output
            for name in TESTS[stage]:
                assert re.search(f"^{name}: [1-9]", output, re.MULTILINE), output
        else:
            assert re.search(r"error: .*(expected a GPU|CUDA device that is there|compute-sanitizer)", output), output
