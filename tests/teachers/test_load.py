"""Teachers of every kind through the library: what is loaded, what is tried on it, and what is refused."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from examples import foreign_unet
from fastdmd import diffusion, teachers
from fastdmd.diffusion import per_sample
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.unet import UNet
from fastdmd.networks.weights import load_network, save_network
from tests.helpers import foreign
from tests.helpers.networks import make_network

pytestmark = pytest.mark.filterwarnings("ignore:.* does not denoise as")  # these networks are not trained


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
        loaded = teachers.load(f"{foreign.__name__}:Nested.instance", parameterization="v", weights=tmp_path / name)
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
        (lambda y, x, sigma: {}["a"], r"to denoise .* got KeyError: 'a' \(.*test_load.py, line \d+\)"),
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


def test_the_example_runs(tmp_path):
    """A distillation through the library: the generator is no longer the teacher, and what was saved."""
    teacher, generator, images = foreign_unet.main(tmp_path / "g.safetensors", training=3, iterations=4, batch_size=4)
    assert images.shape == (10, 1, 28, 28) and images.isfinite().all()
    assert not torch.equal(generator.network.leave.weight, teacher.network.leave.weight)
    assert torch.equal(load_file(tmp_path / "g.safetensors")["leave.weight"], generator.network.leave.weight)
    assert (
        load_network(tmp_path / "g.safetensors", network="examples.foreign_unet:ForeignUNet")[1]["kind"] == "generator"
    )


def test_a_teacher_is_no_generator():
    with pytest.raises(ValueError, match=r"^fastdmd.load_generator: expected a generator, got a teacher in mnist$"):
        teachers.load_generator("mnist")
