"""A few hundred bad inputs, each refused in a line or read right; and that the fuzzer would see what is wrong."""

import collections
import os
import signal
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz import fields, flags, sandbox
from benchmarks.fuzz.sandbox import attempt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox asks Linux how much memory a process took")
COUNT = 200


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    torch.set_num_threads(1)
    quick = [kind for kind in fuzz.KINDS if not kind.goes_on and kind.name not in ("stage", "diffusers")]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(fuzz, "KINDS", quick)
        patch.setattr(fuzz, "WEIGHTS", np.full(len(quick), 1 / len(quick)))
        patch.setattr(fuzz, "COMMAND_SHARE", 0.0)
        yield fuzz.Inputs(tmp_path_factory.mktemp("fuzz"), seed=0)


def test_bad_inputs(inputs):
    found = [inputs.run(index) for index in range(COUNT)]
    assert [row for row in found if row[2].kind == "wrong"] == []
    counts = collections.Counter(outcome.kind for _, _, outcome in found)
    assert counts["refused"] > COUNT // 2 and counts["accepted"] > COUNT // 50
    assert {kind for kind, _, _ in found} >= {kind.name for kind in fuzz.KINDS}
    assert {how.partition(":")[0] for _, how, _ in found} == {"bytes", "structure", "fields", "flags"}
    again = inputs.run(COUNT - 1)
    assert again[:2] == found[-1][:2] and again[2].kind == found[-1][2].kind


def refuse(text):
    def read():
        raise ValueError(text)

    return read


def leave(*, code, said=""):
    def read():
        print(said, file=sys.stderr, flush=True)
        raise SystemExit(code)

    return read


def stop():
    raise KeyboardInterrupt  # which no command makes a line of


def fill():
    torch.ones(sandbox.MAX_BYTES // 4 + (1 << 24))


FAULTS = {
    "not prepared for: fastdmd.fuzz: error: expected your code to run, got KeyError": lambda: {}["missing"],
    "traceback: Traceback": stop,
    "a line that does not say what": refuse("no"),
    "exit code 1": leave(code=1, said="x: error: expected a, got b"),
    "not one line": leave(code=2, said="x: error: expected a, got b\nand more"),
    "more than 1 s": lambda: time.sleep(30),
    "it ended with -11": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "MiB": fill,
    "code was executed": lambda: exec(sandbox.PAYLOAD),
    "something was left in the working directory": lambda: open("left", "w").close(),
    "accepted with other values: .a": lambda: {"a": 2, "b": torch.zeros(3)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_seen(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1 if "1 s" in fault else 20)
    is_command = fault.startswith(("exit", "not one"))
    (tmp_path / "input").mkdir()
    outcome = attempt(
        FAULTS[fault],
        lambda: {"a": 1, "b": np.zeros(3, np.float32)},
        tmp_path / "input",
        tmp_path / "s",
        is_command=is_command,
    )
    assert outcome.kind == "wrong" and fault in outcome.what, outcome


def test_inputs_that_change_are_seen(tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a").write_text("1")
    outcome = attempt(lambda: (tmp_path / "input" / "a").write_text("2"), lambda: 1, tmp_path / "input", tmp_path / "s")
    assert outcome.kind == "wrong" and "the input is another one afterwards" in outcome.what


def test_what_is_right_is_seen(tmp_path):
    (tmp_path / "input").mkdir()
    value = {"a": [1, float("nan"), None], "b": torch.arange(3)}
    accepted = attempt(lambda: value, lambda: value | {"b": np.arange(3)}, tmp_path / "input", tmp_path / "s")
    assert (accepted.kind, accepted.what) == ("accepted", "")
    refused = attempt(refuse("fastdmd.x: expected a, got b"), lambda: 1, tmp_path / "input", tmp_path / "t")
    assert (refused.kind, refused.what) == ("refused", "fastdmd.fuzz: error: fastdmd.x: expected a, got b")


def test_words_and_what_they_mean():
    config = flags.COMMANDS["fastdmd.train"][0]
    hints = flags.hints_of(config)
    assert {"--seed", "--teacher-weights", "--generator-sigmas", "--data", "--checkpoint-every"} <= hints.keys()
    assert flags.meaning(hints["--seed"], ("1_0",)) == 10
    assert flags.meaning(hints["--generator-sigmas"], ("80,2",)) == [80.0, 2.0]
    assert flags.meaning(hints["--crop"], ("None",)) is None


def test_edits_of_a_format_leave_its_kind():
    """A changed shape has still the header, the length and the name of its format."""
    rng = np.random.default_rng(0)
    data = b"\x93NUMPY\1\0" + (64).to_bytes(2, "little")
    header = repr({"descr": "|u1", "fortran_order": False, "shape": (3,)}).encode().ljust(64)
    names = {fields.edited(rng, data + header + b"abc")[0] for _ in range(60)}
    assert names == {"npy header", "npy length", "npy version"}
