"""Makes the sdist and the wheel, and tries each as a user would have it: installed, with and without a compiler.

`python tools/dist.py [FOLDER]`, by a Python that has `build`; `make dist` calls it. Both files lie in FOLDER (dist)
then. torch is installed once for building, where pip takes the one of PIP_CONSTRAINT, and once for trying.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"tools/dist.py: error: expected a new folder, got {folder}, which holds files")
    environment = {**os.environ, "FASTDMD_NATIVE": "1"}
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, env=environment)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tempfile.TemporaryDirectory() as home:
        venv.create(home, with_pip=True)
        python = Path(home, "bin", "python")
        bare = {**os.environ, "PATH": str(python.parent)}  # no compiler
        install(python, wheel, bare)
        smoke(python, "--native")
        install(python, sdist, os.environ, "--no-deps", "--force-reinstall", "--no-binary", "fastdmd")
        smoke(python, "--native")
        install(python, sdist, bare, "--no-deps", "--force-reinstall", "--no-binary", "fastdmd")
        smoke(python, "--no-native")
    print(f"{sdist} and {wheel} work")


def install(python: Path, file: Path, environment: dict[str, str], *options: str) -> None:
    constraint = environment.get("PIP_CONSTRAINT")
    if constraint:  # newer pips have a name of its own for the environments that they build in
        environment = {**environment, "PIP_BUILD_CONSTRAINT": constraint}
    subprocess.run([python, "-m", "pip", "install", "--quiet", *options, file], check=True, env=environment)


def smoke(python: Path, option: str) -> None:
    subprocess.run([python, ROOT / "tools" / "smoke.py", option], check=True, env={**os.environ, "PYTHONPATH": ""})


if __name__ == "__main__":
    main()
