"""Sphinx over the Markdown of the repository, which reads as it is where Markdown is shown: `make docs`."""

import re
from pathlib import Path

from sphinx.application import Sphinx

import fastdmd

project = "fastdmd"
author = copyright = "the authors of fastdmd"
version = release = fastdmd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["README.md", "CHANGELOG.md", "docs/*.md", "fastdmd/assets/**.md", "tools/docs/reference.rst"]
root_doc = "README"
PAGES = """

```{toctree}
:hidden:
:glob:

docs/README
docs/training
docs/operations
docs/reproducibility
tools/docs/reference
docs/*
fastdmd/assets/**
CHANGELOG
```
"""

myst_heading_anchors = 4  # README links to its sections as Markdown viewers name them
default_role = "code"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "fastdmd"
html_show_copyright = False


def as_pages(app: Sphinx, name: str, content: list[str]) -> None:
    """The first page gets a list of the others; links to what is no page and no file, folders, are words."""
    here = (Path(app.srcdir) / name).parent

    def shown(link: re.Match) -> str:
        return link[1] if (here / link[2]).is_dir() else link[0]

    content[0] = re.sub(r"\[([^\]]*)\]\(([^)#\s:]+)\)", shown, content[0])
    if name == root_doc:
        content[0] += PAGES


def setup(app: Sphinx) -> None:
    app.connect("source-read", as_pages)
