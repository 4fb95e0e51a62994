"""A command line that cannot be parsed is one line, and exit code 2."""

import re

import pytest

from fastdmd import sample, train
from fastdmd.runs.arguments import in_one_line


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (train, ["--seed", "abc"], "Error parsing --seed: invalid literal for int() with base 10: 'abc'"),
        (train, ["--sed", "3"], "Unrecognized options: --sed, 3 (perhaps you meant --seed INT?)"),
        (train, ["--seed"], "Missing value for argument '--seed'. Expected 1 values."),
        (train, ["--method", "x"], "invalid choice 'x' for argument '--method'. Expected one of ('dmd2', 'sid')."),
        (train, ["--generator-sigmas", "80,,1"], "Error parsing --generator-sigmas: could not convert string to float"),
        (sample, [], "Missing from python -m fastdmd.sample: STR Weight file of a generator"),
        (sample, ["a", "b\u202e\nc"], "Unrecognized options: b? c"),
    ],
)
@pytest.mark.parametrize("columns", ["30", "100"])
def test_one_line(command, arguments, said, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    error, name = capsys.readouterr().err, command.__name__
    assert stop.value.code == 2 and re.fullmatch(rf"{name}: error: [^\n]+\n", error)
    assert error.startswith(f"{name}: error: expected arguments as --help lists them, got: {said}"), error
    assert "---" not in error and "helptext" not in error


def test_help_is_what_it_was(capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--help"])
    printed = capsys.readouterr()
    assert stop.value.code == 0 and printed.err == "" and len(printed.out.splitlines()) > 20


@pytest.mark.parametrize(
    ("box", "line"),
    [
        ("╭─ A ─╮\n│ one  │\n│  two │\n╰─────╯\n", "one two"),
        ("╭─ A ─╮\n│ \x1b[1mone\x1b[0m  │\n│ ──── │\n│ two │\n╰─────╯\n", "one"),
        (" A   \n ---- \n  one \n  two\n  ----\n  three ", "one two"),
        ("", ""),
    ],
)
def test_boxes(box, line):
    assert in_one_line(box) == line
