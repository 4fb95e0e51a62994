"""Exported generators run without fastdmd, hold the same numbers, and a failed export leaves nothing behind."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fastdmd import export, files, load_generator
from fastdmd.networks.unet import UNetConfig
from fastdmd.networks.weights import generator_metadata, load_network, save_network
from fastdmd.sampling import Generator
from tests.helpers.networks import make_network

ROOT = Path(__file__).parents[2]
SIGMA = 40.0
TINY = dict(model_channels=8, num_blocks=1, attention_resolutions=())  # the middle attends all the same
VARIANTS = {
    "ddpm++, conditional": UNetConfig(
        **TINY, image_size=16, patch_size=2, num_classes=10, channel_multipliers=(1, 2), embedding="ddpmpp"
    ),
    "ncsn++, unconditional": UNetConfig(
        **TINY,
        image_size=8,
        image_channels=3,
        num_classes=0,
        channel_multipliers=(1, 2),
        embedding="fourier",
        noise_multiplier=2,
        encoder="residual",
        resample_filter=(1, 3, 3, 1),
    ),
    "adm": UNetConfig(
        **TINY,
        image_size=8,
        num_classes=4,
        channel_multipliers=(2,),
        adm=True,
        adaptive_scale=True,
        channels_per_head=4,
    ),
}
SEVERAL = (40.0, 3.0)
SMALLEST = UNetConfig(**TINY, image_size=8, num_classes=3, channel_multipliers=(1,))

# Each reads lines `program inputs outputs`; an import of fastdmd fails.
RUN_PROGRAMS = """
import sys
import numpy as np, torch
sys.modules["fastdmd"] = None
for line in sys.stdin:
    exported, given, made = line.split()
    extra_files = {"fastdmd.json": ""}
    program = torch.export.load(exported, extra_files=extra_files)
    images = program.module()(*(torch.from_numpy(array) for array in np.load(given).values())).detach().numpy()
    foreign = [str(node.target) for node in program.graph.nodes if "fastdmd" in str(node.target)]
    np.savez(made, images=images, metadata=extra_files["fastdmd.json"], foreign=foreign)
"""
RUN_ONNX = """
import json, sys
import numpy as np, onnxruntime
sys.modules["fastdmd"] = sys.modules["torch"] = None
for line in sys.stdin:
    exported, given, made = line.split()
    session = onnxruntime.InferenceSession(exported)
    images = session.run(["images"], dict(np.load(given)))[0]
    shapes = [str(value.shape) for value in (*session.get_inputs(), *session.get_outputs())]
    np.savez(made, images=images, metadata=json.dumps(session.get_modelmeta().custom_metadata_map), shapes=shapes)
"""


def write_generator(
    folder: Path, config: UNetConfig = SMALLEST, sigmas: tuple[float, ...] = (SIGMA,), clamped: bool = False
) -> Path:
    path = folder / "generator.safetensors"
    network = make_network(config)
    own = generator_metadata(Generator(network, sigmas, clamped))
    save_network(path, network, kind="generator", **own, iterations=7, record=[1, 2])
    return path


@pytest.fixture(scope="module")
def generator_files(tmp_path_factory) -> list[Path]:
    generators = [(config, (SIGMA,)) for config in VARIANTS.values()]
    generators += [(dataclasses.replace(SMALLEST, num_classes=n), SEVERAL, True) for n in (0, 3)]
    return [write_generator(tmp_path_factory.mktemp("variant"), *generator) for generator in generators]


@pytest.fixture(scope="module", autouse=True)
def trace_once():
    """Both programs of a network come from one trace, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        traced, trace = {}, export.trace

        def cached(generator):
            key = generator.network.config, generator.sigmas, generator.clamped
            if key not in traced:
                traced[key] = trace(generator)
            return traced[key]

        patch.setattr(export, "trace", cached)
        yield


def test_a_program_is_written_without_a_remark(generator_files, tmp_path, monkeypatch):
    """PyTorch warns on stderr of a path without a suffix, as the file has before it is in its place."""
    load, given = torch.export.load, []
    monkeypatch.setattr(torch.export, "load", lambda file: load(given.append(file) or file))
    export.export_generator(load_generator(generator_files[-1]), tmp_path / "generator.pt2")
    assert [isinstance(file, (str, Path)) for file in given] == [False] and (tmp_path / "generator.pt2").exists()


