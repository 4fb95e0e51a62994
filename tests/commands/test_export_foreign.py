"""Exports of a network of somebody else, whose code is named again."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from fastdmd import export, load_generator
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.weights import generator_metadata, save_network
from fastdmd.sampling import Generator
from tests.helpers.foreign import Network
from tests.helpers.networks import SMALL, make_network
from tests.helpers.tiny_runs import refuses


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_a_network_of_somebody_else_is_named_again(tmp_path, capsys, suffix):
    source, generator_file = "tests.helpers.foreign:Network", tmp_path / "own.safetensors"
    exported = tmp_path / f"exported{suffix}"
    generator = Generator(Adapted(Network(), origin={"source": source}, parameterization="x0"), (40.0, 3.0), True)
    save_network(generator_file, generator.network, kind="generator", **generator_metadata(generator))
    arguments = [str(generator_file), "--out", str(exported)]
    refuses(export, arguments, "expected --network package.module:name for", capsys)
    assert not exported.exists()
    export.main([*arguments, "--network", source])
    inputs = export.make_inputs(generator, 3)
    if suffix == ".pt2":
        images = torch.export.load(exported).module()(*inputs.values())
    else:
        images = load_generator(exported, network=source)(*list(inputs.values())[:2], step_noise=inputs["step_noise"])
    expected = generator(inputs["noise"], inputs["class_labels"], step_noise=inputs["step_noise"])
    assert_close(images, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1  # no picture of one colour


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_alone_are_rounded(tmp_path, dtype):
    """Noise levels of a schedule, which no file holds, and frequencies are not: they would be of other noise levels."""
    scheduled = Adapted(Network(), origin={"source": "tests.helpers.foreign:Network"}, **OF_A_SCHEDULE)
    for network in (scheduled, make_network(dataclasses.replace(SMALL, embedding="fourier"))):
        path = tmp_path / "generator.safetensors"
        generator = Generator(network, (40.0, 3.0), True)
        assert export.export_generator(generator, path, weights_dtype=dtype, tolerance=1e-5) > 0
        loaded = load_generator(path, network="tests.helpers.foreign:Network" if network is scheduled else None)
        for (name, own), kept in zip(network.named_buffers(), loaded.network.buffers(), strict=True):
            assert torch.equal(own, kept), name
        for own, kept in zip(network.parameters(), loaded.network.parameters(), strict=True):
            assert torch.equal(own.to(dtype).float(), kept)


OF_A_SCHEDULE = {"parameterization": "epsilon", "noise_schedule": "linear", "timesteps": "integer"}


class Ranked(Network):
    """Of an operation that ONNX does not have."""

    def forward(self, x, level, labels=None):
        places = torch.searchsorted(torch.arange(4.0), level.flatten())
        return super().forward(x, places, labels)


@pytest.mark.parametrize("timesteps", ["fractional", "integer"])
@pytest.mark.parametrize("parameterization", ["v", "epsilon"])
def test_networks_of_a_noise_schedule_become_onnx(tmp_path, parameterization, timesteps):
    pytest.importorskip("onnxruntime")
    interface = {"parameterization": parameterization, "noise_schedule": "cosine", "timesteps": timesteps}
    generator = Generator(Adapted(Network(), **interface), (40.0, 3.0), True)
    assert export.export_generator(generator, tmp_path / "generator.onnx") < 1e-4


def test_what_onnx_has_no_operation_for_is_one_line(tmp_path):
    pytest.importorskip("onnxruntime")
    generator = Generator(Adapted(Ranked(), parameterization="x0"), (40.0,), True)
    assert export.export_generator(generator, tmp_path / "generator.pt2") < 1e-4
    path = tmp_path / "generator.onnx"
    with pytest.raises(ValueError, match=r"that ONNX has operations for, as \.pt2 needs none, got .*searchsorted"):
        export.export_generator(generator, path)
    assert not path.exists()


class Branching(Network):
    """Goes one way or the other by what it is given, which no program can."""

    def forward(self, x, level, labels=None):
        return super().forward(x if x.sum() > 0 else -x, level, labels)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_what_cannot_be_traced_is_one_line_and_keeps_what_was_there(tmp_path, capsys, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    source, weights = f"{__name__}:Branching", tmp_path / "own.safetensors"
    generator = Generator(Adapted(Branching(), origin={"source": source}, parameterization="x0"), (40.0,), True)
    save_network(weights, generator.network, kind="generator", **generator_metadata(generator))
    path = tmp_path / f"generator{suffix}"
    path.write_text("old")
    refuses(export, [str(weights), "--network", source, "--out", str(path)], "network that torch.export traces", capsys)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
