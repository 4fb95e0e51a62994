"""Teachers of every kind: from the command line to a generator that loads again; what is tried, and what is refused."""

import copy
import json
import re
import subprocess
import sys
import warnings

import edm_pickles
import foreign
import numpy as np
import pytest
import torch
from conftest import make_network
from edm_reference import random_state
from safetensors.torch import load_file, save_file
from tiny_runs import QUICK
from torch import nn
from torch.testing import assert_close

from examples import foreign_unet
from fastdmd import diffusion, evaluate, pretrain, sample, teachers, train
from fastdmd.diffusion import per_sample
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.unet import UNet
from fastdmd.networks.weights import load_network, save_network

pytestmark = pytest.mark.filterwarnings("ignore:.* does not denoise as")  # these networks are not trained


def distill(out, *options):
    train.main(["--out", str(out), *QUICK, *options])
    return out / "generator.safetensors"


def refuses(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and re.fullmatch(r"fastdmd\.\w+: error: [^\n]*\n", error), error
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("build", ["--parameterization", "epsilon", "--noise-schedule", "cosine", "--schedule-timesteps", "500"]),
        ("unconditional", ["--parameterization", "flow", "--time-scale", "1000", "--velocity", "image-noise"]),
    ],
)
def test_a_foreign_teacher_from_the_command_line_and_back(name, options, tmp_path, capsys):
    """Distilled, its generator loads by the name of its code alone, samples, and is measured."""
    file = distill(tmp_path / "run", "--teacher", f"foreign:{name}", *options)
    generator, metadata = load_network(file, network=f"foreign:{name}")
    teacher = teachers.load(f"foreign:{name}", **{
        key.strip("-").replace("-", "_").replace("schedule_timesteps", "num_train_timesteps"):
            int(value) if value.isdecimal() else value for key, value in zip(options[::2], options[1::2], strict=True)
    })  # fmt: skip
    assert generator.interface == teacher.interface and metadata["network"]["source"] == f"foreign:{name}"
    moved = [(a - b).abs().max() for a, b in zip(generator.parameters(), teacher.parameters(), strict=True)]
    assert max(moved) > 0 and generator.network.steps == 7
    # The tensors are the network's own: its code can read them without fastdmd.
    plain = getattr(foreign, name)()
    plain.load_state_dict(load_file(file))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), generator.parameters(), strict=True))

    out = tmp_path / "samples.npz"
    sample.main([str(file), "--network", f"foreign:{name}", "--num", "5", "--out", str(out), "--device", "cpu"])
    images = np.load(out)["images"]
    noise = torch.randn(5, *teacher.image_shape, generator=diffusion.random_generator(0, 0, stream=2))
    labels = torch.arange(5) % 3 if teacher.num_classes else None
    level = metadata["conditioning_sigma"]
    expected = generator(noise * level, torch.full((5,), level), labels).clamp(-1, 1).permute(0, 2, 3, 1)
    loaded = teachers.load_generator(file, network=f"foreign:{name}")
    assert loaded.sigmas == (level,)
    torch.testing.assert_close(loaded(noise, labels).clamp(-1, 1).permute(0, 2, 3, 1), expected)
    assert level == (1e6 if name == "unconditional" else 80)
    assert np.abs(images - (expected.numpy() + 1) * 127.5).max() <= 1 and images.std() > 0
    evaluate.main([str(file), "--network", f"foreign:{name}", "--num-samples", "4", "--device", "cpu"])
    assert re.search(r"^generator\s+1\s", capsys.readouterr().out, re.MULTILINE)
    # The teacher itself, by the same flags.
    sample.main([f"foreign:{name}", *options, "--num", "2", "--out", str(out), "--teacher-steps", "2"])
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
    refuses(train, ["--teacher", "g.safetensors", "--network", "foreign:build"], "got a generator in", capsys)
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
        (["foreign:nothing", "--parameterization", "v"], "expected foreign:nothing to be importable, got .*'nothing'"),
        (["foreign:three", "--parameterization", "v"], "expected foreign:three to be a Module, got <class 'int'>"),
        (["foreign:needs", "--parameterization", "v"], "missing 1 required positional argument: 'width'"),
        (["foreign:build"], "expected --parameterization out of x0, edm, epsilon, v, flow, got None"),
        (["foreign:build", "--parameterization", "edm"], "--teacher-sigma-data for a network without .* sigma_data"),
        (["foreign:build", "--parameterization", "v", "--image-shape", "3", "8", "8"],
         r"expected Network to denoise \(3, 3, 8, 8\) of torch.float32, .* got RuntimeError: .* channels"),
        (["foreign:build", "--parameterization", "v", "--teacher-labels", "one_hot"],
         "expected Network to denoise .* got"),
        (["foreign:build", "--parameterization", "v", "--network", "foreign:build"], "--network with a .safetensors"),
        (["mnist", "--parameterization", "v"], "expected no --parameterization with mnist, which brings its own"),
        (["mnist", "--teacher-weights", "w.pt"], "expected --teacher-weights with package.module:name only, got mnist"),
        (["mnist", "--network", "foreign:build"], "expected no --network for .*, which needs no code"),
        (["run"], "expected mnist, .* got the run run, which holds run/generator.safetensors"),
        (["nowhere"], "expected mnist, a .safetensors file .* or package.module:name, got nowhere"),
        (["nowhere.npz"], "expected mnist, .* got nowhere.npz"),
        (["foreign:build", "--parameterization", "v", "--teacher-weights", "nowhere.pt"], "nowhere.pt, which does not"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_be_taken_get_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "generator.safetensors"):
        (tmp_path / "run" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    refuses(train, ["--teacher", *arguments], message, capsys)
    refuses(sample, arguments, message, capsys)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_weights_for_imported_code(tmp_path):
    trained = foreign.build()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in trained.state_dict().items()}, tmp_path / "w.safetensors"
    )
    for name in ("w.pt", "w.safetensors"):
        loaded = teachers.load("foreign:Nested.instance", parameterization="v", weights=tmp_path / name)
        assert_close(loaded.network.state_dict(), trained.state_dict())
        assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