def export_and_run_elsewhere(generator_files, suffix, code):
    """Exports each generator and runs what was written, in a process without fastdmd, at a batch size of its own.

    Yields the generator, what the process made, and what it makes itself of the same inputs.
    """
    lines, expected = [], []
    for path in generator_files:
        exported, given, made = path.with_suffix(suffix), path.with_name("inputs.npz"), path.with_name("outputs.npz")
        export.main([str(path), "--out", str(exported)])
        generator = load_generator(path)
        inputs = {"noise": torch.randn(3, *generator.network.image_shape, generator=torch.Generator().manual_seed(1))}
        if generator.network.num_classes:
            inputs["class_labels"] = torch.tensor([2, 0, 1])
        if generator.num_step_noises:
            shape = 3, generator.num_step_noises, *generator.network.image_shape
            inputs["step_noise"] = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        np.savez(given, **inputs)
        images = generator(**inputs)
        assert images.std() > 0.1
        content = exported.read_bytes()
        assert b"site-packages" not in content and str(ROOT).encode() not in content  # nothing of this machine
        lines.append(f"{exported} {given} {made}\n")
        expected.append((generator, made, images))
    folder = generator_files[0].parent
    subprocess.run([sys.executable, "-c", code], input="".join(lines), text=True, check=True, cwd=folder)
    return [(generator, np.load(made), images) for generator, made, images in expected]


def check_result(generator, result, images):
    assert_close(torch.from_numpy(result["images"]), images, atol=1e-5, rtol=0)
    metadata = {
        name: json.loads(value)
        for name, value in json.loads(str(result["metadata"])).items()
        if name != "fastdmd_version"
    }
    assert metadata == {
        **generator_metadata(generator),
        "image_shape": list(generator.network.image_shape),
        "num_classes": generator.network.num_classes,
    }


def fails(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        export.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and re.fullmatch(r"fastdmd\.export: error: [^\n]*\n", error), error
    return error


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_a_full_disk_ends_no_process(suffix, generator_files, tmp_path, monkeypatch, capsys):
    """PyTorch's own writer of archives aborts there: only what Python writes asks Python to flush it."""
    out = tmp_path / f"a{suffix}"
    out.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        export.main([str(generator_files[0]), "--out", str(out)])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error == f"fastdmd.export: error: expected access to {out}, got: No space left on device\n"
    assert out.read_text() == "old" and os.listdir(tmp_path) == [out.name]


def test_an_export_that_is_ended_leaves_nothing(generator_files, tmp_path, monkeypatch):
    """As a signal does it, which unwinds no stack."""
    seen = []

    def end(*_):
        seen.append(len(os.listdir(tmp_path)))
        files.undo_all()
        seen.append(len(os.listdir(tmp_path)))
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "greatest_difference", end)
    with pytest.raises(KeyboardInterrupt):
        export.main([str(generator_files[0]), "--out", str(tmp_path / "a.safetensors")])
    assert seen == [1, 0] and os.listdir(tmp_path) == []


def test_programs_run_without_fastdmd(generator_files, capsys):
    for generator, result, images in export_and_run_elsewhere(generator_files, ".pt2", RUN_PROGRAMS):
        check_result(generator, result, images)
        assert result["foreign"].size == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(generator_files)
    assert all(
        re.search(r"generator.pt2: \d\.\d\d MB, .* by at most (\d\.\de-0[678]|0\.0e\+00)$", line) for line in lines
    ), lines


def test_onnx_runs_with_onnxruntime_alone(generator_files):
    for package in export.ONNX_PACKAGES:
        pytest.importorskip(package)
    for generator, result, images in export_and_run_elsewhere(generator_files, ".onnx", RUN_ONNX):
        check_result(generator, result, images)
        assert all(shape.startswith("['batch'") for shape in result["shapes"]), result["shapes"]


