"""How the fields of configurations become flags: tyro's marks, or ones that say nothing where tyro is not installed.

Only commands need tyro; what they configure is also used without them.
"""

from __future__ import annotations

from typing import NamedTuple

try:
    from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, Suppress, arg
except ModuleNotFoundError:
    FlagCreatePairsOff = OmitArgPrefixes = Positional = Suppress = None

    class arg(NamedTuple):
        name: str  # `bounds.check` reads it


__all__ = ["FlagCreatePairsOff", "OmitArgPrefixes", "Positional", "Suppress", "arg"]
