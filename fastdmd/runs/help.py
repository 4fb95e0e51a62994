"""What a command line says by tyro: help with examples beneath it, and what was wrong, in one line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_type_hints

from fastdmd.runs import terminal
from fastdmd.runs.presets import Preset

HELP = ("-h", "--help")
# What stands behind a command's name: each line can be typed as it is, but for the files that it names.
EXAMPLES = {
    "fastdmd.train": [
        "--out runs/digits",
        "--teacher my.pkl --data my.zip --out runs/mine",
        "--resume runs/mine",
    ],
    "fastdmd.pretrain": ["--data my.zip --out runs/teacher", "--data my.zip --resize 64 --dynamics flow"],
    "fastdmd.sample": [
        "mnist --num 100",
        "runs/mine/generator.safetensors --labels 3,5",
        "runs/mine/generator.safetensors --out a.npz",
    ],
    "fastdmd.evaluate": [
        "mnist --num-samples 2000",
        "runs/mine/generator.safetensors --out a.json",
    ],
    "fastdmd.export": [
        "runs/mine/generator.safetensors --out a.onnx",
        "runs/mine/generator.safetensors --out a.pt2",
    ],
    "fastdmd.report": ["runs/mine", "runs/mine runs/other --out both.html"],
    "fastdmd.pairs": ["--out pairs", "--teacher my.pkl --num 50000 --out pairs"],
    "fastdmd.completion": [
        "bash > fastdmd.bash  # for ~/.bashrc to source",
        "zsh > ~/.zfunc/_fastdmd  # in a folder of fpath",
        "fish > ~/.config/fish/completions/fastdmd.fish",
    ],
}


@contextlib.contextmanager
def followed_by_examples(command: str, arguments: list[str], presets: Mapping[str, Preset]) -> Iterator[None]:
    """Inside, help that the arguments ask for is printed by others, and the process leaves; what each preset is for and
    the examples come beneath it."""
    try:
        yield
    except SystemExit as stop:
        if not stop.code and not set(HELP).isdisjoint(arguments):
            if presets:
                print("presets:", *(f"  {name:<17}{preset.summary}" for name, preset in presets.items()), "", sep="\n")
            print(examples(command))
        raise


@contextlib.contextmanager
def errors_as_lines() -> Iterator[None]:
    """Inside, a command line that tyro refuses is a ValueError of one line, instead of a box on stderr; what else is
    said there comes afterwards."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code == 2:
            raise ValueError(line_of(said.getvalue())) from None
        sys.stderr.write(said.getvalue())
        raise
    sys.stderr.write(said.getvalue())


def line_of(box: str) -> str:
    """What tyro says in a box, between its title and its first rule, and the flags or the choice that were meant.

    The box is of letters where stdout knows no others."""
    rows = [row.strip("│ ") for row in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]  # without colours
    grouped = itertools.groupby(rows[1:], lambda row: set(row) <= set("─-╭╮╰╯"))
    parts = [list(part) for is_rule, part in grouped if not is_rule]
    message = " ".join(" ".join(parts[0] if parts else [box]).split())
    if found := re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\).", message):
        got, flag, known = found[1], found[2], re.findall(r"'(.*?)'", found[3])
        return f"expected {flag} one of {', '.join(known)}, got {got}{terminal.meant(got, known)}"
    if found := re.match(r"Error parsing (--\S+): (.*)", message):
        return f"expected {found[1]} to be readable, got: {found[2].partition('Got errors')[0].rstrip('. ')}"
    if found := re.match("Unrecognized options: (.*)", message):
        got = found[1].replace(", ", " ")
        known = [flag for part in parts[1:] for row in part for flag in re.findall(r"--[\w-]+", row)]
        return f"expected flags that --help lists, got {got}{terminal.meant(got.split()[0], known)}"
    return f"expected arguments as --help lists them, got: {message}"


def examples(command: str) -> str:
    """A heading and a line for each, as the user would type it."""
    lines = [f"  {terminal.usage(command)} {line}".rstrip() for line in EXAMPLES[command]]
    return "\n".join(["", "examples:", *lines])


def registry() -> Any:
    """How tyro reads settings: what is said of a flag is one paragraph, and where that tells of a default that is None,
    nothing else does."""
    import tyro
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    found = ConstructorRegistry()

    @found.struct_rule
    def settings(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or info.type.__module__.startswith("tyro"):
            return None
        hints, texts = get_type_hints(info.type, include_extras=True), docstrings(info.type)
        fields = []
        for field in dataclasses.fields(info.type):
            default = field.default
            if isinstance(info.default, info.type):  # a preset
                default = getattr(info.default, field.name)
            elif default is dataclasses.MISSING:
                default = tyro.MISSING_NONPROP
            text, hint = texts.get(field.name), hints[field.name]
            if default is None and "Default" in (text or ""):
                hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
            fields.append(StructFieldSpec(name=field.name, type=hint, default=default, helptext=text))
        return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))

    return found


def docstrings(kind: type) -> dict[str, str]:
    """Of the fields of a dataclass, inherited ones too, each on one line; none without the source."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        with contextlib.suppress(OSError):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            for field, text in itertools.pairwise(definition.body):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                        texts[name] = " ".join(doc.split())
    return texts
