"""Random inputs of parts of a batch are those of the whole, and so are the gradients that come of them."""

import copy
import dataclasses

import pytest
import torch
from torch.testing import assert_close

from fastdmd.data.pairs import Pairs
from fastdmd.distill.draws import NoiseSettings, materialised
from fastdmd.distill.starts import map_tensors, tensors_of
from fastdmd.networks.unet import UNet
from fastdmd.runs import distillation
from tests.helpers.adversarial import CONFIG, TINY, real_images

CPU = torch.device("cpu")
SEVERAL = {"generator_sigmas": (80.0, 5.0, 0.5)}
WITH_PAIRS = {"pairs": "unread", "regression_weight": 0.25, "divergence": "reverse-kl"}
NOISES = ("dm_noise", "fake_noise", "gan_noise", "real_noise")


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = UNet(TINY)
    with torch.no_grad():
        for parameter in network.parameters():  # what starts at zero would hide differences
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("name", ["sigma_min", "sigma_max", "rho", "time_mean", "time_std"])
def test_how_levels_of_other_dynamics_are_drawn_is_refused(name):
    """It would be recorded and count for nothing."""
    settings = NoiseSettings(**{name: {"sigma_min": 0.01, "sigma_max": 20.0}.get(name, 2.0)})
    takes = "flow" if name.startswith("time") else "edm"
    for dynamics in ("flow", "edm"):
        teacher = UNet(dataclasses.replace(TINY, dynamics=dynamics))
        assert NoiseSettings().for_teacher(teacher).dynamics == dynamics
        if dynamics == takes:
            assert getattr(settings.for_teacher(teacher), name) == getattr(settings, name)
        else:
            flag = name.replace("_", "-")
            with pytest.raises(
                ValueError, match=f"expected --{flag} .*, as it says nothing of {dynamics} dynamics, got"
            ):
                settings.for_teacher(teacher)


def random_pairs():
    noise = torch.randn(11, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return Pairs(noise, 0.7 + 0.1 * noise, torch.arange(11) % 3)


def make_draws(teacher, config, batch_size=6, first_sample=0):
    config = config.replace(batch_size=batch_size)
    return distillation.make_draws(config, teacher, CPU, real_images(), random_pairs(), first_sample=first_sample)


@pytest.mark.parametrize("changes", [WITH_PAIRS, SEVERAL, {**SEVERAL, "generator_inputs": "noised-data"}], ids=str)
def test_rows_of_a_batch_are_what_they_are_in_the_whole(teacher, changes):
    config = CONFIG.replace(**changes)
    whole = make_draws(teacher, config)
    names = {name for name, value in vars(whole(0)).items() if isinstance(value, torch.Tensor)}
    for step in (0, 1, 2, 1000):
        expected, with_noise = whole(step), materialised(whole(step))
        for first, size in ((0, 3), (3, 3), (1, 4), (5, 1)):
            part, rows = make_draws(teacher, config, size, first)(step), slice(first, first + size)
            for name in names:
                value, of_whole = getattr(part, name), getattr(expected, name)
                if name.endswith("_key"):
                    assert value.tolist() == [*of_whole[:3].tolist(), first] and of_whole[3] == 0
                else:
                    assert torch.equal(value, of_whole[rows]), name
            for name in NOISES:
                assert torch.equal(getattr(materialised(part), name), getattr(with_noise, name)[rows]), name
        keys = [getattr(expected, name).tolist() for name in names if name.endswith("_key")]
        assert len(keys) == 4 and len({tuple(key) for key in keys}) == 4


def gradients(teacher, config, draws):
    """Of each update, in float64: the generator's, the fake score's and the head's, of the first iteration."""
    torch.set_default_dtype(torch.float64)  # of the head
    try:
        model = distillation.build(config, copy.deepcopy(teacher))
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.head_optimizer is not None
    found = []
    for optimizer in (model.generator_optimizer, model.guidance_optimizer, model.head_optimizer):

        def keep(permitted=None, optimizer=optimizer, update=optimizer.update):
            found.append(torch.cat([parameter.grad.flatten().clone() for parameter in optimizer.parameters]))
            return update(permitted)

        optimizer.update = keep
    model.iterate(0, lambda step: map_tensors(in_float64, draws(step)))
    return found


def in_float64(x):
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize(
    "changes", [WITH_PAIRS, SEVERAL, {"method": "sid", "gan_features": "images"}, {"accumulation_steps": 3}], ids=str
)
def test_gradients_of_two_halves_are_that_of_the_whole(teacher, changes):
    """Beside each other, as two processes would compute them; and so are those of parts, one after the other."""
    config = CONFIG.replace(**{"divergence": "reverse-kl"} | changes)
    teacher = copy.deepcopy(teacher).double()
    whole = gradients(teacher, config, make_draws(teacher, config))
    one_part = config.replace(accumulation_steps=1)
    halves = [gradients(teacher, one_part, make_draws(teacher, one_part, 3, first)) for first in (0, 3)]
    assert len(whole) == 3
    for expected, first, second in zip(whole, *halves, strict=True):
        assert_close((first + second) / 2, expected, rtol=1e-9, atol=1e-12)
        assert (first - second).norm() > 1e-3 * expected.norm() > 0


def test_noise_in_memory_gives_the_same_losses(teacher):
    """As somebody's own draws may have it, beside an adversarial term, in both turns."""
    draws = make_draws(teacher, CONFIG)
    losses = []
    for source in (draws, lambda step: materialised(draws(step))):
        model = distillation.build(CONFIG, copy.deepcopy(teacher))
        losses.append([{k: v.item() for k, v in model.iterate(step, source).items()} for step in range(3)])
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4) and ours["loss_fake"] > 0.01


def test_buffers_hold_the_keys_of_their_parts(teacher):
    """At the same addresses throughout, which a captured graph reads again; on the device alone."""
    config = CONFIG.replace(accumulation_steps=3)
    model, draws = distillation.build(config, copy.deepcopy(teacher)), make_draws(teacher, config)
    places = []
    for step in (4, 5):
        buffers = model.load(draws(step))
        of_parts = [part.draws.fake_key for part in buffers.parts]
        assert [key.tolist() for key in of_parts] == [[*draws(step).fake_key[:3].tolist(), 2 * i] for i in range(3)]
        assert of_parts[0][2] == step
        places.append([tensor.data_ptr() for part in buffers.parts for tensor in tensors_of(part.draws)])
    assert places[0] == places[1]
