"""What a user of the ops sees: errors that say what was expected, the choice of a backend, the overview."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from fastdmd import _native, ops
from fastdmd.ops import _registry
from fastdmd.ops.__main__ import main as ops_main

X, SIGMA = torch.zeros(4, 3, 32, 32), torch.ones(4)
W, KERNEL = torch.ones(3), torch.ones(16, 3, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.dm_gradient(X, X[:, :, :16, :16], X), ValueError,
         "fastdmd.dm_gradient: expected D_real of shape (4, 3, 32, 32), got (4, 3, 16, 16)"),
        (lambda: ops.dm_loss(X, X, X.half()), TypeError,
         "fastdmd.dm_loss: expected D_fake of dtype torch.float32, got torch.float16"),
        (lambda: ops.dm_loss(X, X, X, eps=0), ValueError, "fastdmd.dm_loss: expected eps > 0, got 0"),
        (lambda: ops.dm_loss_raw(X, X, SIGMA[:3], X, X), ValueError,
         "fastdmd.dm_loss_raw: expected sigma of shape (4,), got (3,)"),
        (lambda: ops.denoising_loss(X, X[:3], SIGMA), ValueError,
         "fastdmd.denoising_loss: expected images of shape (4, 3, 32, 32), got (3, 3, 32, 32)"),
        (lambda: ops.denoising_loss(X, X, SIGMA[:3]), ValueError,
         "fastdmd.denoising_loss: expected weight of shape (4,), got (3,)"),
        (lambda: ops.denoising_loss(X, X, SIGMA.clone().requires_grad_()), ValueError,
         "fastdmd.denoising_loss: expected weight to be a constant, got one that requires a gradient: detach it"),
        (lambda: ops.denoising_loss(X, X, SIGMA.long()), TypeError,
         "fastdmd.denoising_loss: expected weight to be a floating point tensor, got torch.int64"),
        (lambda: ops.fake_loss(X, X, 1.0), TypeError,
         "fastdmd.fake_loss: expected sigma to be a floating point tensor, got float"),
        (lambda: ops.fake_loss_raw(X, X, X, SIGMA, sigma_data=-1), ValueError,
         "fastdmd.fake_loss_raw: expected sigma_data > 0, got -1"),
        (lambda: ops.add_noise(X, SIGMA), ValueError,
         "fastdmd.add_noise: expected one of noise, rng_key and rng_state, got none"),
        (lambda: ops.add_noise(X, SIGMA, noise=X, rng_state=ops.rng_state(0)), ValueError,
         "fastdmd.add_noise: expected one of noise, rng_key and rng_state, got noise and rng_state"),
        (lambda: ops.add_noise(X, SIGMA, rng_state=torch.zeros(2)), ValueError,
         "fastdmd.add_noise: expected rng_state of ops.rng_state, int64 (4,), got torch.float32 (2,)"),
        (lambda: ops.add_noise(X, SIGMA, rng_key=torch.zeros(2, 4).long()), ValueError,
         "fastdmd.add_noise: expected rng_key of ops.rng_key, int64 (4,), got torch.int64 (2, 4)"),
        (lambda: ops.add_noise(X, SIGMA, rng_key=ops.rng_key(0, device="meta")), ValueError,
         "fastdmd.add_noise: expected rng_key on cpu, got it on meta"),
        (lambda: ops.rng_key(-1), ValueError, "fastdmd.rng_key: expected seed in [0, 2^63), got -1"),
        (lambda: ops.rng_key(0, iteration=-1), ValueError,
         "fastdmd.rng_key: expected iteration in [0, 2^32), got -1"),
        (lambda: ops.rng_key(0, first_sample=2**32), ValueError,
         "fastdmd.rng_key: expected first_sample in [0, 2^32), got 4294967296"),
        (lambda: ops.rng_key(0, stream="a"), TypeError,
         "fastdmd.rng_key: expected stream to be an int, got str a"),
        (lambda: ops.add_noise(X, SIGMA, noise=X, dtype=torch.int8), TypeError,
         "fastdmd.add_noise: expected a floating point dtype, got torch.int8"),
        (lambda: ops.add_noise(X.int(), SIGMA, noise=X), TypeError,
         "fastdmd.add_noise: expected x to be floating point, got torch.int32"),
        (lambda: ops.add_noise(X[0], SIGMA, noise=X), ValueError,
         "fastdmd.add_noise: expected x of shape [B, C, H, W], got (3, 32, 32)"),
        (lambda: ops.group_norm_silu(X, W, W), ValueError,
         "fastdmd.group_norm_silu: expected num_groups that divides C = 3, got 32"),
        (lambda: ops.group_norm(X, W, W[:2], num_groups=1), ValueError,
         "fastdmd.group_norm: expected bias of shape (3,), got (2,)"),
        (lambda: ops.group_norm_silu(X, W[:2], W, num_groups=1), ValueError,
         "fastdmd.group_norm_silu: expected weight of shape (3,), got (2,)"),
        (lambda: ops.group_norm_silu(X, W, W, num_groups=1, scale=torch.ones(4, 3)), ValueError,
         "fastdmd.group_norm_silu: expected scale and shift together, got scale alone"),
        (lambda: ops.adamw_ema_(W, W, W, W, torch.zeros(1), torch.tensor(1e-3)), TypeError,
         "fastdmd.adamw_ema_: expected step of dtype torch.int64, got torch.float32"),
        (lambda: ops.adamw_ema_(W, W[:2], W, W, torch.zeros(1).long(), torch.tensor(1e-3)), ValueError,
         "fastdmd.adamw_ema_: expected grad of shape (3,), got (2,)"),
        (lambda: ops.philox(torch.zeros(3), torch.zeros(2).long()), TypeError,
         "fastdmd.philox: expected counter of dtype int64, got torch.float32"),
        (lambda: ops.rng_state(-1), ValueError, "fastdmd.rng_state: expected seed in [0, 2^63), got -1"),
        (lambda: ops.rng_state(1.5), TypeError, "fastdmd.rng_state: expected seed to be an int, got float 1.5"),
        (lambda: ops.philox([[0] * 4], [0, 0]), TypeError,
         "fastdmd.philox: expected counter to be a tensor, got list"),
        (lambda: ops.philox(torch.zeros(1, 4).long(), None), TypeError,
         "fastdmd.philox: expected key to be a tensor, got NoneType"),
        (lambda: ops.add_noise(X.to_sparse(), SIGMA, noise=X), TypeError,
         "fastdmd.add_noise: expected x to be a dense tensor, got a torch.sparse_coo one"),
        (lambda: ops.add_noise(X, SIGMA, noise=[0.0]), TypeError,
         "fastdmd.add_noise: expected noise to be a tensor, got list"),
        (lambda: ops.add_noise(X, SIGMA, rng_state=0), TypeError,
         "fastdmd.add_noise: expected rng_state to be a tensor, got int"),
        (lambda: ops.add_noise(X, SIGMA, noise=X, dtype="float32"), TypeError,
         "fastdmd.add_noise: expected a floating point dtype, got float32"),
        (lambda: ops.add_noise(X, SIGMA.clone().requires_grad_(), noise=X), ValueError,
         "fastdmd.add_noise: expected sigma to be a constant, got one that requires a gradient: detach it"),
        (lambda: ops.add_noise(X, SIGMA, noise=X, scale=SIGMA.to("meta")), ValueError,
         "fastdmd.add_noise: expected scale on cpu, got meta"),
        (lambda: ops.dm_loss(X, X, X, eps="1"), TypeError, "fastdmd.dm_loss: expected eps to be a number, got str"),
        (lambda: ops.fake_loss(X, X, SIGMA, sigma_data=float("nan")), ValueError,
         "fastdmd.fake_loss: expected sigma_data > 0, got nan"),
        (lambda: ops.fake_loss(X, X, SIGMA.to_sparse()), TypeError,
         "fastdmd.fake_loss: expected sigma to be a dense tensor, got a torch.sparse_coo one"),
        (lambda: ops.group_norm(X, W, W, num_groups=1.0), TypeError,
         "fastdmd.group_norm: expected num_groups to be an int, got float"),
        (lambda: ops.group_norm_silu(X, [1.0], W, num_groups=1), TypeError,
         "fastdmd.group_norm_silu: expected weight to be a floating point tensor, got list"),
        (lambda: ops.conv3x3(X, None), TypeError, "fastdmd.conv3x3: expected weight to be a tensor, got NoneType"),
        (lambda: ops.conv3x3(X, KERNEL, [0.0]), TypeError,
         "fastdmd.conv3x3: expected bias to be a floating point tensor, got list"),
        (lambda: ops.conv3x3(X, KERNEL.half()), TypeError,
         "fastdmd.conv3x3: expected weight of dtype torch.float32, got torch.float16"),
        (lambda: ops.conv3x3(X, KERNEL, torch.ones(16).double()), TypeError,
         "fastdmd.conv3x3: expected bias of dtype torch.float32, got torch.float64"),
        (lambda: ops.conv3x3(X, KERNEL.to("meta")), ValueError, "fastdmd.conv3x3: expected weight on cpu, got meta"),
        (lambda: ops.implementations("dm_los"), ValueError, "expected an op out of"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


USE = "import torch; from fastdmd import ops; x = torch.ones(1, 1, 2, 2); print(ops.dm_gradient(x, 0 * x, x / 2)[0, 0])"


def test_a_forced_backend_is_used_or_refused():
    assert run_python(USE, FASTDMD_BACKEND="reference").returncode == 0
    absent = run_python(USE, FASTDMD_BACKEND="triton", TRITON_INTERPRET="0")
    assert absent.returncode != 0 and "Triton has no cpu backend" in absent.stderr
    off = run_python(USE, FASTDMD_BACKEND="native", FASTDMD_NATIVE="0")
    assert off.returncode != 0 and "switched off by FASTDMD_NATIVE=0" in off.stderr
    wrong = run_python(USE, FASTDMD_BACKEND="fast")
    assert "expected a backend out of reference, triton, native, emulated, got fast" in wrong.stderr
    with pytest.raises(RuntimeError, match="Triton has no cpu backend"), ops.use_backend("triton", "cpu"):
        pass


def active():
    """What computes dm_loss here: its reference answers to every shape."""
    try:
        torch.ops.fastdmd.dm_loss(torch.ones(3, 3), torch.ones(3, 3), torch.ones(3, 3), 1e-6)
    except IndexError:
        return "reference"
    return "other"


@pytest.mark.skipif(len(ops.implementations("dm_loss")) == 1, reason="there is no choice")
def test_backends_are_chosen_by_block_and_by_thread():
    default = next(iter(ops.implementations("dm_loss")))
    first, second, third = (ops.use_backend(name) for name in ("reference", default, "reference"))
    assert active() != "reference"
    with first, second, third:
        assert active() == "reference"
    assert active() != "reference"
    with contextlib.ExitStack() as stack, ops.use_backend("reference"):
        stack.enter_context(ops.use_backend(default))
        assert active() != "reference"
        stack.close()
        assert active() == "reference"
    # Blocks that overlap: the one that is left last holds until its end.
    first, second = ops.use_backend("reference"), ops.use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert active() == "reference"
    second.__exit__(None, None, None)
    assert active() != "reference"

    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(active()))
        thread.start()
        thread.join()
        assert active() == "reference"
        compiled = torch.compile(lambda x: ops.dm_loss(x, 2 * x, 3 * x), backend="aot_eager", fullgraph=True)
        inside = compiled(X + 1)
    assert seen == ["other"]
    assert torch.equal(inside, ops.implementations("dm_loss")["reference"](X + 1, 2 * X + 2, 3 * X + 3, 1e-6)[0])


def test_a_block_holds_on_each_kind_of_device_that_has_the_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    chosen, reference = _registry.chosen, _registry._OPS["dm_loss"][1]
    before = chosen("dm_loss", "cpu")
    with ops.use_backend("reference"):
        assert chosen("dm_loss", "cpu") is chosen("dm_loss", "cuda") is reference
    with ops.use_backend("reference", "cuda:0"):
        assert chosen("dm_loss", "cuda") is reference and chosen("dm_loss", "cpu") is before
    monkeypatch.setattr(_registry, "_implementation", only_on_gpus(_registry._implementation))
    with ops.use_backend("triton"):
        assert chosen("dm_loss", "cuda") == "triton" and chosen("dm_loss", "cpu") is before


def only_on_gpus(implementation):
    """As where Triton is installed, which it need not be here."""
    return lambda name, backend, kind: (
        "triton" if (backend, kind) == ("triton", "cuda") else implementation(name, backend, kind)
    )


def test_the_environment_is_checked_at_once(monkeypatch, capsys):
    monkeypatch.setenv("FASTDMD_BACKEND", "")  # as if it were not set
    ops.require_environment()
    for backend, message in (
        ("fast", "expected a backend out of .*, got fast"),
        ("triton", "expected FASTDMD_BACKEND=triton to be there, got none: Triton has no cpu"),
    ):
        monkeypatch.setenv("FASTDMD_BACKEND", backend)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match=message):
            ops.require_environment()
        with pytest.raises(SystemExit) as stop:
            ops_main([])
        assert stop.value.code == 2 and re.fullmatch(f"fastdmd.ops: error: .*{message}.*\n", capsys.readouterr().err)
    load = _native.load.__wrapped__  # without its memory
    for mode, expected in (("", None), ("auto", None), ("1", None), ("0", "switched off by FASTDMD_NATIVE=0")):
        monkeypatch.setenv("FASTDMD_NATIVE", mode)
        assert load("cpu") == (expected or _native.load("cpu"))
    for mode in ("maybe", "2", "false"):
        monkeypatch.setenv("FASTDMD_NATIVE", mode)
        with pytest.raises(ValueError, match=f"expected FASTDMD_NATIVE out of auto, 0, 1, got '{mode}'"):
            load("cpu")


def test_a_broken_library_warns_with_its_cause_and_the_reference_works(tmp_path, monkeypatch):
    broken = tmp_path / "libfastdmd_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setitem(_native.LIBRARIES, "cpu", str(broken))
    _native.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="is there but does not load: .*(invalid ELF header|file too short)"):
            assert next(iter(ops.implementations("dm_loss"))) == "reference"
        assert "does not load" in ops.unavailable("dm_loss")["native"]
    finally:
        _native.load.cache_clear()


def test_the_overview_names_every_op_and_says_why():
    run = run_python("import runpy; runpy.run_module('fastdmd.ops', run_name='__main__')", FASTDMD_NATIVE="0")
    assert run.returncode == 0, run.stderr
    for name in ops.names():
        assert f"{name} " in run.stdout
    assert "no native: switched off by FASTDMD_NATIVE=0" in run.stdout and "emulated" not in run.stdout
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        active = next(iter(ops.implementations("dm_loss")))
    assert f"{active}" in run_python("import runpy; runpy.run_module('fastdmd.ops', run_name='__main__')").stdout


def test_the_whole_overview_has_every_backend_of_every_op(capsys, monkeypatch):
    monkeypatch.setenv("FASTDMD_EMULATED", "")
    _native.load_emulated.cache_clear()
    ops_main(["--all"])
    _native.load_emulated.cache_clear()
    overview = capsys.readouterr().out
    for name in ops.names():
        (present, absent) = re.search(rf"^  {name} +(.*)\n((?:    .*\n)*)", overview, re.MULTILINE).groups()
        backends = [*present.replace("also ", "").split(", "), *re.findall(r"^    no (\w+): \w", absent, re.MULTILINE)]
        assert sorted(backends) == ["emulated", "native", "reference", "triton"]
