"""Teachers named on the command line, to a generator that loads again; and one line for those that cannot be taken."""

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from fastdmd import evaluate, ops, pretrain, sample, teachers, train
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.weights import load_network, save_network
from fastdmd.randomness import Stream, normals
from tests.helpers import edm_pickles, foreign
from tests.helpers.edm_reference import random_state
from tests.helpers.tiny_runs import distill, refuses

pytestmark = pytest.mark.filterwarnings("ignore:.* does not denoise as")  # these networks are not trained
FOREIGN = foreign.__name__
BUILD = f"{FOREIGN}:build"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("build", ["--parameterization", "epsilon", "--noise-schedule", "cosine", "--schedule-timesteps", "500"]),
        ("unconditional", ["--parameterization", "flow", "--time-scale", "1000", "--velocity", "image-noise"]),
    ],
)
def test_a_foreign_teacher_from_the_command_line_and_back(name, options, tmp_path, capsys):
    """Distilled, its generator loads by the name of its code alone, samples, and is measured."""
    file = distill(tmp_path / "run", "--teacher", f"{FOREIGN}:{name}", *options)
    generator, metadata = load_network(file, network=f"{FOREIGN}:{name}")
    teacher = teachers.load(
        f"{FOREIGN}:{name}",
        **{
            key.strip("-").replace("-", "_").replace("schedule_timesteps", "num_train_timesteps"): int(value)
            if value.isdecimal()
            else value
            for key, value in zip(options[::2], options[1::2], strict=True)
        },
    )
    assert generator.interface == teacher.interface and metadata["network"]["source"] == f"{FOREIGN}:{name}"
    moved = [(a - b).abs().max() for a, b in zip(generator.parameters(), teacher.parameters(), strict=True)]
    assert max(moved) > 0 and generator.network.steps == 7
    # The tensors are the network's own: its code can read them without fastdmd.
    plain = getattr(foreign, name)()
    plain.load_state_dict(load_file(file))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), generator.parameters(), strict=True))

    out = tmp_path / "samples.npz"
    sample.main([str(file), "--network", f"{FOREIGN}:{name}", "--num", "5", "--out", str(out), "--device", "cpu"])
    images = np.load(out)["images"]
    noise = normals((5, *teacher.image_shape), ops.rng_key(0, stream=Stream.EVALUATION_NOISE))
    labels = torch.arange(5) % 3 if teacher.num_classes else None
    level = metadata["conditioning_sigma"]
    expected = generator(noise * level, torch.full((5,), level), labels).clamp(-1, 1).permute(0, 2, 3, 1)
    loaded = teachers.load_generator(file, network=f"{FOREIGN}:{name}")
    assert loaded.sigmas == (level,)
    torch.testing.assert_close(loaded(noise, labels).clamp(-1, 1).permute(0, 2, 3, 1), expected)
    assert level == (1e6 if name == "unconditional" else 80)
    assert np.abs(images - (expected.numpy() + 1) * 127.5).max() <= 1 and images.std() > 0
    evaluate.main([str(file), "--network", f"{FOREIGN}:{name}", "--num-samples", "4", "--device", "cpu"])
    assert re.search(r"^generator\s+1\s", capsys.readouterr().out, re.MULTILINE)
    # The teacher itself, by the same flags.
    sample.main([f"{FOREIGN}:{name}", *options, "--num", "2", "--out", str(out), "--teacher-steps", "2"])
    assert np.load(out)["images"].shape == (2, 8, 8, teacher.image_shape[0])


