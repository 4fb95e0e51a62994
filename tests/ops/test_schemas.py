"""The schema of every op is stated in Python and in C++, and each implementation has it once more: all are the same.

Nothing else notices one that is not: arguments are passed by position, and torch's stable ABI unpacks them as the types
that a C++ function happens to have.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from fastdmd import _native, ops

CSRC = Path(__file__).parents[2] / "csrc"
TYPES = {  # in a schema, by that in C++
    "Tensor": "Tensor",
    "std::optional<Tensor>": "Optional[Tensor]",
    "double": "float",
    "int64_t": "int",
    "bool": "bool",
    "ScalarType": "ScalarType",
}


def schemas_of(text):
    """What `m.def` is called with in a source, by the name of the op."""
    written = re.findall(r'm\.def\(((?:\s*"[^"\n]*")+)\)', text)
    assert len(written) == text.count("m.def(")
    schemas = [torch._C.parse_schema("".join(re.findall('"([^"]*)"', literals))) for literals in written]
    return {schema.name: schema for schema in schemas}


TRITON_ONLY = {"bias_gradient"}
CPU_ONLY = {f"{name}{suffix}" for name in ("conv1x1", "conv3x3") for suffix in ("", "_backward")}
NATIVE = schemas_of((CSRC / "ops.cpp").read_text())


def python_schema(name):
    return getattr(torch.ops.fastdmd, name).default._schema


def described(argument):
    """All that a schema says of an argument or a result."""
    alias = argument.alias_info
    written = (sorted(alias.before_set), sorted(alias.after_set), alias.is_write) if alias else None
    default = repr(argument.default_value) if argument.has_default_value() else "none"
    return argument.name, str(argument.real_type), written, default, argument.kwarg_only


def differences(one, other):
    pairs = (one.arguments, other.arguments), (one.returns, other.returns)
    return [
        (a, b)
        for of_one, of_other in pairs
        for a, b in [*zip(map(described, of_one), map(described, of_other), strict=False), (len(of_one), len(of_other))]
        if a != b
    ]


def test_cpp_states_the_schemas_of_python():
    assert set(NATIVE) == set(ops.names()) - TRITON_ONLY
    assert {name: found for name in NATIVE if (found := differences(python_schema(name), NATIVE[name]))} == {}


@pytest.mark.skipif(_native.load("cpu") is not None, reason="needs the native library")
def test_the_library_was_built_from_these_sources():
    for name, schema in NATIVE.items():
        assert differences(getattr(torch.ops.fastdmd_native, name).default._schema, schema) == [], name


RIGHT = "op(Tensor x, Tensor(a!)? state, float eps=1.0, *, bool silu=True) -> (Tensor, Tensor)"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Tensor x", "Tensor y"),
        ("Tensor x", "Tensor? x"),
        ("Tensor(a!)?", "Tensor?"),
        ("(a!)", "(b!)"),
        ("(a!)", "(a)"),
        ("(a!)?", "(a!)"),
        ("float eps", "int eps"),
        ("=1.0", ""),
        ("=1.0", "=2.0"),
        ("*, ", ""),
        (", *, bool silu=True", ""),
        ("(Tensor, Tensor)", "Tensor"),
        ("(Tensor, Tensor)", "(Tensor, float)"),
    ],
)
def test_a_difference_is_found(right, wrong):
    schema, other = torch._C.parse_schema(RIGHT), torch._C.parse_schema(RIGHT.replace(right, wrong, 1))
    assert str(schema) != str(other) and differences(schema, schema) == []
    assert len(differences(schema, other)) > 0


def names_and_types(schema):
    arguments = [(argument.name, str(argument.real_type)) for argument in schema.arguments]
    return arguments, [str(result.real_type) for result in schema.returns]


def registered(text):
    """The functions that a C++ source registers by `m.impl`: their arguments and results, by the name of the op."""
    text = re.sub(r" *(//[^\n]*|/\*.*?\*/)", "", text)
    aliases = dict(re.findall(r"^using (\w+) = ([^;]+);", text, re.MULTILINE))
    found = {}
    for name, function in re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&(\w+)\)\)', text):
        ((result, parameters),) = re.findall(rf"^(\S[^\n]*?)\s{function}\(([^()]*)\) \{{", text, re.MULTILINE)
        pairs = [re.fullmatch(r"(\S+) (\w+)", parameter.strip()).groups() for parameter in parameters.split(",")]
        result = aliases.get(result, result)
        results = re.findall("Tensor", result)
        assert result in ("Tensor", f"std::tuple<{', '.join(results)}>"), result
        found[name] = [(argument, TYPES[kind]) for kind, argument in pairs], results
    assert len(found) == text.count("m.impl(")
    return found


SOURCES = [str(path.relative_to(CSRC)) for path in sorted(CSRC.rglob("*.c*")) if "m.impl(" in path.read_text()]


@pytest.mark.parametrize("source", SOURCES)
def test_functions_of_cpp_take_what_their_schemas_say(source):
    found = registered((CSRC / source).read_text())
    assert found == {name: names_and_types(NATIVE[name]) for name in found} != {}


def test_a_function_of_another_type_is_found():
    """The float and the int of a schema in each other's place: both are eight bytes, read as what they are not."""
    right = """
using Loss = std::tuple<Tensor, Tensor>;
Loss f(Tensor D_fake,  // [B, ...]
       Tensor x_gen, Tensor sigma /* [B] */,
       double sigma_data) {
m.impl("fake_loss", TORCH_BOX(&f));"""
    assert registered(right) == {"fake_loss": names_and_types(NATIVE["fake_loss"])}
    for part, wrong in (("double", "int64_t"), ("D_fake", "D"), ("Tensor, Tensor>", "Tensor>"), ("Tensor x_gen, ", "")):
        assert part in right and registered(right.replace(part, wrong)) != registered(right)


@pytest.mark.parametrize(("kind", "left_to_torch"), [("cpu", set()), ("cuda", CPU_ONLY)])
def test_every_op_is_registered_once(kind, left_to_torch):
    found = [name for path in SOURCES if path.startswith(kind) for name in registered((CSRC / path).read_text())]
    assert sorted(found) == sorted(set(NATIVE) - left_to_torch)


@pytest.mark.parametrize("name", ops.names())
def test_functions_of_python_have_the_arguments_of_their_op(name):
    module = importlib.import_module("fastdmd.ops._registry")._OPS[name][0]
    functions = [ops.implementations(name)["reference"]]
    if name not in CPU_ONLY:
        pytest.importorskip("triton", reason="Triton is not installed")
        functions.append(getattr(importlib.import_module(f"fastdmd.kernels.{module}"), name))
    expected = [argument.name for argument in python_schema(name).arguments]
    assert [list(inspect.signature(function).parameters) for function in functions] == [expected] * len(functions)
