"""The README's figures of speed: blocks between `<!-- benchmarks: NAME -->` and `<!-- end -->`, of stored results."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from benchmarks.sources import ROOT
from benchmarks.suite import readme_tables, report, stored
from benchmarks.suite.readme_tables import Read

README, DOCS = ROOT / "README.md", ROOT / "docs"
WIDTH = 125  # of its lines
BLOCKS: dict[str, Callable[[Read], str]] = {
    "ops": readme_tables.ops,
    "cycles": readme_tables.cycles,
    "busy": readme_tables.busy,
    "cycles on a GPU": readme_tables.gpu_cycles,
    "where the time goes": readme_tables.profiles,
    "kernels": readme_tables.kernels,
}
BLOCK = re.compile(r"(<!-- benchmarks: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str, folder: Path = stored.RESULTS) -> str:
    """The text with its blocks of the results in `folder`. Raises ValueError where blocks and `BLOCKS` differ, or
    results are not what a block is made of."""
    names, expected = [name for _, name, _, _ in BLOCK.findall(text)], sorted(BLOCKS)
    num_begun = text.count("<!-- benchmarks: ")
    if sorted(names) != expected or num_begun != len(names):
        got = f"{', '.join(names)} of {num_begun} that begin"
        raise ValueError(f"benchmarks.readme: expected a block each of {', '.join(expected)}, got {got}")
    read = readme_tables.reader(folder)
    return BLOCK.sub(lambda block: f"{block[1]}\n{_made(block[2], read)}\n\n{block[4]}", text)


def _made(name: str, read: Read) -> str:
    try:
        return _wrapped(BLOCKS[name](read))
    except (KeyError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"benchmarks.readme: expected results to make {name} of, got others: {told}") from error


def _wrapped(block: str) -> str:
    """Paragraphs as the README's are; tables as they are."""
    paragraphs = [
        part if part.startswith("|") else textwrap.fill(part, WIDTH, break_long_words=False, break_on_hyphens=False)
        for part in block.split("\n\n")
    ]
    return "\n\n".join(paragraphs)


def pages() -> dict[Path, str]:
    """All that is made of stored results, by its path. Raises as `filled` and `found` do."""
    results = stored.found(stored.RESULTS)
    return {
        README: filled(README.read_text()),
        DOCS / "benchmarks.md": report.markdown(results, {}, "benchmarks.svg"),
        DOCS / "benchmarks.svg": report.picture(results, {}),
        **{DOCS / name: text for name, text in report.curves(results).items()},
    }