class Misbehaving(nn.Conv2d):
    image_shape, num_classes = (1, 8, 8), 0

    def __init__(self, spoil):
        super().__init__(1, 1, 1)
        self.spoil = spoil

    def forward(self, x, level):
        return self.spoil(super().forward(x), x, level)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y, x, sigma: y / (sigma > 1)[:, None, None, None], r"got NaN or infinity at sigma \[0.002, 0.5\]"),
        (lambda y, x, sigma: y + x.add_(1), "expected Misbehaving to leave its input as it is, got another x"),
        (lambda y, x, sigma: y + sigma.mul_(2).sum(), "to leave its input as it is, got another sigma"),
        (lambda y, x, sigma: {}["a"], r"to denoise .* got KeyError: 'a' \(.*test_teachers.py, line \d+\)"),
        (lambda y, x, sigma: int("one"), "expected Misbehaving to denoise .* got ValueError: invalid literal"),
        (lambda y, x, sigma: y[:1], r"to give a floating point tensor of shape \(3, 1, 8, 8\), got \(1, 1, 8, 8\)"),
    ],
)
def test_the_trial_run_finds_what_a_network_does_wrong(spoil, message):
    with pytest.raises(ValueError, match=message):
        teachers.load(Misbehaving(spoil), parameterization="x0")


class Recast(nn.Module):
    """The embedded teacher as an x0 or epsilon network."""

    image_shape, label_dim = (1, 28, 28), 10

    def __init__(self, kind):
        super().__init__()
        self.kind, self.unet = kind, teachers.load("mnist")
        abar = diffusion.ddpm_alphas_cumprod()
        self.register_buffer("sigmas", ((1 - abar) / abar).sqrt().float())

    def forward(self, x, level, one_hot):
        if self.kind == "x0":
            return self.unet(x, level, one_hot)
        sigma = self.sigmas[level.round().long()]
        x = x * per_sample((1 + sigma**2).sqrt())
        return (x - self.unet(x, sigma, one_hot)) / per_sample(sigma)


