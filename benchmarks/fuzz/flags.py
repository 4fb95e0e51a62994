"""Command lines that are not as they should be: wrong types, ranges, texts, and flags that contradict each other."""

from __future__ import annotations

import dataclasses
import functools
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from fastdmd.export import ExportConfig
from fastdmd.runs import cli, resume
from fastdmd.runs.config import EvaluateConfig, PairsConfig, SampleConfig, TrainConfig
from fastdmd.runs.presets import PRESETS
from fastdmd.runs.pretraining import PretrainConfig
from fastdmd.settings import flags

TEXTS = (
    "", " ", "0", "-1", "1", "2", "3", "7", "1.5", "-0.0", "1e400", "-inf", "nan", "NaN", "1e-320", "0x10", "1_0", "١٢",
    "①", "None", "none", "True", "auto", "abc", "é\u202e", "x" * 3000, "1,2", "80,2,1", "1,,2", ",", "2,80", "1 2", "'",
    '"', "\\", "*", "%s", "{}", "--", "-", "--seed", "../..", "/dev/zero", "/dev/null", "/proc/self/mem", "cpu", "cuda",
    "cuda:99", "cpu:-1", "meta", "mnist", "10m", "-5m", "\udcff", "2147483648", "4294967296", "9223372036854775808",
    "1" * 400, "1" * 5000, "0.5", "1e9", "100000000000", "a\nb",
)  # fmt: skip
COMMANDS: dict[str, tuple[Any, tuple[str, ...]]] = {  # with a configuration, and the words that each needs
    "fastdmd.train": (TrainConfig(), ("--out", "{out}")),
    "fastdmd.pretrain": (PretrainConfig(), ("--out", "{out}")),
    "fastdmd.pairs": (PairsConfig(out=Path("out")), ("--out", "{out}")),
    "fastdmd.sample": (SampleConfig(weights="mnist"), ("mnist", "--out", "{out}.npz")),
    "fastdmd.evaluate": (EvaluateConfig(weights="mnist"), ("mnist", "--out", "{out}.json")),
    "fastdmd.export": (ExportConfig(weights=Path("a"), out=Path("b")), ("a.safetensors", "--out", "{out}.pt2")),
}


@dataclasses.dataclass(frozen=True)
class CommandLine:
    command: str
    arguments: tuple[str, ...]
    given: tuple[tuple[str, tuple[str, ...]], ...]  # flags and their words

    def read(self) -> dict[str, str]:
        """What was made of the flags, by their names. Raises as the command does."""
        config_class = type(COMMANDS[self.command][0])
        arguments = list(self.arguments)
        presets = PRESETS if config_class is TrainConfig else None
        if config_class in (TrainConfig, PretrainConfig):
            arguments = resume.with_those_of_run(arguments)
        config = cli.parse(config_class, self.command, arguments, presets)
        named = {flag: functools.reduce(getattr, place, config) for place, flag in flags(config)}
        return {flag: repr(_plain(named[flag])) for flag, _ in self.given if flag in named}

    def right(self) -> dict[str, str]:
        """The same from the texts alone, as Python has it."""
        hints = hints_of(COMMANDS[self.command][0])
        return {flag: repr(meaning(hints[flag], words)) for flag, words in self.given if flag in hints}


def draw(rng: np.random.Generator, out: str) -> CommandLine:
    """A command and up to four of its flags, each with words from `TEXTS`, or some that fit."""
    command = list(COMMANDS)[rng.integers(len(COMMANDS))]
    config, needed = COMMANDS[command]
    hints = hints_of(config)
    for name in ("--out", "--resume"):
        hints.pop(name, None)
    given = {}
    for flag in rng.permutation(list(hints))[: rng.integers(1, 5)]:
        options = choices(hints[str(flag)])
        words = [TEXTS[rng.integers(len(TEXTS))] for _ in range(rng.choice([1, 1, 1, 1, 2, 3]))]
        if options and rng.random() < 0.3:
            words = [options[rng.integers(len(options))]]
        given[str(flag)] = () if bool in _members(hints[str(flag)]) and rng.random() < 0.8 else tuple(words)
    base = [word.replace("{out}", out) for word in needed]
    words = [word for flag, values in given.items() for word in (flag, *values)]
    return CommandLine(command, (*base, *words), tuple(given.items()))


def hints_of(config: Any) -> dict[str, Any]:
    """Types of all fields that are flags, by these."""
    found = {}
    for place, flag in flags(config):
        owner = functools.reduce(getattr, place[:-1], config)
        if place != ("weights",):  # which has no flag
            found[flag] = get_type_hints(type(owner))[place[-1]]
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def choices(hint: Any) -> tuple[str, ...]:
    return tuple(str(value) for member in _members(hint) if get_origin(member) is Literal for value in get_args(member))


def meaning(hint: Any, words: tuple[str, ...]) -> Any:
    """What words mean for a flag of this type."""
    members = _members(hint)
    if bool in members:
        return True if not words else words[0] == "True"
    if words == ("None",) and type(None) in members:
        return None
    for member in members:
        if get_origin(member) is tuple:
            kind = get_args(member)[0]
            parts = words[0].split(",") if len(words) == 1 and kind is float else words
            return [kind(part) for part in parts]
        if member in (int, float):
            return member(words[0])
    return words[0]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
