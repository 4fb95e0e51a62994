"""The documentation as a site."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_pages_are_built_without_a_warning(tmp_path):
    """As `make docs` does: no link leads nowhere, and no docstring is malformed."""
    pytest.importorskip("furo", reason="Sphinx's theme is not installed: it needs Python 3.11")
    command = [sys.executable, "-W", "ignore", "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    built = subprocess.run(
        [*command, "-c", ROOT / "tools" / "docs", ROOT, tmp_path / "docs"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0 and built.stderr == "", built.stderr
    page = (tmp_path / "docs" / "README.html").read_text()
    for name in (
        "docs/own-teacher",
        "docs/training",
        "docs/operations",
        "docs/quality",
        "tools/docs/reference",
        "CHANGELOG",
    ):
        assert f'href="{name}.html"' in page
    reference = (tmp_path / "docs" / "tools" / "docs" / "reference.html").read_text()
    assert 'id="fastdmd.ops.dm_loss"' in reference and 'id="fastdmd.optim.AdamWEMA"' in reference
