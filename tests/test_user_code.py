"""Code of the user's own that fails: one line with type, message, file and line, and what was raised behind it."""

import re
import sys
import warnings

import pytest
import torch
from torch import nn

from fastdmd import sample, teachers, train
from fastdmd.imports import import_network, user_code

NETWORK = """
import torch

class Mine(torch.nn.Conv2d):
    image_shape, num_classes = (1, 8, 8), 0

    def __init__(self):
        super().__init__(1, 1, 1)

    def forward(self, x, level):
        return super().forward(x)
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Writes a module of that source, for `NAME:Mine`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(source):
        written.append(f"mine_{len(written)}_{tmp_path.name}")
        (tmp_path / f"{written[-1]}.py").write_text(source)
        return f"{written[-1]}:Mine"

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("source", "message", "line", "cause"),
    [
        ("x = 1\ndef broken(:\n", "importable, got SyntaxError: invalid syntax", 2, SyntaxError),
        ("if True:\nx = 1\n", "importable, got IndentationError: expected an indented block", 2, IndentationError),
        ("import torch\n\nimport no_such_package\n", "ModuleNotFoundError: .* 'no_such_package'", 3, ImportError),
        ("import sys\nsys.exit(3)\n", "importable, got SystemExit: 3", 2, SystemExit),
        ("assert False\n", "importable, got AssertionError", 1, AssertionError),
        ("open('absent.pt')\n", "got FileNotFoundError: .* 'absent.pt'", 1, FileNotFoundError),
        ("import json\njson.loads('{')\n", "got JSONDecodeError: Expecting property name", 2, ValueError),
        ("class Odd(Exception):\n    def __str__(self):\n        return 1 / 0\nraise Odd\n", "got Odd", 4, Exception),
        ("raise RuntimeError('two\\nlines ' + 'long ' * 500)\n", r"RuntimeError: two lines .* \.\.\.", 1, Exception),
        ("def Mine():\n    return {}['width']\n", "make a Module .*, got KeyError: 'width'", 2, KeyError),
        ("def Mine():\n    return Mine()\n", "got RecursionError: maximum recursion", 2, RecursionError),
        (NETWORK.replace("super().__init__(1, 1, 1)", "super().__init__(4, 1, 1, groups=3)"), "got ValueError: in", 8,
         ValueError),
        (NETWORK.replace("super().forward(x)", "super().forward(x[0, 0, 0])"), "to denoise .*got RuntimeError", 11,
         RuntimeError),
        (NETWORK.replace("return super", "raise NotImplementedError; super"), "got NotImplementedError", 11, Exception),
        (NETWORK.replace("return super", "exit(); super"), "to denoise .*, got SystemExit", 11, SystemExit),
        (NETWORK + "\n    @property\n    def sigma_data(self):\n        return 1 / 0\n",
         "to be a teacher, got ZeroDivisionError: division", 15, ZeroDivisionError),
    ],
)  # fmt: skip
def test_its_own_errors_are_one_line(source, message, line, cause, code):
    name = code(source)
    with pytest.raises(ValueError, match=message) as error:
        teachers.load(name, parameterization="x0")
    text = str(error.value)
    assert re.fullmatch(rf"fastdmd\.\w+: expected .*, got .* \(\S+{name[:-5]}\.py, line {line}\)", text), text
    assert len(text) < 900
    assert isinstance(error.value.__cause__, cause)


def test_the_command_says_it_in_one_line(code, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--teacher", code("raise SystemExit(0)"), "--parameterization", "v"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and re.match(r"fastdmd.train: error: .* got SystemExit: 0 \(.*, line 1\)$", error)


def test_a_network_that_fails_later_is_one_line(code, tmp_path, capsys):
    """At a batch of another size than that which it was tried with."""
    name = code(NETWORK.replace("return super", "assert len(x) == 3, 'three'; return super"))
    with pytest.raises(SystemExit) as exit_, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample.main([name, "--parameterization", "x0", "--num", "4", "--out", str(tmp_path / "a.png")])
    error = capsys.readouterr().err
    expected = (
        r"fastdmd.sample: error: fastdmd.quality: expected Mine to sample \(4, 1, 8, 8\), got AssertionError: three"
    )
    assert exit_.value.code == 2 and re.fullmatch(expected + r" \(\S+, line 11\)\n", error), error
    assert not (tmp_path / "a.png").exists()


def test_what_is_no_error_of_the_code_passes():
    with pytest.raises(KeyboardInterrupt), user_code("teachers", "nothing"):
        raise KeyboardInterrupt
    with pytest.raises(TypeError, match="^fastdmd.ops: its own line$"), user_code("teachers", "nothing"):
        raise TypeError("fastdmd.ops: its own line")
    with pytest.raises(ValueError, match=r"^fastdmd.teachers: expected a number, got RuntimeError: .*test_user_code"):
        with user_code("teachers", "a number"):
            torch.zeros(2) @ torch.zeros(3)


def test_errors_inside_libraries_name_the_line_that_called_them(code):
    name = code("import torch\n\ndef Mine():\n    return torch.nn.Linear(-1, 'x')\n")
    with pytest.raises(ValueError, match=r"\.py, line 4\)$"):
        import_network(name, "teachers")
    with pytest.raises(
        ValueError, match="expected nothing:here to be importable, got ModuleNotFoundError: .*'nothing'$"
    ):
        import_network("nothing:here", "teachers")
    assert isinstance(import_network(code("import torch\nMine = torch.nn.Identity"), "teachers"), nn.Identity)
