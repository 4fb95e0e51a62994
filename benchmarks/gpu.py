"""What only a GPU can show, one stage of under nine minutes at a time: `make gpu STAGE=tests-ops|tests-steps|ops|...`.

    python -m benchmarks.gpu [STAGE] [--seconds 530] [--results FOLDER] [--arguments ...]

Needs Python, torch and nvcc; what else a stage needs comes from the machine or from the kit that `make gpu-kit` packs
where there is a network. Builds the native libraries in place. `<device>-<stage>.json`, in `benchmarks/results` or in
FOLDER, is there from the first second of a stage and follows it: nothing is lost when this process is killed, too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if importlib.util.find_spec("torch") is None:
    sys.exit(f"benchmarks.gpu: error: expected a Python that has torch, got {sys.executable}")
import torch

from benchmarks import kit
from benchmarks.environment import ROOT, describe, gpu_name
from fastdmd import _native
from fastdmd.files import write_atomically

PYTEST = [
    "-m",
    "pytest",
    "-m",
    "cuda",
    "-p",
    "no:cacheprovider",
    "-p",
    "benchmarks.record_tests",
    "--record",
    "{json}",
    "-rfE",
    "--tb=short",
]
OP_FILES = ("accuracy", "adamw_ema", "bias_gradient", "group_norm_silu", "memory", "random")
OP_TESTS = [f"tests/ops/test_{name}.py" for name in OP_FILES]
STEP_FILES = (
    "distill/test_turns",
    "distill/test_steps",
    "distill/test_adversarial_turns",
    "distill/test_score_identity",
    "distill/test_execution",
    "data/test_dataset",
)
STEP_TESTS = [f"tests/{name}.py" for name in STEP_FILES]
TRAINING = ("numpy", "safetensors", "PIL", "tqdm")


@dataclass(frozen=True)
class Stage:
    """Arguments of Python, with places for files, and the modules that it needs besides torch."""

    command: list[str]
    needs: tuple[str, ...]


# Tests of the ops are many and short, four hundred Triton kernels of 0.2 s to compile among them; tests of whole steps
# are few and compile networks for minutes. Each of those gets a process.
STAGES = {
    "tests-ops": Stage([*PYTEST, *OP_TESTS], ("pytest", "numpy", "triton")),
    "tests-steps": Stage([*PYTEST, *STEP_TESTS], ("pytest", *TRAINING)),
    "ops": Stage(["-m", "benchmarks.bench_kernels", "--seconds", "450", "--json", "{json}"], ("numpy", "triton")),
    "sanitize": Stage(["-m", "benchmarks.sanitize", "--json", "{json}"], ("numpy", "triton")),
    "step": Stage(["-m", "benchmarks.bench_step", "--device", "cuda", "--suite", "--json", "{json}"], TRAINING),
    "profile": Stage(["-m", "benchmarks.timeline", "--json", "{json}"], TRAINING),
    "train": Stage(["-m", "fastdmd.train", "--device", "cuda", "--out", "{folder}/run"], (*TRAINING, "tyro")),
}
SECONDS = 530  # of a stage
SNAPSHOT_SECONDS = 5


def command(stage: str, folder: Path, extra: list[str]) -> list[str]:
    parts = [part.format(folder=folder, json=folder / "measured.json") for part in STAGES[stage].command]
    if stage.startswith("tests") and importlib.util.find_spec("xdist"):
        parts += ["--numprocesses", str(num_processes()), "--dist", "worksteal"]
    return [sys.executable, *parts, *extra]


def num_processes() -> int:
    return max(1, (os.cpu_count() or 2) * 3 // 4)


def environment(stage: str) -> dict[str, str]:
    """Tests share the cores: each of them would start as many processes for its compilation as there are."""
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2"} if stage.startswith("tests") else {}
    return {**threads, **os.environ, "PYTHONUNBUFFERED": "1"}


def run_stage(stage: str, seconds: float, extra: list[str], path: Path) -> dict:
    """Runs a stage for so long at most, writes what is known of it to `path` all along, and returns it."""
    facts = {**describe("cuda"), "stage": stage}
    with tempfile.TemporaryDirectory() as temporary:
        folder, started, process = Path(temporary), time.perf_counter(), None

        def save(outcome: str) -> dict:
            files = [file for file in (folder / "measured.json", folder / "run" / "summary.json") if file.exists()]
            result = {
                **facts,
                "outcome": outcome,
                "exit_code": process and process.returncode,
                "seconds": round(time.perf_counter() - started, 1),
                "output": (folder / "output").read_text(errors="replace").splitlines()[-60:],
                "measured": read(files[0]) if files else None,
            }
            write_atomically(path, lambda file: file.write(json.dumps(result, indent=1).encode() + b"\n"))
            return result

        with (folder / "output").open("w") as output:
            missing = kit.lacks(STAGES[stage].needs)
            if missing:
                return save(f"not started: expected {', '.join(missing)} to be installed or in the kit, got neither")
            outcome = "interrupted"
            process = subprocess.Popen(
                command(stage, folder, extra),
                cwd=ROOT,
                stdout=output,
                env=environment(stage),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while (left := started + seconds - time.perf_counter()) > 0 and process.poll() is None:
                    save("running")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(left, SNAPSHOT_SECONDS))
                outcome = f"killed after {seconds:g} s" if process.poll() is None else "ended"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it started, too
                process.wait()
                result = save(outcome)
        print((folder / "output").read_text(errors="replace"), flush=True)
        return result


def read(path: Path) -> object:
    """JSON; or what there is of it, from a process that was killed while it wrote."""
    text = path.read_text(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return {"not whole": text}


def end_on_sigterm() -> None:
    """As by an error: the stage that runs is ended, and stored."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmarks.gpu: error: ended by SIGTERM"))


def build() -> None:
    """Both libraries, in place, of this GPU's architecture alone where every nvcc knows it and CUDAARCHS says nothing
    else; exits where one is missing then."""
    major, minor = torch.cuda.get_device_capability()
    own = {"CUDAARCHS": f"{major}{minor}"} if (major, minor) in ((8, 0), (8, 6), (8, 9), (9, 0)) else {}
    environment = {**own, **os.environ, "FASTDMD_NATIVE": "1"}
    built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment)
    reason = "its build failed, see above" if built.returncode else _native.load("cuda")
    if reason is not None:
        sys.exit(f"benchmarks.gpu: error: expected the native CUDA library, got none: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=list(STAGES), help="default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of a stage")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write to")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="for the stage's own command")
    options = parser.parse_args()
    if not options.seconds > 0:
        parser.error(f"expected --seconds to be greater than 0, got {options.seconds:g}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: error: expected a GPU, got a torch that finds none")
    try:
        options.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"benchmarks.gpu: error: expected --results to be a folder, got {options.results}: {error.strerror}")
    end_on_sigterm()
    build()
    device, failed = gpu_name(), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            installed = kit.install(Path(folder))
        except subprocess.CalledProcessError as error:
            sys.exit(f"benchmarks.gpu: error: expected pip to install the kit, got its exit code {error.returncode}")
        if installed:
            print(f"from the kit: {', '.join(installed)}", flush=True)
        for stage in [options.stage] if options.stage else list(STAGES):
            path = options.results / f"{device}-{stage}.json"
            result = run_stage(stage, options.seconds, options.arguments, path)
            ended = f"{result['outcome']}, exit code {result['exit_code']} after {result['seconds']} s"
            print(f"{stage}: {ended}, {path}", flush=True)
            failed += [stage] if result["exit_code"] != 0 else []
    sys.exit(f"benchmarks.gpu: error: failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
