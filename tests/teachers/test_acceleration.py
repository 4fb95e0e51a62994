"""Teachers of others compute with our ops, from the command line to the file of their generator and beyond."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import fastdmd
from fastdmd import sample, teachers
from fastdmd.distill import DMD2
from fastdmd.export import export_generator
from fastdmd.networks.accelerate.layers import Conv3x3, GroupNorm
from fastdmd.sampling import Generator
from tests.helpers import foreign
from tests.helpers.accelerated import sequential
from tests.helpers.tiny_runs import distill

pytestmark = pytest.mark.filterwarnings("ignore:.* does not denoise as")  # these networks are not trained
TEXTBOOK = f"{foreign.__name__}:textbook"
EPSILON = ["--parameterization", "epsilon", "--num-samples", "0", "--iterations", "2"]
LINE = (
    "ForeignUNet: accelerated 36 of 36 modules (GroupNorms 18 of 18, 3x3 convolutions 18 of 18, norms with SiLU 17, "
    "attentions 1, channels_last)\n"
)


def num_ours(network):
    return sum(type(part) in (Conv3x3, GroupNorm) for part in network.modules())


def test_from_the_command_line(tmp_path, capsys):
    """Its line says so, and its generator is what its own code reads; without, everything is as it was."""
    file = distill(tmp_path / "run", "--teacher", TEXTBOOK, *EPSILON)
    assert capsys.readouterr().out.count(LINE) == 1
    plain = foreign.textbook().eval()
    state = load_file(file)
    assert list(state) == sorted(plain.state_dict()) and all(tensor.is_contiguous() for tensor in state.values())
    plain.load_state_dict(state)
    generator = teachers.load_generator(file, network=TEXTBOOK)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([5.0, 300.0, 999.0]), torch.tensor([0, 2, 1])
    assert num_ours(generator.network) == 36
    assert_close(generator.network.network(x, t, labels), plain(x, t, labels), rtol=1e-4, atol=1e-5)
    sample.main([str(file), "--network", TEXTBOOK, "--num", "2", "--out", str(tmp_path / "s.npz"), "--device", "cpu"])

    distill(tmp_path / "plain", "--teacher", TEXTBOOK, *EPSILON, "--no-accelerate")
    assert "accelerated" not in capsys.readouterr().out
    other = load_file(tmp_path / "plain" / "generator.safetensors")
    assert other.keys() == state.keys()
    for name in state:  # Adam moves what has no gradient but for rounding by as much as anything else
        assert (state[name] - other[name]).abs().mean() < 1e-5, name


def test_generator_and_fake_score_have_it_too():
    teacher = teachers.load(foreign.textbook(), parameterization="epsilon")
    plain = teachers.load(foreign.textbook(), parameterization="epsilon", accelerate=False)
    assert (num_ours(teacher), num_ours(plain)) == (36, 0)
    options = {"learning_rate": 1e-3}
    model = DMD2(
        teacher,
        conditioning_sigma=80.0,
        sigma_data=0.5,
        dfake_gen_update_ratio=2,
        generator_options=options,
        guidance_options=options,
    )
    assert [num_ours(network) for network in (model.teacher, model.generator, model.fake_score)] == [36] * 3
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0, 80.0]), torch.arange(4) % 3
    assert_close(model.generator(x, sigma, labels), plain(x, sigma, labels), rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(teacher).bfloat16()
    assert_close(half(x, sigma, labels), plain.bfloat16()(x, sigma, labels), rtol=0.05, atol=2.0)  # at sigma 80


def test_what_cannot_be_accelerated_is_taken_as_it_is():
    class Counting(nn.Conv2d):
        image_shape, num_classes, calls = (1, 8, 8), 0, 0

        def forward(self, x, sigma):
            self.calls += 1
            return super().forward(x) * self.calls

    network, metadata = teachers.read(Counting(1, 1, 3, padding=1), teachers.TeacherOptions(parameterization="x0"))
    assert metadata["acceleration"].startswith("Counting: not accelerated; fastdmd.accelerate: expected the same a")
    assert type(network.network) is Counting
    assert "acceleration" not in teachers.read("mnist")[1]


def test_an_exported_generator_is_of_plain_operations(tmp_path):
    class Network(nn.Module):
        image_shape, num_classes = (3, 8, 8), 0

        def __init__(self):
            super().__init__()
            self.body = sequential()

        def forward(self, x, sigma):
            return self.body(x / 80)

    teacher = teachers.load(Network, parameterization="x0")
    difference = export_generator(Generator(teacher, (80.0,)), tmp_path / "g.pt2")
    assert difference < 1e-3 and num_ours(teacher) == 5
    program = torch.export.load(tmp_path / "g.pt2")
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.group_norm.default" in called and not any("fastdmd" in name for name in called)
    fastdmd.unaccelerate(teacher)
    assert num_ours(teacher) == 0
