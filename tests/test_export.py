"""Exported generators run without fastdmd, hold the same numbers, and a failed export leaves nothing behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_network
from torch.testing import assert_close

from fastdmd import dmd2, export
from fastdmd.checkpoint import load_network, save_network
from fastdmd.unet import UNetConfig

SIGMA = 40.0
TINY = dict(image_size=8, model_channels=8, channel_multipliers=(1,), num_blocks=1, attention_resolutions=())
VARIANTS = {
    "conditional": UNetConfig(**TINY, num_classes=10, patch_size=2),
    "unconditional": UNetConfig(**TINY, num_classes=0, image_channels=3),
    "adm": UNetConfig(
        **TINY | dict(channel_multipliers=(1, 2)), num_classes=4, adm=True, adaptive_scale=True, channels_per_head=4
    ),
    "ncsn++": UNetConfig(
        **TINY | dict(channel_multipliers=(1, 2)), num_classes=0, embedding="fourier", noise_multiplier=2,
        encoder="residual", resample_filter=(1, 3, 3, 1),
    ),
}  # fmt: skip

RUN_PROGRAM = """
import json, sys
import numpy as np, torch
sys.modules["fastdmd"] = None  # an import of it fails
extra_files = {"fastdmd.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra_files)
inputs = [torch.from_numpy(array) for array in np.load(sys.argv[2]).values()]
images = program.module()(*inputs).detach().numpy()
foreign = [str(node.target) for node in program.graph.nodes if "fastdmd" in str(node.target)]
np.savez(sys.argv[3], images=images, metadata=extra_files["fastdmd.json"], foreign=foreign)
"""
RUN_ONNX = """
import json, sys
import numpy as np, onnxruntime
sys.modules["fastdmd"] = sys.modules["torch"] = None
session = onnxruntime.InferenceSession(sys.argv[1])
images = session.run(["images"], dict(np.load(sys.argv[2])))[0]
shapes = [str(value.shape) for value in (*session.get_inputs(), *session.get_outputs())]
metadata = json.dumps(session.get_modelmeta().custom_metadata_map)
np.savez(sys.argv[3], images=images, metadata=metadata, shapes=shapes)
"""


@pytest.fixture(params=VARIANTS)
def generator_file(request, tmp_path) -> Path:
    return write_generator(tmp_path, VARIANTS[request.param])


def write_generator(folder: Path, config: UNetConfig = VARIANTS["conditional"]) -> Path:
    path = folder / "generator.safetensors"
    save_network(path, make_network(config), kind="generator", conditioning_sigma=SIGMA, iterations=7, record=[1, 2])
    return path


def expected_images(generator_file, batch_size):
    """Inputs as arrays by name, and what `dmd2.generate` makes of them."""
    generator, _ = load_network(generator_file)
    noise = torch.randn(batch_size, *generator.image_shape, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(batch_size) % generator.num_classes if generator.num_classes else None
    images = dmd2.generate(generator, noise, labels, conditioning_sigma=SIGMA)
    arrays = {"noise": noise.numpy()} | ({} if labels is None else {"class_labels": labels.numpy()})
    return arrays, images


def run_elsewhere(code, exported, arrays):
    """Runs a program in a new process that cannot import fastdmd."""
    given, made = exported.parent / "inputs.npz", exported.parent / "outputs.npz"
    np.savez(given, **arrays)
    subprocess.run([sys.executable, "-c", code, exported, given, made], check=True, cwd=exported.parent)
    return np.load(made)


def check_metadata(text, generator_file):
    config = load_network(generator_file)[0].config
    metadata = {name: json.loads(value) for name, value in json.loads(text).items() if name != "fastdmd_version"}
    image_shape = [config.image_channels, config.image_size, config.image_size]
    assert metadata == dict(conditioning_sigma=SIGMA, image_shape=image_shape, num_classes=config.num_classes)


def fails(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        export.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and re.fullmatch(r"fastdmd\.export: error: [^\n]*\n", error), error
    return error


def test_program_runs_without_fastdmd(generator_file, tmp_path, capsys):
    exported = tmp_path / "generator.pt2"
    export.main([str(generator_file), "--out", str(exported)])
    assert re.search(r"generator.pt2: 0\.\d\d MB, .* by at most \d\.\de-0[678]\n", capsys.readouterr().out)
    arrays, images = expected_images(generator_file, 3)
    result = run_elsewhere(RUN_PROGRAM, exported, arrays)
    assert_close(torch.from_numpy(result["images"]), images, atol=1e-5, rtol=0)
    assert images.std() > 0.1 and result["foreign"].size == 0
    check_metadata(str(result["metadata"]), generator_file)


def test_onnx_runs_with_onnxruntime_alone(generator_file, tmp_path):
    for package in export.ONNX_PACKAGES:
        pytest.importorskip(package)
    exported = tmp_path / "generator.onnx"
    export.main([str(generator_file), "--out", str(exported)])
    arrays, images = expected_images(generator_file, 3)
    result = run_elsewhere(RUN_ONNX, exported, arrays)
    assert_close(torch.from_numpy(result["images"]), images, atol=1e-5, rtol=0)
    assert all(shape.startswith("['batch'") for shape in result["shapes"]), result["shapes"]
    check_metadata(str(result["metadata"]), generator_file)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_weights_come_alone(name, tmp_path):
    generator_file, exported = write_generator(tmp_path), tmp_path / "small.safetensors"
    export.main([str(generator_file), "--out", str(exported), "--weights-dtype", name])
    generator, _ = load_network(generator_file)
    loaded, metadata = load_network(exported)
    dtype = getattr(torch, name)
    for key, value in generator.state_dict().items():
        assert_close(loaded.state_dict()[key], value.to(dtype).float(), atol=0, rtol=0)
    assert metadata.keys() == {"kind", "network", "version", "conditioning_sigma"}
    assert metadata["kind"] == "generator" and metadata["conditioning_sigma"] == SIGMA
    assert loaded.config == generator.config
    num_weights = sum(value.numel() for value in generator.state_dict().values())
    assert exported.stat().st_size < num_weights * dtype.itemsize + 10_000


def test_network_is_left_as_it_was(tmp_path):
    network = make_network(VARIANTS["conditional"])
    before = [type(module) for module in network.modules()]
    export.OneStep(network, SIGMA)
    assert [type(module) for module in network.modules()] == before
    assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("suffix", export.WRITERS)
@pytest.mark.parametrize("defect", [1.0, float("nan")])
def test_what_differs_is_not_kept(suffix, defect, tmp_path, capsys, monkeypatch):
    """A file whose images are wrong: one line, no leftovers, and what was there stays."""

    def write_wrongly(network, path, conditioning_sigma, weights_dtype):
        path.write_text("wrong")
        return lambda *inputs: export.one_step_sampler(network, conditioning_sigma)(*inputs) + defect

    generator_file, exported = write_generator(tmp_path), tmp_path / f"exported{suffix}"
    exported.write_text("precious")
    monkeypatch.setitem(export.WRITERS, suffix, write_wrongly)
    error = fails([generator_file, "--out", exported], capsys)
    assert "expected images within 0.001 of the generator's, got a difference of " in error
    assert exported.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == sorted([exported.name, generator_file.name])


def test_tolerance_can_be_set(tmp_path, capsys):
    generator_file = write_generator(tmp_path)
    error = fails([generator_file, "--out", tmp_path / "a.pt2", "--tolerance", "1e-12"], capsys)
    assert "expected images within 1e-12" in error and os.listdir(tmp_path) == [generator_file.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "a.pth"], "expected --out ending in .safetensors, .pt2, .onnx, got a.pth"),
        (["--out", "no/folder/a.pt2"], "expected a file in an existing folder, got no/folder/a.pt2"),
        (["--out", "generator.safetensors"], "expected --out other than the weights themselves"),
        (["--out", "a.pt2", "--weights-dtype", "float16"], "expected --weights-dtype float32 for .pt2, got float16"),
        (["--out", "a.pt2", "--tolerance", "0"], "expected --tolerance > 0 and finite, got 0"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator_file = write_generator(tmp_path)
    assert message in fails([generator_file, *options], capsys)
    assert os.listdir(tmp_path) == [generator_file.name]


def test_only_generators_are_exported(teacher_file, tmp_path, capsys):
    error = fails([teacher_file, "--out", tmp_path / "a.pt2"], capsys)
    assert f"expected a one-step generator, got {teacher_file}, a teacher" in error
    save_network(teacher_file, make_network(VARIANTS["conditional"]), kind="generator")
    assert "without" in fails([teacher_file, "--out", tmp_path / "a.pt2"], capsys)
    assert "does not exist" in fails(["nowhere.safetensors", "--out", tmp_path / "a.pt2"], capsys)
    assert os.listdir(tmp_path) == [teacher_file.name]


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    generator_file = write_generator(tmp_path)
    error = fails([generator_file, "--out", tmp_path / "a.onnx"], capsys)
    assert "onnxruntime" in error and 'pip install "fastdmd[export]"' in error
    assert os.listdir(tmp_path) == [generator_file.name]