def test_weights_of_several_steps_come_with_their_levels(tmp_path):
    exported = tmp_path / "small.safetensors"
    export.main([str(write_generator(tmp_path, sigmas=SEVERAL)), "--out", str(exported)])
    assert load_generator(exported).sigmas == SEVERAL
    assert load_network(exported)[1].keys() == {"kind", "network", "version", "generator_sigmas", "clamped"}


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_weights_come_alone(name, tmp_path):
    generator_file, exported = write_generator(tmp_path), tmp_path / "small.safetensors"
    export.main([str(generator_file), "--out", str(exported), "--weights-dtype", name])
    generator, _ = load_network(generator_file)
    loaded, metadata = load_network(exported)
    dtype = getattr(torch, name)
    for key, value in generator.state_dict().items():
        assert_close(loaded.state_dict()[key], value.to(dtype).float(), atol=0, rtol=0)
    assert metadata.keys() == {"kind", "network", "version", "conditioning_sigma", "clamped"}
    assert metadata["kind"] == "generator" and metadata["conditioning_sigma"] == SIGMA
    assert loaded.config == generator.config
    num_weights = sum(value.numel() for value in generator.state_dict().values())
    assert exported.stat().st_size < num_weights * dtype.itemsize + 10_000


def test_network_is_left_as_it_was(tmp_path):
    network = make_network(SMALLEST)
    before = [type(module) for module in network.modules()]
    network.train().requires_grad_(True)
    export.export_generator(Generator(network, (SIGMA,)), tmp_path / "a.pt2")
    assert network.training and network.conv_in.weight.requires_grad
    assert [type(module) for module in network.modules()] == before
    assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def write_wrongly(defect):
    """A writer whose images are off by `defect`."""

    def write(generator, path, weights_dtype):
        path.write_text("wrong")
        return lambda **inputs: generator(**inputs) + defect

    return write


@pytest.mark.parametrize("suffix", export.WRITERS)
@pytest.mark.parametrize("defect", [0.01, float("nan")])
def test_what_differs_is_not_kept(suffix, defect, tmp_path, capsys, monkeypatch):
    """One line, no leftovers, and what was there stays."""
    generator_file, exported = write_generator(tmp_path), tmp_path / f"exported{suffix}"
    exported.write_text("precious")
    monkeypatch.setitem(export.WRITERS, suffix, write_wrongly(defect))
    error = fails([generator_file, "--out", exported], capsys)
    assert "expected images within 0.001 of the generator's, got a difference of " in error
    assert exported.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == sorted([exported.name, generator_file.name])


def test_tolerance_can_be_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(export.WRITERS, ".pt2", write_wrongly(0.01))
    export.main([str(write_generator(tmp_path)), "--out", str(tmp_path / "a.pt2"), "--tolerance", "0.02"])
    assert "by at most 1.0e-02" in capsys.readouterr().out and (tmp_path / "a.pt2").read_text() == "wrong"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "a.pth"], "expected a file ending in .safetensors, .pt2, .onnx, got a.pth"),
        (["--out", "no/folder/a.pt2"], "expected --out in an existing folder, got no/folder/a.pt2"),
        (["--out", "generator.safetensors"], "expected --out apart from what the command reads"),
        (["--out", "a.pt2", "--weights-dtype", "float16"], "expected weights_dtype float32 for .pt2, got torch"),
        (["--out", "a.pt2", "--tolerance", "0"], "expected --tolerance > 0 and finite, got 0"),
    ],
)
def test_mistakes_get_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator_file = write_generator(tmp_path)
    assert message in fails([generator_file, *options], capsys)
    assert os.listdir(tmp_path) == [generator_file.name]


def test_only_generators_are_exported(teacher_file, tmp_path, capsys):
    error = fails([teacher_file, "--out", tmp_path / "a.pt2"], capsys)
    assert f"expected a generator, got {teacher_file}, a teacher" in error
    save_network(teacher_file, make_network(SMALLEST), kind="generator")
    error = fails([teacher_file, "--out", tmp_path / "a.pt2"], capsys)
    assert f"expected a generator's conditioning_sigma, got {teacher_file} without" in error
    assert "does not exist" in fails(["nowhere.safetensors", "--out", tmp_path / "a.pt2"], capsys)
    assert os.listdir(tmp_path) == [teacher_file.name]


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    generator_file = write_generator(tmp_path)
    error = fails([generator_file, "--out", tmp_path / "a.onnx"], capsys)
    assert "onnxruntime" in error and 'pip install "fastdmd[export]"' in error
    assert os.listdir(tmp_path) == [generator_file.name]
