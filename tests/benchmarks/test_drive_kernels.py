"""The driver of the kernels: it calls every op that a GPU computes, and sees a wrong result; what sanitizers report."""

import math
import sys

import pytest
import torch

from benchmarks import drive_kernels, sanitize
from fastdmd import ops

NATIVE = pytest.mark.skipif("native" not in ops.implementations("philox"), reason="the native library is not built")


def lines(capsys):
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}


def test_every_op_with_kernels_for_a_gpu_has_a_case():
    left_to_torch = {name for name in ops.names() if "CPUs alone" in ops.unavailable(name, "cuda").get("native", "")}
    assert left_to_torch == {"conv1x1", "conv1x1_backward", "conv3x3", "conv3x3_backward"}
    assert set(drive_kernels.CASES) == set(ops.names()) - left_to_torch


def in_triton_alone(op):
    return "a Triton kernel alone" in ops.unavailable(op).get("native", "")


@NATIVE
def test_the_native_kernels_pass(capsys):
    assert drive_kernels.main(["--device", "cpu", "--small"]) == 0
    printed = lines(capsys)
    assert set(printed) == set(ops.names())
    num_forms = len(drive_kernels.SMALL)
    for op, cases in drive_kernels.CASES.items():
        if in_triton_alone(op):
            assert printed[op].endswith("not called: bias_gradient has a Triton kernel alone")
            continue
        assert f" {len(cases) * num_forms * 2} calls" in printed[op] and printed[op].endswith("ok")


@pytest.mark.parametrize("dtype", drive_kernels.TOLERANCES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("form", drive_kernels.FORMS[:7], ids=str)
def test_the_reference_is_within_its_own_budget(form, dtype):
    for op in drive_kernels.CASES:
        reference = ops.implementations(op)["reference"]
        outcome = drive_kernels.drive(op, reference, [form], [dtype], torch.device("cpu"))
        assert outcome.num_calls == len(drive_kernels.CASES[op]) and outcome.faults == []
        assert outcome.worst <= 1


def spoiled(op, output, spoil):
    """The reference, with one element of one output changed."""

    def implementation(*arguments):
        result = ops.implementations(op)["reference"](*arguments)
        outputs = result if isinstance(result, tuple) else (result,)
        tensor = arguments[0] if output is None else outputs[output]
        if tensor.numel():
            tensor.view(-1)[-1] = spoil(tensor.view(-1)[-1])
        return result

    return implementation


@pytest.mark.parametrize(
    "spoil", [lambda x: x.nan_to_num(posinf=0) + 1, lambda x: x * math.nan], ids=["off by one", "NaN"]
)
@pytest.mark.parametrize(
    ("op", "output"),
    [(op, 0) for op in drive_kernels.CASES] + [("adamw_ema_", None), ("dm_loss", 1), ("group_norm_silu_backward", 3)],
)
def test_one_wrong_element_is_seen(op, output, spoil):
    if op == "philox":
        spoil = lambda x: x ^ 1  # noqa: E731 words, all of them right or not
    form = drive_kernels.Form((3, 12, 7, 5))
    outcome = drive_kernels.drive(op, spoiled(op, output, spoil), [form], [torch.float32], torch.device("cpu"))
    expected = list(range(len(drive_kernels.CASES[op])))
    if op == "group_norm_silu_backward" and output == 3:
        expected = expected[1:]  # the first has no scale to differentiate
    assert [fault.split(", ")[1] for fault in outcome.faults] == [f"case {number}" for number in expected]
    assert outcome.worst > 1


def test_a_form_is_what_it_says():
    shifted = drive_kernels.Inputs(drive_kernels.Form((2, 16, 8, 8), shifted=True), torch.float32, "cpu").image()
    assert shifted.is_contiguous() and shifted.storage_offset() == 1
    assert shifted.untyped_storage().nbytes() == 4 * (shifted.numel() + 1)  # nothing behind its end
    form = drive_kernels.Form((3, 12, 7, 5), torch.channels_last)
    plain, other = (
        drive_kernels.Inputs(f, torch.float32, "cpu").image() for f in (form, drive_kernels.Form(form.shape))
    )
    assert plain.is_contiguous(memory_format=torch.channels_last) and torch.equal(plain, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch finds a GPU")
@pytest.mark.parametrize("command", [drive_kernels, sanitize], ids=lambda module: module.__name__)
def test_without_a_gpu_they_say_so(command, capsys):
    assert command.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


SUMMARIES = [
    ("========= ERROR SUMMARY: 0 errors\n", 0),
    ("========= ERROR SUMMARY: 1 error\n", 1),
    ("========= ERROR SUMMARY: 34 errors\n========= ERROR SUMMARY: 14 errors were not printed.\n", 34),
    ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
    ("ok\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n", 2),
    ("========= Error: No attachable process found. compute-sanitizer timed-out.\n", None),
    ("", None),
]


@pytest.mark.parametrize(("output", "errors"), SUMMARIES)
def test_errors_are_those_of_the_summary(output, errors):
    assert sanitize.num_errors(output) == errors
    result = {"exit_code": 0, "errors": sanitize.num_errors(output)}
    assert sanitize.passed("memcheck", result) == (errors == 0)
    assert not sanitize.passed("memcheck", {**result, "exit_code": 1})


@pytest.fixture
def fake_sanitizer(tmp_path):
    """A script that says what it was called with, runs the command, and reports one error."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(
        f"#!{sys.executable}\nimport os, subprocess, sys\n"
        "print(*sys.argv[1:], os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'])\n"
        "at = sys.argv.index(sys.executable)\nsubprocess.run(sys.argv[at:])\n"
        "print('========= Invalid __global__ read of size 4 bytes')\nprint('========= ERROR SUMMARY: 1 error')\n"
        "sys.exit(99)\n"
    )
    path.chmod(0o755)
    return str(path)


def test_a_tool_runs_around_the_driver(fake_sanitizer):
    result = sanitize.run("memcheck", fake_sanitizer, ["-c", "print('driven')"], 60)
    assert (result["errors"], result["exit_code"]) == (1, 99)
    assert result["findings"][0] == "========= Invalid __global__ read of size 4 bytes"
    assert result["output"][0].startswith("--tool memcheck") and result["output"][0].endswith("print('driven') 1")
    assert "driven" in result["output"] and not sanitize.passed("memcheck", result)
    plain = sanitize.run(sanitize.PLAIN, fake_sanitizer, ["-c", "print('driven')"], 60)
    assert (plain["errors"], plain["exit_code"], plain["output"]) == (None, 0, ["driven"])
    assert sanitize.passed(sanitize.PLAIN, plain)


def test_a_run_that_takes_too_long_is_ended_with_its_children(fake_sanitizer):
    code = "import time; print('driven', flush=True); time.sleep(600)"
    result = sanitize.run("racecheck", fake_sanitizer, ["-c", code], 1.5)
    assert result["exit_code"] is None and result["errors"] is None and result["seconds"] < 30
    assert not sanitize.passed("racecheck", result)


def test_the_cache_is_filled_by_a_process_per_op(tmp_path):
    code = f"import pathlib, sys, time; (pathlib.Path({str(tmp_path)!r}) / sys.argv[2]).touch(); time.sleep(600)"
    sanitize.fill_cache(["-c", code], ["philox", "dm_loss"], 1.0)  # and ended
    assert {path.name for path in tmp_path.iterdir()} == {"philox", "dm_loss"}
