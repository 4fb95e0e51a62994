"""A fake score that is told which step of the generator each of its images is of."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastdmd import teachers
from fastdmd.distill import DMD2
from fastdmd.distill.step_codes import GAIN, codes_of, tell_steps
from fastdmd.networks.adapted import Adapted
from fastdmd.networks.unet import UNet
from tests.helpers.adversarial import TINY
from tests.helpers.diffusers_folders import diffusers_unet
from tests.helpers.networks import make_network

SIGMAS = (80.0, 5.0, 0.5)
OPTIONS = {"learning_rate": 1e-2, "weight_decay": 0.0}


class Own(nn.Module):
    """Of an own trainer: the level enters after a Linear, beside the image."""

    image_shape, num_classes = (1, 4, 4), 0

    def __init__(self, name="level_embedding", used="level_embedding"):
        super().__init__()
        for each in {name, used}:
            setattr(self, each, nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 16)))
        self.image, self.used = nn.Linear(16, 16), used

    def forward(self, x, level):
        return (self.image(x.flatten(1)) + getattr(self, self.used)(level[:, None])).tanh().view_as(x)


def adapted(network=None):
    torch.manual_seed(0)
    options = {"image_shape": (1, 4, 4), "num_classes": 0, "sigma_data": 0.5, "parameterization": "edm"}
    return Adapted(Own() if network is None else network, **options)


def diffusers_network():
    options = {"image_shape": (3, 8, 8), "num_classes": 0, "sigma_data": 0.5, "parameterization": "epsilon"}
    denoiser = Adapted(diffusers_unet(), **options)
    assert "not accelerated" not in teachers.trial.accelerate_network(denoiser)
    return denoiser


def inputs(network, num=6):
    random = torch.Generator().manual_seed(2)
    x = torch.randn(num, *network.image_shape, generator=random)
    labels = torch.arange(num) % network.num_classes if network.num_classes else None
    return x, torch.rand(num, generator=random) + 0.1, labels


def first(rows, values):
    return [None if x is None else x[rows] for x in values]


@pytest.mark.parametrize(
    "make", [lambda: make_network(TINY), adapted, diffusers_network], ids=["ours", "own", "others"]
)
def test_each_row_has_the_embedding_of_its_step(make):
    """As the network with another bias of the embedding's last Linear has it; zero codes are none."""
    network = make().eval()
    plain, given = copy.deepcopy(network), inputs(network)
    tell_steps(network, 3)
    (name,) = codes_of(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network(*given), plain(*given))
        codes = network.get_parameter(name)
        codes.copy_(0.1 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(3)))
        found, untold = network(*given), plain(*given)
        features = network.with_features(*given, num_denoised=3) if network.feature_shape else None
        for step in range(3):
            told = copy.deepcopy(plain)
            last = [own for own in told.level_embedding.modules() if isinstance(own, nn.Linear)][-1]
            last.bias += GAIN * codes[step]
            rows = slice(step, None, 3)
            expected = told(*first(rows, given))
            assert_close(found[rows], expected, rtol=1e-4, atol=1e-5)
            assert (expected - untold[rows]).abs().max() > 1e-3
            if features is not None:
                assert_close(features[0][step : step + 1], expected[:1], rtol=1e-4, atol=1e-5)
                of_rows = told.with_features(*first(rows, given), num_denoised=0)[1]
                assert_close(features[1][rows], of_rows, rtol=1e-4, atol=1e-5)


def test_copies_are_told_by_their_own_codes():
    network = make_network(TINY).eval()
    tell_steps(network, 3)
    twin, given = copy.deepcopy(network), inputs(network)
    with torch.no_grad():
        twin.get_parameter("map_noise.step_codes").fill_(0.3)
        assert not torch.equal(network(*given), twin(*given))
        assert torch.equal(network(*given), make_network(TINY).eval()(*given))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: tell_steps(adapted(nn.Linear(16, 16)), 2), "expected Linear to have a level_embedding .* got none"),
        (
            lambda: tell_steps(adapted(with_embedding(nn.Identity())), 2),
            "a level_embedding with a Linear last, got none",
        ),
        (lambda: told()(*inputs(adapted(), 4)), r"\(B, 16\), B divided by 3 steps, got \(4, 16\)"),
        (lambda: told(nn.Unflatten(1, (4, 4)))(*inputs(adapted())), r"to give \(B, 16\), .* got \(6, 4, 4\)"),
    ],
)
def test_what_cannot_be_told_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def with_embedding(module):
    network = Own()
    network.level_embedding = module
    return network


