"""Code of the user's own that fails: one line with type, message, file and line, and what was raised behind it."""

import re
import sys
import warnings

import pytest
import torch
from torch import nn

from fastdmd import evaluate, sample, teachers, train
from fastdmd.networks.user_code import make_network, user_code
from fastdmd.networks.weights import save_network

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
    """Writes a module of that source, for `NAME:Mine`, whose weights are the same each time."""
    torch.manual_seed(0)
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
        (
            NETWORK.replace("super().__init__(1, 1, 1)", "super().__init__(4, 1, 1, groups=3)"),
            "got ValueError: in",
            8,
            ValueError,
        ),
        (
            NETWORK.replace("super().forward(x)", "super().forward(x[0, 0, 0])"),
            "to denoise .*got RuntimeError",
            11,
            RuntimeError,
        ),
        (NETWORK.replace("return super", "raise NotImplementedError; super"), "got NotImplementedError", 11, Exception),
        (NETWORK.replace("return super", "exit(); super"), "to denoise .*, got SystemExit", 11, SystemExit),
        (
            NETWORK + "\n    @property\n    def sigma_data(self):\n        return 1 / 0\n",
            "to be a teacher, got ZeroDivisionError: division",
            15,
            ZeroDivisionError,
        ),
    ],
)
def test_its_own_errors_are_one_line(source, message, line, cause, code):
    name = code(source)
    with pytest.raises(ValueError, match=message) as error:
        teachers.load(name, parameterization="x0")
    text = str(error.value)
    assert re.fullmatch(rf"fastdmd\.\w+: expected .*, got .* \(\S+{name[:-5]}\.py, line {line}\)", text), text
    assert len(text) < 900
    assert isinstance(error.value.__cause__, cause)


START, FORWARD, CALL = "(1, 1, 1)", "    def forward", "super().forward(x)"


@pytest.mark.parametrize(
    ("old", "new", "message", "cause"),
    [
        (FORWARD, "    @torch.no_grad()\n    def forward", "expected a gradient .* got none", None),
        (FORWARD, "    @torch.inference_mode()\n    def forward", "expected a gradient .* got none", None),
        (CALL, f"{CALL}.detach()", "expected a gradient for the parameters of Mine, got none", None),
        ("return super", "torch.set_grad_enabled(False); return super", "expected Mine to leave gradients on", None),
        (
            "return super().forward(x)",
            "y = super().forward(x).sigmoid(); z = y.exp(); y.mul_(2); return z.exp_()",
            "expected a gradient of Mine for .* got RuntimeError: .* inplace",
            RuntimeError,
        ),
        ("return super", "assert len(x) == 3; return super", r"\(2, 1, 8, 8\) .* AssertionError .*line 11", Exception),
        (START, "(1, 1, 1); self.lock = __import__('threading').Lock()", "Mine to be copied .* pickle", TypeError),
        (START, "(1, 1, 1); self.cache = self.weight * 2", "to be copied and trained, got RuntimeError", Exception),
        (START, "(1, 1, 1); self.w = torch.nn.Parameter(torch.ones(1, dtype=torch.cfloat))", "w in .*complex64", None),
        (
            FORWARD,
            f"    def __deepcopy__(self, memo): raise NotImplementedError('no copies')\n{FORWARD}",
            "copied and trained, got NotImplementedError: no copies .*line 10",
            NotImplementedError,
        ),
        (
            FORWARD,
            f"    def __deepcopy__(self, memo): return self\n{FORWARD}",
            "expected a copy of Mine with weights of its own, got weight shared",
            None,
        ),
        (START, "(1, 1, 1); self.f = lambda x: x * self.weight", "got none: .* weights of another", None),
    ],
)
def test_what_would_fail_in_a_distillation_is_refused_before_it(old, new, message, cause, code):
    """One line; sampling from the same network, which needs no gradient and no copy, goes on."""
    source = NETWORK.replace(old, new)
    if "self.f =" in new:
        source = source.replace(CALL, "self.f(x)")
    name = code(source)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        teachers.load(name, parameterization="x0")
    assert re.fullmatch(r"fastdmd\.\w+: [^\n]{1,900}", str(error.value)) and torch.is_grad_enabled()
    assert cause is None or isinstance(error.value.__cause__, cause)
    network, _ = teachers.read(name, teachers.TeacherOptions(parameterization="x0"))
    assert network.image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    "make",
    [
        "torch.jit.script(Base())",
        "torch.jit.trace(Base(), (torch.ones(3, 1, 8, 8), ones))",
        "torch.export.export(Base(), (torch.ones(3, 1, 8, 8), ones)).module()",
    ],
)
def test_modules_of_other_makes_get_one_line(make, code):
    source = NETWORK.replace("Mine", "Base").replace("super().forward(x)", "torch.nn.functional.silu(x) * self.bias")
    name = code(f"{source}\nones = torch.ones(3)\ndef Mine():\n    return {make}\n")
    options = {"parameterization": "x0", "image_shape": (1, 8, 8), "num_classes": 0}
    refused = (
        r"^fastdmd.(teachers: expected [^\n]*, got \w+Error: [^\n]*|AdamWEMA: expected modules of Python, got [^\n]*)$"
    )
    with pytest.raises((ValueError, TypeError), match=refused):
        teachers.load(name, **options)


