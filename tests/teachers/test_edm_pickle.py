"""EDM's pickles: read without executing anything, and refused with one line where they are not what they say."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdmd.networks.unet import UNet
from fastdmd.teachers import edm
from fastdmd.teachers.edm_pickle import load_pickle
from tests.helpers.edm_pickles import TINY, Call, assemble, dumps, module, network, published
from tests.helpers.edm_reference import random_state
from tests.helpers.hostile_pickles import CALLS, REFUSED

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
STATE = random_state(TINY)
PREFIX = "fastdmd.teachers: expected an EDM network in "


def tiny_pickle(**entries):
    return dumps(published(TINY, STATE, **entries))


def outcome(path):
    """The network, or the error: of the right kind, on one line that names the file."""
    try:
        return edm.load(path)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 400
        return str(error)


def refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"{PREFIX}{path}, got ") and "\n" not in message and message.isprintable()
    assert len(message) < len(f"{PREFIX}{path}, got ") + 200
    return message.removeprefix(f"{PREFIX}{path}, got ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16], ids=str)
def test_what_was_written_is_read(tmp_path, dtype):
    state = {key: tensor.to(dtype) for key, tensor in STATE.items()}
    state["model.conv.weight"] = torch.randn(6, 5, dtype=torch.float64).to(dtype).t()[1:]  # a view, transposed
    for content in (published(TINY, state), network(TINY, state)):
        (tmp_path / "network.pkl").write_bytes(dumps(content))
        config, got = load_pickle(tmp_path / "network.pkl")
        assert config == TINY
        assert got.keys() == state.keys()
        assert all(torch.equal(got[key], state[key]) and got[key].dtype == dtype for key in state)


def test_load_makes_the_network(tmp_path):
    (tmp_path / "network.pkl").write_bytes(tiny_pickle())
    x, sigma, labels = torch.randn(2, 1, 4, 4), torch.tensor([0.1, 9.0]), torch.tensor([1, 0])
    expected = edm.from_edm(TINY, STATE)(x, sigma, labels)
    assert torch.equal(edm.load(tmp_path / "network.pkl")(x, sigma, labels), expected)


def test_golden_pickle():
    """Its tensors are those of the golden network, whose values test_edm.py checks. Its source raises if executed."""
    path = GOLDEN / "edm_ddpmpp_tiny.pkl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    _, state = load_pickle(path)
    content = np.load(path.with_suffix(".npz"))
    assert {f"state/{key}" for key in state} == {key for key in content.files if key.startswith("state/")}
    assert all(np.array_equal(tensor.numpy(), content[f"state/{key}"]) for key, tensor in state.items())
    network = edm.load(path)
    arguments = (torch.from_numpy(content[key]) for key in ("x", "sigma", "class_labels"))
    D_x = torch.from_numpy(content["D_x"])
    assert (network(*arguments) - D_x).norm() < 1e-5 * D_x.norm()


def test_source_code_stays_text(tmp_path):
    canary = tmp_path / "canary"
    source = f"open({str(canary)!r}, 'w').close()\n"
    (tmp_path / "network.pkl").write_bytes(dumps({"ema": network(TINY, STATE, source=source)}))
    assert isinstance(edm.load(tmp_path / "network.pkl"), UNet)
    assert not canary.exists()


@pytest.mark.parametrize("global_name", CALLS)
def test_globals_that_are_refused(tmp_path, global_name, monkeypatch):
    """Anywhere in the file: in the network's place, beside it, inside its arguments, inside a tensor."""
    monkeypatch.chdir(tmp_path)
    path, canary = tmp_path / "X.pkl", tmp_path / "canary"

    def with_canary(value):
        if isinstance(value, list):
            return [with_canary(item) for item in value]
        return value.replace("{canary}", str(canary)) if isinstance(value, str) else value

    module_name, member = global_name.split(":")
    call = Call(module_name, member, *[with_canary(value) for value in CALLS[global_name]])
    expected = f"the global {module_name}.{member}, which is refused"
    tensor = Call("torch._utils", "_rebuild_parameter", call, False, {})
    for content in (
        call,
        {"ema": call},
        [call, call],
        {"ema": module("EDMPrecond", {"weight": tensor})},
        {"ema": module("EDMPrecond", _init_kwargs={"dropout": call})},
        published(TINY, STATE, loss_fn=call),
        {"ema": module("EDMPrecond", _forward_hooks={"a": call})},
        Call("torch.storage", "_load_from_bytes", call),
    ):
        assert refusal(path, dumps(content)) == expected
    protocol_2 = pickle.GLOBAL + f"{module_name}\n{member}\n".encode() + pickle.EMPTY_TUPLE + pickle.REDUCE
    assert refusal(path, assemble(protocol_2)) == expected
    assert not canary.exists()


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = REFUSED[case]
    assert refusal(tmp_path / "X.pkl", make()).startswith(message)
    assert os.listdir(tmp_path) == ["X.pkl"]


