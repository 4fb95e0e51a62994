"""The house rules that a reader relies on: which way imports point, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastdmd"

# A module may import from its own layer's predecessors, and inside a layer from names further left.
LAYERS = [
    "_native", "files", "bounds", "flags", "outputs", "terminal", "memory", "interrupts", "startup", "tally", "kernels",
    "ops", "diffusion", "sampling", "dmd2", "data", "unet_config", "unet_blocks", "unet", "imports", "weight_files",
    "inert_pickle", "pickles", "edm", "flat", "gradients", "groups", "states", "optim", "execution", "step", "budget",
    "precision", "machine", "adapters", "diffusers_unet", "checkpoint", "teachers", "frechet", "features", "metrics",
    "quality", "pictures", "run_folder", "loop", "config", "presets", "cli", "trainer", "train", "pretrain",
    "sample", "evaluate", "export",
]  # fmt: skip


def imported_modules(path: Path) -> set[str]:
    """First components of what `path` imports from inside the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fastdmd":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastdmd."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastdmd.")}
    return found - {"__version__"}


def test_every_module_has_a_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert modules - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own == "__init__":
        return  # see test_the_public_names
    wrong = {name for name in imported_modules(path) - {own} if LAYERS.index(name) >= LAYERS.index(own)}
    assert wrong == set()


def test_the_public_names():
    """All of them are there, and none is loaded before it is asked for."""
    code = """
import sys, fastdmd
assert "torch" not in sys.modules and not [name for name in sys.modules if name.startswith("fastdmd.")]
assert set(fastdmd.__all__) <= set(dir(fastdmd))
for name in fastdmd.__all__:
    assert getattr(fastdmd, name) is not None
try:
    fastdmd.nothing
except AttributeError as error:
    print(error)
from fastdmd import *
print(load_teacher("mnist").num_classes, load_teacher.__module__, Generator.__name__, ops.dm_loss.__name__)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["module 'fastdmd' has no attribute 'nothing'", "10 fastdmd.teachers Generator dm_loss"]
    assert (PACKAGE / "py.typed").exists()


def test_ops_come_alone():
    """`from fastdmd import ops` loads torch and nothing that another trainer has no use for, or not yet."""
    code = "import sys; from fastdmd import ops; print(' '.join(sorted(sys.modules)))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    mine = {name for name in modules if name.startswith("fastdmd.")}
    assert mine and all(name.startswith(("fastdmd.ops", "fastdmd._native")) for name in mine)
    assert not {"PIL", "tyro", "safetensors"} & set(modules)
    assert not {"torch._dynamo", "torch._inductor", "triton", "sympy"} & set(modules)


def test_files_stay_rooms():
    long = {str(path): n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 320}
    assert long == {}