@pytest.mark.parametrize("command", [sample, evaluate])
@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("raise RuntimeError('boom')", r"to denoise .* got RuntimeError: boom \(.*line 11\)"),
        ("return super().forward(x)[..., :4]", r"floating point tensor of shape \(2, 1, 8, 8\), got \(2, 1, 8, 4"),
        ("return super().forward(x).long()", "to give a floating point tensor"),
        (
            "return super().forward(x) / (level < 9).view(-1, 1, 1, 1)",
            r"expected finite images of Mine, got NaN .* at sigma \[80.0\]",
        ),
    ],
)
def test_a_generator_with_other_code_is_refused_before_it_samples(new, message, command, code, tmp_path, capsys):
    save_network(
        tmp_path / "g.safetensors",
        teachers.load(code(NETWORK), parameterization="x0"),
        kind="generator",
        conditioning_sigma=80.0,
    )
    other = code(NETWORK.replace(f"return {CALL}", new))
    with pytest.raises(SystemExit) as exit_:
        command.main([str(tmp_path / "g.safetensors"), "--network", other, "--device", "cpu"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and re.search(message, error), error


def test_a_denoising_network_of_half_its_methods_is_refused(code):
    """It could be distilled, and nobody could read what its weight file holds."""
    source = NETWORK.replace("import torch", "import torch\nfrom fastdmd.diffusion import DenoisingNetwork")
    source = source.replace("torch.nn.Conv2d", "DenoisingNetwork").replace("(1, 1, 1)", "()")
    with pytest.raises(ValueError, match="make a Module without arguments, got TypeError: .*abstract.*describe"):
        teachers.load(code(source))


@pytest.mark.parametrize(
    "change",
    [
        "torch.set_grad_enabled(False)",
        "torch.set_default_dtype(torch.float64)",
        "torch.set_default_device('meta')",
        "__import__('warnings').simplefilter('error')",
    ],
)
def test_modes_that_code_changes_are_as_before(change, code):
    def modes():
        return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), warnings.filters[:]

    before = modes()
    name = code(NETWORK + f"\n{change}\n")
    with pytest.warns(UserWarning, match="does not denoise"):
        teachers.load(name, parameterization="epsilon")
    assert modes() == before
    with pytest.raises(ValueError, match="got SystemExit"):
        make_network(code(f"import torch\n{change}\nraise SystemExit"), "teachers")
    assert modes() == before


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
        make_network(name, "teachers")
    with pytest.raises(
        ValueError, match="expected nothing:here to be importable, got ModuleNotFoundError: .*'nothing'$"
    ):
        make_network("nothing:here", "teachers")
    assert isinstance(make_network(code("import torch\nMine = torch.nn.Identity"), "teachers"), nn.Identity)
