"""Packages that a GPU machine without a network may lack, in one folder: `make gpu-kit` fills it where there is one.

    python -m benchmarks.kit

The folder, `.gpu-kit`, holds wheels of the versions in constraints.txt for Python 3.10 to 3.12 on Linux, 24 MB.
`benchmarks.gpu` installs from it what is not there, into a folder of its own for as long as it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".gpu-kit"
PACKAGES = {  # by the name that is imported; torch brings numpy and Triton, or a machine has no use
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "tqdm": "tqdm",
    "tyro": "tyro",
    "safetensors": "safetensors",
    "PIL": "pillow",
}
PYTHONS = ("3.10", "3.11", "3.12")
OF_OLD_PYTHONS = ("exceptiongroup", "tomli")  # which pip, asked by a newer one, leaves out
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux2014", "manylinux_2_17")


def lacks(modules: tuple[str, ...]) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def fill() -> None:
    """All wheels or none: an earlier kit is replaced at the end. Raises CalledProcessError where pip fails."""
    with tempfile.TemporaryDirectory(prefix=".gpu-kit-", dir=ROOT) as temporary:
        wheels = Path(temporary) / "wheels"
        for version in PYTHONS:
            platforms = [f"--platform={name}_{platform.machine()}" for name in PLATFORMS]
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--disable-pip-version-check",
                    "--only-binary=:all:",
                    f"--python-version={version}",
                    *platforms,
                    f"--dest={wheels}",
                    f"--constraint={ROOT / 'constraints.txt'}",
                    *PACKAGES.values(),
                    *OF_OLD_PYTHONS,
                ],
                check=True,
            )
        if FOLDER.exists():
            FOLDER.rename(Path(temporary) / "old")
        wheels.rename(FOLDER)


def install(target: Path) -> list[str]:
    """What is missing here and the kit has, for this process and those that it starts; returns its names.

    Raises CalledProcessError where pip fails.
    """
    names = [PACKAGES[module] for module in lacks(tuple(PACKAGES))] if FOLDER.is_dir() else []
    if names:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-index",
                f"--find-links={FOLDER}",
                f"--target={target}",
                *names,
            ],
            check=True,
        )
        sys.path.insert(0, str(target))
        importlib.invalidate_caches()
        os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.kit", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    try:
        fill()
    except subprocess.CalledProcessError as error:
        sys.exit(f"benchmarks.kit: error: expected pip to find every wheel, got its exit code {error.returncode}")
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{FOLDER.name}: {len(list(FOLDER.iterdir()))} wheels, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