@pytest.mark.parametrize("value", ["a\nb" * 1000, [[]], None, {"a": 1}, 10**400, float("nan"), torch.zeros(3), True])
def test_arguments_that_are_no_numbers(tmp_path, value):
    (tmp_path / "X.pkl").write_bytes(dumps(published(TINY | {"model_channels": value}, STATE)))
    message = outcome(tmp_path / "X.pkl")
    assert message.startswith("fastdmd.teachers: expected model_channels of 1 to 16384, got ")


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "nowhere.pkl", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"expected an EDM network, got {path}, which is not a file"):
            load_pickle(path)


def test_truncated_anywhere(tmp_path):
    content, path = tiny_pickle(), tmp_path / "X.pkl"
    for length in [*range(40), *random.Random(0).sample(range(40, len(content)), 150), len(content) - 1]:
        message = refusal(path, content[:length])
        assert message.startswith(("a broken pickle", "a file that is no pickle")), length


def test_flipped_bits(tmp_path, monkeypatch):
    """Any damage gives an error on one line or a network; nothing else happens."""
    monkeypatch.chdir(tmp_path)
    content, path = tiny_pickle(), tmp_path / "X.pkl"
    generator = random.Random(0)
    errors = networks = 0
    for trial in range(300):
        damaged = bytearray(content)
        for _ in range(1 + trial % 3):
            position = generator.randrange(len(content))
            bit = 1 << generator.randrange(8)
            damaged[position] = generator.randrange(256) if trial % 2 else damaged[position] ^ bit
        path.write_bytes(damaged)
        result = outcome(path)
        errors += isinstance(result, str) and result.startswith("fastdmd.")
        networks += isinstance(result, UNet)
    assert errors + networks == 300 and errors > 100 and networks > 10
    assert os.listdir(tmp_path) == ["X.pkl"]


LOAD_ALL = """
import resource, sys
from pathlib import Path
from fastdmd.teachers import edm

limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 384 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).glob("*.pkl")):
    try:
        edm.load(path)
        print("network")
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures its memory in /proc")
def test_memory_is_bounded(tmp_path):
    """With 384 MiB to spare, every file that asks for more is refused like any other, by a ValueError."""
    huge = TINY | {"model_channels": 4096, "channel_mult": [16, 16]}
    cases = [make() for make, _ in REFUSED.values()]
    cases += [dumps(published(config, STATE)) for config in (huge, TINY | {"num_blocks": 1024})]
    for index, content in enumerate([*cases, tiny_pickle()]):
        (tmp_path / f"{index:03}.pkl").write_bytes(content)
    command = [sys.executable, "-c", LOAD_ALL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    lines = result.stdout.splitlines()
    assert len(lines) == len(cases) + 1
    assert all(line.startswith("fastdmd.teachers: expected ") for line in lines[:-1])
    assert "expected map_layer0.weight of shape" in lines[-3] and "expected the tensors of every block" in lines[-2]
    assert lines[-1] == "network"
