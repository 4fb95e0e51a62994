"""A process that reads what may be harmful: watched, bounded, and alone with it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import select
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdmd.runs import cli, interrupts

COMMAND = "fastdmd.fuzz"
OWN_CODE = "expected your code to run"
MAX_SECONDS = 20
MAX_BYTES = 1 << 30  # that reading may take in memory beyond the size of what is read
ADDRESSES = 6 << 30  # that it may ask for: beyond, the allocator refuses, before the machine runs out of memory
MAX_WRITTEN = 1 << 28  # of one file
DIGESTED = 1 << 20  # bytes of a file that are compared; of a longer one its inode, size and time

CANARY = "canary"  # a file that what is read would make if it were executed
PAYLOAD = f"open({CANARY!r}, 'w').close()"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an input: `kind` is refused, accepted or wrong; `what` the line or the fault."""

    kind: str
    what: str
    seconds: float
    num_bytes: int  # at its peak, of memory, beyond what the process had before


def attempt(
    read: Callable[[], Any],
    truth: Callable[[], Any],
    inputs: Path,
    scratch: Path,
    *,
    is_command: bool = False,
    goes_on: bool = False,
) -> Outcome:
    """Reads in a process of its own, in an empty folder `scratch`, and judges.

    Refused is one line on stderr, exit code 2, which says what was expected and what came. Accepted has the value that
    `truth`, which reads it another way, gives. All else is wrong: a traceback, another exit code, a signal, more than
    20 s or a GiB, `inputs` changed, something left in `scratch`, code executed. A command makes a line of an error by
    itself; for any other reader that is done as commands do it. What goes on with its inputs may change them where it
    accepts them.
    """
    scratch.mkdir()
    (scratch / f"{CANARY}_module.py").write_text(f"{PAYLOAD}\nimport torch\nNetwork = torch.nn.Identity\n")
    before = snapshot(inputs), snapshot(scratch)
    began = time.monotonic()
    receiver, sender = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(receiver)
        _child(read, truth, scratch, sender, is_command)
    os.close(sender)
    report, status = _wait(process, receiver)
    seconds = time.monotonic() - began
    after = snapshot(inputs), snapshot(scratch)
    found = report or {"kind": "wrong", "what": "no report", "num_bytes": 0}
    allowed = MAX_BYTES + num_bytes_of(inputs)
    faults = {
        f"more than {MAX_SECONDS} s": status is None,
        f"it ended with {status}": status not in (None, 0),
        f"{found['num_bytes'] >> 20} MiB": found["num_bytes"] > allowed,
        "code was executed": (scratch / CANARY).exists(),
        "the input is another one afterwards": before[0] != after[0] and not (goes_on and found["kind"] == "accepted"),
        "something was left in the working directory": before[1] != after[1],
    }
    if broken := [fault for fault, is_there in faults.items() if is_there]:
        return Outcome("wrong", "; ".join([*broken, found["what"]]), seconds, found["num_bytes"])
    return Outcome(found["kind"], found["what"], seconds, found["num_bytes"])


def judge_line(code: object, said: str) -> str | None:
    """What is wrong with how a command refused something, None if nothing is."""
    lines = said.splitlines()
    if code != 2:
        return f"exit code {code}: {said[-300:]}"
    errors = [line for line in lines if ": error: " in line]
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"not one line: {said[-300:]}"
    line = errors[0]
    if OWN_CODE in line:  # this file is none of the package's: what it is not prepared for, it takes for ours
        return f"not prepared for: {line}"
    if not ("expected" in line and "got" in line) or len(line) > 1500 or not line.isprintable():
        return f"a line that does not say what was expected and what came: {line[:300]}"
    return None


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything below, by name: kind, size, and content, or where it is large its inode and time of change."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        state = path.lstat()
        name, size = str(path.relative_to(folder)), state.st_size
        found[name] = [stat.S_IFMT(state.st_mode), size if not path.is_dir() else 0]
        if path.is_symlink():
            found[name].append(os.readlink(path))
        elif stat.S_ISREG(state.st_mode):
            found[name].append(_digest(path.read_bytes()) if size <= DIGESTED else (state.st_ino, state.st_mtime_ns))
    return found


def num_bytes_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def fingerprint(value: Any) -> Any:
    """What two ways to read the same have in common: arrays by dtype, shape and bytes, the rest as Python shows it."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous()
        flat = content.reshape(-1).view(torch.uint8).numpy() if content.numel() else np.zeros(0, np.uint8)
        return [str(content.dtype).removeprefix("torch."), list(content.shape), _digest(flat.tobytes())]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), _digest(np.ascontiguousarray(value).tobytes())]
    if isinstance(value, dict):
        return {str(name): fingerprint(inner) for name, inner in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, (list, tuple)):
        return [fingerprint(inner) for inner in value]
    return repr(value)


def _child(read: Callable[[], Any], truth: Callable[[], Any], scratch: Path, sender: int, is_command: bool) -> None:
    said = os.open(os.devnull, os.O_RDWR)
    errors = os.memfd_create("stderr")
    os.dup2(said, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = (open(number, "w", errors="backslashreplace", closefd=False) for number in (1, 2))
    os.chdir(scratch)
    os.environ["TMPDIR"] = str(scratch)
    interrupts.exit_on_signals(COMMAND)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_WRITTEN,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = _status("VmRSS")
    kind, what, peak = _judged(read, truth, errors, is_command)
    report = {"kind": kind, "what": what[:2000], "num_bytes": max(0, peak - before)}
    os.write(sender, json.dumps(report).encode())
    os._exit(0)


def _judged(read: Callable[[], Any], truth: Callable[[], Any], errors: int, is_command: bool) -> tuple[str, str, int]:
    """Kind, what there is to say, and the most memory that reading took."""
    try:
        with contextlib.nullcontext() if is_command else cli.user_errors(COMMAND):
            value = read()
    except SystemExit as stop:
        sys.stderr.flush()
        said = os.pread(errors, 1 << 16, 0).decode("utf-8", "backslashreplace")
        fault = judge_line(stop.code, said)
        return ("refused", said.strip(), _status("VmHWM")) if fault is None else ("wrong", fault, _status("VmHWM"))
    except BaseException:
        return "wrong", "traceback: " + traceback.format_exc()[-1500:], _status("VmHWM")
    peak = _status("VmHWM")
    try:
        right = fingerprint(truth())
    except Exception as error:
        return "wrong", f"accepted; read another way, it is broken: {type(error).__name__}: {error}", peak
    got = fingerprint(value)
    if got == right:
        return "accepted", "", peak
    return "wrong", f"accepted with other values: {_difference(got, right)}", peak


def _difference(got: Any, right: Any, place: str = "") -> str:
    if isinstance(got, dict) and isinstance(right, dict):
        for name in {**got, **right}:
            if got.get(name) != right.get(name):
                return _difference(got.get(name), right.get(name), f"{place}.{name}")
    return f"{place}: {str(got)[:300]}, not {str(right)[:300]}"


def _wait(process: int, receiver: int) -> tuple[dict[str, Any] | None, int | None]:
    """What it reported, and how it ended: 0, a negative signal, None where it did not."""
    content = b""
    with os.fdopen(receiver, "rb", buffering=0) as pipe:
        ends = time.monotonic() + MAX_SECONDS
        while select.select([pipe], [], [], max(0.0, ends - time.monotonic()))[0]:
            if not (part := pipe.read(1 << 16)):
                break
            content += part
        else:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None, None
    _, status = os.waitpid(process, 0)
    return json.loads(content) if content else None, os.waitstatus_to_exitcode(status)


def _status(name: str) -> int:
    """Bytes, of what Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
