"""Exports of a network of somebody else, whose code is named again."""

import pytest
import torch
from torch.testing import assert_close

from fastdmd import export, load_generator
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.weights import generator_metadata, save_network
from fastdmd.sampling import Generator
from tests.helpers.foreign import Network
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