def told(last=None):
    network = Own()
    if last is not None:
        network.level_embedding.append(last)
    network = adapted(network)
    tell_steps(network, 3)
    return network


def test_of_one_step_there_is_nothing_to_tell():
    network = make_network(TINY)
    names = list(network.state_dict())
    tell_steps(network, 1)
    assert list(network.state_dict()) == names and not network.map_noise._forward_hooks


def make(teacher, **options):
    guidance = {**OPTIONS, **options.pop("guidance", {})}
    return DMD2(
        teacher,
        generator_sigmas=SIGMAS,
        sigma_data=0.5,
        dfake_gen_update_ratio=2,
        generator_options=OPTIONS,
        guidance_options=guidance,
        **options,
    )


def test_the_fake_score_alone_is_told():
    model = make(make_network(TINY))
    assert codes_of(model.fake_score.state_dict()) == ["map_noise.step_codes"]
    assert model.fake_score.map_noise.step_codes.shape == (3, TINY.model_channels * TINY.embedding_multiplier)
    for network in (model.teacher, model.generator):
        assert type(network) is UNet and codes_of(network.state_dict()) == []


@pytest.mark.parametrize("network", [lambda: Own("embed", "embed"), lambda: with_embedding(nn.Conv1d(1, 16, 1))])
def test_without_a_level_embedding_it_is_not_told_and_a_run_says_so(network):
    network = adapted(network())
    assert codes_of(make(network).fake_score.state_dict()) == []
    notice = teachers.verify_level_embedding(network)
    assert notice.startswith("the fake score is not told which step of the generator it judges, as Own has no")


class Rows(nn.Module):
    """Around `Own`, which embeds other rows than those of the batch, or embeds them otherwise."""

    image_shape, num_classes = (1, 4, 4), 0

    def __init__(self, embed):
        super().__init__()
        self.inside, self.embed = Own(), embed
        self.level_embedding = self.inside.level_embedding

    def forward(self, x, level):
        return (self.inside.image(x.flatten(1)) + self.embed(self.level_embedding, level[:, None])).view_as(x)


def of_distinct(embed, level):
    values, place = level.unique(return_inverse=True)
    return embed(torch.cat([values, values, values])[:, None])[place.flatten()]


def sorted_first(embed, level):
    order = level[:, 0].argsort()
    return embed(level[order])[order.argsort()]


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda embed, level: embed(level), None),
        (lambda embed, level: 0 * embed(level), None),  # as of a network whose last weights are zero
        (lambda embed, level: embed(level.repeat(2, 1))[: len(level)], None),  # as a teacher with guidance does
        (lambda embed, level: embed.forward(level), "one that it does not call"),
        (lambda embed, level: embed(level.repeat_interleave(2, 0))[::2], "one with other rows"),
        (sorted_first, "one with other rows"),
        (of_distinct, "one with other rows"),
        (lambda embed, level: embed(level[:1]), r"to give \(B, 16\), B divided by 3 steps, got \(1, 16\)"),
    ],
)
def test_an_embedding_of_other_rows_is_found_out(embed, message):
    """Where a code would be of another step's images."""
    network = adapted(Rows(embed))
    if message is None:
        assert teachers.verify_level_embedding(network) is None
    else:
        with pytest.raises(ValueError, match=message):
            teachers.verify_level_embedding(network)
    assert teachers.verify_level_embedding(make_network(TINY)) is None  # ours needs no trial


def test_the_codes_come_to_tell_steps_apart():
    """Where all else is constant: of images that are 1 at the first step and -1 at the second, they learn which."""
    network = adapted()
    tell_steps(network, 2)
    codes = [parameter for name, parameter in network.named_parameters() if codes_of([name])]
    optimizer = torch.optim.Adam(codes, lr=3e-2)
    images = torch.tensor([1.0, -1.0]).repeat(8).view(-1, 1, 1, 1).expand(16, 1, 4, 4)
    losses = []
    for _ in range(60):
        x = images * 0 + 80 * torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        loss = (network(x, torch.full((16,), 80.0)) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], (losses[0], losses[-1])


def test_a_network_that_is_wider_has_wider_codes():
    wide = dataclasses.replace(TINY, model_channels=16)
    model = make(make_network(wide))
    assert model.fake_score.map_noise.step_codes.shape == (3, 16 * wide.embedding_multiplier)