def test_the_trial_run_warns_of_a_wrong_name_and_is_silent_at_the_right_one():
    for kind in ("x0", "epsilon"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            teachers.load(Recast(kind), parameterization=kind)
    with pytest.warns(UserWarning, match=r"Recast does not denoise as --parameterization x0: it changes .* by \d{3}%"):
        teachers.load(Recast("epsilon"), parameterization="x0")
    with pytest.warns(UserWarning, match=r"does not denoise as --parameterization epsilon.* errs \d+\.\d times"):
        unet = teachers.load("mnist")
        recast = Recast("x0")
        recast.forward = lambda x, level, one_hot: unet.raw(x, level / 1000, one_hot)
        teachers.read(recast, teachers.TeacherOptions(parameterization="epsilon"))


def test_sources_that_are_ours_come_as_they_are(tmp_path, teacher_file):
    embedded = teachers.load("mnist")
    assert isinstance(embedded, UNet) and not any(p.requires_grad for p in embedded.parameters())
    assert embedded.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(teachers.load(str(teacher_file)).state_dict(), make_network().state_dict())
    network = make_network()
    assert teachers.load(network) is network
    adapted = Adapted(foreign.build(), parameterization="v")
    assert teachers.load(adapted) is adapted
    with pytest.raises(ValueError, match="expected no --teacher-labels with a Adapted, which brings its own"):
        teachers.load(adapted, labels="int")
    save_network(tmp_path / "g.safetensors", network, kind="generator", conditioning_sigma=80.0)
    with pytest.raises(ValueError, match="expected a teacher, got a generator in .*g.safetensors"):
        teachers.load(tmp_path / "g.safetensors")


def test_pickles_of_edm_are_distilled_as_ours(tmp_path, capsys):
    config = {
        "model_type": "SongUNet", "img_resolution": 8, "img_channels": 3, "label_dim": 2, "model_channels": 8,
        "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
    }  # fmt: skip
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


def test_the_example_runs(tmp_path):
    """A distillation through the library: the generator is no longer the teacher, and what was saved."""
    teacher, generator, images = foreign_unet.main(tmp_path / "g.safetensors", training=3, iterations=4, batch_size=4)
    assert images.shape == (10, 1, 28, 28) and images.isfinite().all()
    assert not torch.equal(generator.network.leave.weight, teacher.network.leave.weight)
    assert torch.equal(load_file(tmp_path / "g.safetensors")["leave.weight"], generator.network.leave.weight)
    assert (
        load_network(tmp_path / "g.safetensors", network="examples.foreign_unet:ForeignUNet")[1]["kind"] == "generator"
    )


def test_weights_key_names_an_entry_on_the_command_line(tmp_path, capsys):
    states = {}
    for number, name in enumerate(("model", "ema")):
        network = foreign.build()
        with torch.no_grad():
            network.conv_out.bias.add_(number)
        states[name] = {f"net.{key}": tensor for key, tensor in network.state_dict().items()}
    path = str(tmp_path / "w.pt")
    torch.save(states, path)
    options = ["foreign:build", "--parameterization", "v", "--teacher-weights", path]
    refuses(sample, options, "expected --weights-key out of model.net, ema.net for .*w.pt, got none", capsys)
    refuses(sample, ["foreign:build", "--parameterization", "v", "--weights-key", "ema"],
            "expected --weights-key with --teacher-weights only, got foreign:build", capsys)  # fmt: skip
    out = tmp_path / "s.npz"
    images = []
    for key in ("model", "ema"):
        sample.main([*options, "--weights-key", key, "--num", "2", "--teacher-steps", "2", "--out", str(out)])
        assert f"w.pt: took the 10 tensors under {key}.net, left 10 others" in capsys.readouterr().err
        images.append(np.load(out)["images"].astype(float))
    assert np.abs(images[0] - images[1]).max() > 1
    assert copy.deepcopy(teachers.NO_OPTIONS).given() == {}


def test_a_teacher_is_no_generator():
    with pytest.raises(ValueError, match=r"^fastdmd.load_generator: expected a generator, got a teacher in mnist$"):
        teachers.load_generator("mnist")