def test_a_weight_file_imports_nothing(tmp_path, capsys, monkeypatch):
    """Neither its own claim nor a wrong flag; what it claims is shown, and the flag that is missing."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    network = Adapted(foreign.build(), parameterization="v", origin={"source": "trap:build"})
    save_network(tmp_path / "g.safetensors", network, kind="generator", conditioning_sigma=80.0)
    message = r"expected --network package.module:name for g.safetensors, whose network is trap:build, got none"
    for command, arguments in (
        (sample, ["g.safetensors"]),
        (evaluate, ["g.safetensors", "--num-samples", "4"]),
        (train, ["--teacher", "g.safetensors"]),
        (pretrain, ["--init", "g.safetensors"]),
    ):
        refuses(command, arguments, message, capsys)
    assert not (tmp_path / "sprung").exists()
    refuses(train, ["--teacher", "g.safetensors", "--network", BUILD], "got a generator in", capsys)
    loaded, _ = load_network("g.safetensors", network=foreign.Network)
    assert_close(loaded.state_dict(), network.state_dict())
    assert loaded.network.middle.bias is loaded.network.conv_in.bias
    save_network(tmp_path / "t.safetensors", network, kind="teacher", dtype=torch.float16)
    file = load_file(tmp_path / "t.safetensors")
    assert file["steps"].dtype == torch.int64 and file["middle.weight"].dtype == torch.float16
    half = teachers.load(tmp_path / "t.safetensors", network=foreign.build())
    assert half.interface == network.interface and half.network.middle.weight.dtype == torch.float32
    assert_close(half.network.middle.weight, network.network.middle.weight, rtol=1e-3, atol=1e-6)
    for code, got in (
        (
            lambda: nn.Linear(1, 1),
            "tensors of Linear in t.safetensors, got it without weight, bias; also conv_in.bias, .*",
        ),
        (foreign.three, "to be a Module"),
    ):
        with pytest.raises((ValueError, TypeError), match=got):
            load_network("t.safetensors", network=code)
    with pytest.raises(TypeError, match="expected a UNet or an Adapted network, got a Linear"):
        save_network(tmp_path / "x.safetensors", nn.Linear(1, 1), kind="teacher")


def test_code_in_the_working_directory_is_found(tmp_path):
    """Also where no `-m` puts it in the path; its flags resolve to a description of the network."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    (tmp_path / "my_code.py").write_text(
        "import torch\nclass Mine(torch.nn.Conv2d):\n"
        "    def __init__(self):\n        super().__init__(3, 3, 1)\n"
        "    def forward(self, x, level):\n        return super().forward(x)\n"
    )
    code = (
        "import sys; sys.path.remove('') if '' in sys.path else None\n"
        "from fastdmd import train; train.main(sys.argv[1:])"
    )
    options = ["--teacher", "my_code:Mine", "--parameterization", "v", "--image-shape", "3", "8", "8"]
    command = [sys.executable, "-c", code, *options, "--num-classes", "0", "--dry-run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    network = json.loads(result.stdout)["network"]
    assert network["class"] == "Mine" and network["num_parameters"] == 12 and network["source"] == "my_code:Mine"
    assert network["options"]["image_shape"] == [3, 8, 8] and network["options"]["noise_schedule"] == "linear"
    assert json.loads(result.stdout)["adapter"]["num_classes"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.such.module:thing", "--parameterization", "v"], "expected no.such.module:thing to be importable, got"),
        (
            [f"{FOREIGN}:nothing", "--parameterization", "v"],
            f"expected {FOREIGN}:nothing to be importable, got .*'nothing'",
        ),
        (
            [f"{FOREIGN}:three", "--parameterization", "v"],
            f"expected {FOREIGN}:three to be a Module, got <class 'int'>",
        ),
        ([f"{FOREIGN}:needs", "--parameterization", "v"], "missing 1 required positional argument: 'width'"),
        ([BUILD], "expected --parameterization out of x0, edm, epsilon, v, flow, got None"),
        ([BUILD, "--parameterization", "edm"], "--teacher-sigma-data for a network without .* sigma_data"),
        (
            [BUILD, "--parameterization", "v", "--image-shape", "3", "8", "8"],
            r"expected Network to denoise \(3, 3, 8, 8\) of torch.float32, .* got RuntimeError: .* channels",
        ),
        ([BUILD, "--parameterization", "v", "--teacher-labels", "one_hot"], "expected Network to denoise .* got"),
        ([BUILD, "--parameterization", "v", "--network", BUILD], "--network with a .safetensors"),
        (["mnist", "--parameterization", "v"], "expected no --parameterization with mnist, which brings its own"),
        (["mnist", "--teacher-weights", "w.pt"], "expected --teacher-weights with package.module:name only, got mnist"),
        (["mnist", "--network", BUILD], "expected no --network for .*, which needs no code"),
        (["run"], "expected mnist, .* got the run run, which holds run/generator.safetensors"),
        (["nowhere"], "expected mnist, a .safetensors file .* or package.module:name, got nowhere"),
        (["nowhere.npz"], "expected mnist, .* got nowhere.npz"),
        ([BUILD, "--parameterization", "v", "--teacher-weights", "nowhere.pt"], "nowhere.pt, which does not"),
    ],
)
def test_teachers_that_cannot_be_taken_get_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "generator.safetensors"):
        (tmp_path / "run" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    refuses(train, ["--teacher", *arguments], message, capsys)
    refuses(sample, arguments, message, capsys)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_pickles_of_edm_are_distilled_as_ours(tmp_path, capsys):
    config = {
        "model_type": "SongUNet",
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 2,
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    state = random_state(config)
    path = tmp_path / "network.pkl"
    path.write_bytes(edm_pickles.dumps(edm_pickles.published(config, state)))
    teacher = teachers.load(path)
    assert_close(teacher.state_dict(), teachers.from_edm(config, state).state_dict())
    generator, _ = load_network(distill(tmp_path / "run", "--teacher", str(path), "--num-samples", "0"))
    assert generator.config == teacher.config
    capsys.readouterr()
    options = ["--teacher", str(path), "--teacher-sigma-data", "1"]
    refuses(train, options, "expected no --teacher-sigma-data with .*network.pkl, which brings its own", capsys)


def test_weights_key_names_an_entry_on_the_command_line(tmp_path, capsys):
    states = {}
    for number, name in enumerate(("model", "ema")):
        network = foreign.build()
        with torch.no_grad():
            network.conv_out.bias.add_(number)
        states[name] = {f"net.{key}": tensor for key, tensor in network.state_dict().items()}
    path = str(tmp_path / "w.pt")
    torch.save(states, path)
    options = [BUILD, "--parameterization", "v", "--teacher-weights", path]
    refuses(sample, options, "expected --weights-key out of model.net, ema.net for .*w.pt, got none", capsys)
    refuses(
        sample,
        [BUILD, "--parameterization", "v", "--weights-key", "ema"],
        f"expected --weights-key with --teacher-weights only, got {BUILD}",
        capsys,
    )
    out = tmp_path / "s.npz"
    images = []
    for key in ("model", "ema"):
        sample.main([*options, "--weights-key", key, "--num", "2", "--teacher-steps", "2", "--out", str(out)])
        assert f"w.pt: took the 10 tensors under {key}.net, left 10 others" in capsys.readouterr().err
        images.append(np.load(out)["images"].astype(float))
    assert np.abs(images[0] - images[1]).max() > 1
    assert copy.deepcopy(teachers.NO_OPTIONS).given() == {}
