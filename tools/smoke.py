"""Tries an installed fastdmd, in a folder that knows nothing of its sources: ops, a training, a sample, an export.

`python tools/smoke.py [--native | --no-native]`, by the Python that has it: compiled ops must be there, or must not.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1]


def try_ops() -> None:
    """Every kind of op in its active implementation, against the reference."""
    import torch

    import fastdmd
    from fastdmd import ops

    home = Path(fastdmd.__file__).resolve().parent
    assert not home.is_relative_to(SOURCES) or "site-packages" in home.parts, f"expected an installation, got {home}"
    native = "native" in ops.implementations("dm_loss", "cpu")
    print(f"fastdmd {fastdmd.__version__} in {home}, torch {torch.__version__}, native ops: {native}")
    assert ("--no-native" if native else "--native") not in sys.argv, ops.unavailable("dm_loss", "cpu")

    random = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 2, 4, 8, 8, generator=random)
    sigma, ones = torch.tensor([0.5, 20.0]), torch.ones(4)

    def update() -> torch.Tensor:
        buffers = [tensor.flatten().clone() for tensor in (x, y, z, z.square())]
        ops.adamw_ema_(*buffers, torch.zeros(1, dtype=torch.int64), torch.tensor(1e-3), max_grad_norm=1.0)
        return buffers[0]

    def drawn() -> torch.Tensor:
        return ops.add_noise(x, sigma, rng_state=ops.rng_state(seed=1))

    calls = [
        drawn,
        update,
        lambda: ops.add_noise(x, sigma, noise=y),
        lambda: ops.dm_loss(x, y, z),
        lambda: ops.dm_gradient(x, y, z),
        lambda: ops.fake_loss(x, y, sigma, sigma_data=0.5),
        lambda: ops.group_norm_silu(x, ones, 0 * ones, num_groups=2),
        lambda: ops.conv3x3(x, torch.ones(4, 4, 3, 3)),
    ]
    for call in calls:
        with ops.use_backend("reference"):
            expected = call()
        torch.testing.assert_close(call(), expected)


def run(*arguments: str) -> str:
    """What the console command prints."""
    command = shutil.which("fastdmd", path=sysconfig.get_path("scripts"))
    assert command is not None, "expected the command fastdmd beside this Python, got none"
    done = subprocess.run([command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def try_commands() -> None:
    """In the folder that this process is in."""
    assert run("--version").startswith("fastdmd ")
    run(*"train --out run --iterations 3 --batch-size 4 --warmup-iterations 0 --num-samples 0 --device cpu".split())
    generator = "run/generator.safetensors"
    assert "4 images" in run("sample", generator, "--num", "4", "--out", "samples.png")
    assert Path("samples.png").read_bytes()[1:4] == b"PNG"
    run("export", generator, "--out", "half.safetensors", "--weights-dtype", "float16")
    assert Path("half.safetensors").stat().st_size < Path(generator).stat().st_size / 1.5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try_ops()
        try_commands()
        os.chdir(SOURCES)
    print("works: ops, train, sample, export")


if __name__ == "__main__":
    main()
