"""Statistics of generator turns, held against plain PyTorch, and where a run finds them."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from fastdmd.distill.draws import materialised
from fastdmd.distill.statistics import (
    COMPARISONS,
    IMAGE_STATISTICS,
    ClassSums,
    comparison,
    image_statistics,
    turn_statistics,
)
from fastdmd.distill.tally import Tally
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig
from tests.helpers.adversarial import CONFIG as ADVERSARIAL
from tests.helpers.adversarial import TINY, real_images
from tests.helpers.networks import SMALL, make_network

CPU = torch.device("cpu")


def test_image_statistics():
    """Of two images of known values: one of -1 and 1, one of 0.5 and 2."""
    x = torch.tensor([[-1.0, 1.0], [0.5, 2.0]]).reshape(2, 1, 1, 2)
    found = dict(zip(IMAGE_STATISTICS, image_statistics(x).tolist(), strict=True))
    spread = math.sqrt((1.5**2 / 2 + 1.0**2 / 2) / 2)
    assert found == pytest.approx(
        {"brightness": 0.625, "contrast": (1 + 0.75) / 2, "spread": spread, "saturated": 0.75, "excess": 0.25}
    )
    assert image_statistics(x[:1])[IMAGE_STATISTICS.index("spread")].isnan()


def test_comparison_by_noise_level():
    """One image in the first bin, two in the third of which one has no ratio, one in the last."""
    x_gen = torch.zeros(4, 1, 2, 2)
    D_real = torch.tensor([1.0, 2.0, 0.0, -4.0]).reshape(4, 1, 1, 1).expand_as(x_gen)
    D_fake = torch.tensor([1.5, 1.0, 1.0, 2.0]).reshape(4, 1, 1, 1).expand_as(x_gen)
    sums, counts = comparison(x_gen, D_real, D_fake, torch.tensor([0.1, 1.0, 2.0, 5.0]))
    assert COMPARISONS[:4] == tuple(f"disagreement_{name}" for name in ("below_0.2", "0.2_1", "1_5", "above_5"))
    assert sums.tolist() == [0.5, 0, 0.5, 1.5, 1.5, 0, 0.5, 0.5] and counts.tolist() == [1, 0, 1, 1] * 2


def test_a_tally_weighs_statistics_and_leaves_out_what_is_not_finite():
    """One by one, and without a judgement of the turn."""
    tally = Tally(("loss",), CPU, ("a", "b", "c"))
    for sums, weights in (([3.0, math.nan, 0.0], [1.0, 5.0, 0.0]), ([9.0, 2.0, 0.0], [3.0, 4.0, 0.0])):
        tally.add(torch.tensor(1.0), statistics=torch.tensor([sums, weights]))
    reading = tally.read()
    assert reading.means == {"loss": 1.0, "a": 3.0, "b": 0.5} and reading.num_good == 2
    assert reading.num_watched == 2
    tally.add(torch.tensor(1.0))  # a turn whose images nobody looks at
    reading = tally.read()
    assert reading.means == {"loss": 1.0} and (reading.num_good, reading.num_watched) == (1, 0)
    assert tally.read().means == {"loss": None}


def test_class_sums():
    """Means of all images, variances of those of a time; an image with NaN is not there."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    images = torch.randn(30, 2, 16, 12, generator=random) + 0.3 * labels.reshape(-1, 1, 1, 1)
    labels = torch.cat([labels, torch.tensor([1, 3])])
    images = torch.cat([images, torch.full((1, 2, 16, 12), math.nan), torch.ones(1, 2, 16, 12)])
    sums = ClassSums((2, 16, 12), 5, CPU)
    for part in (slice(0, 15), slice(15, 32)):
        sums.add(images[part], labels[part])
    assert sums.read(32) is None  # and they stay
    found = sums.read(31)
    small = F.adaptive_avg_pool2d(images, (8, 8)).flatten(1).double()
    classes = [small[:30][labels[:30] == label] for label in range(3)]
    assert found.counts.tolist() == [10, 10, 10, 1, 0] and found.means[4].eq(0).all()
    torch.testing.assert_close(found.means[1], classes[1].mean(0))
    within = sum(half.var(0).sum() * 4 for part in classes for half in part.split(5)) / 24
    assert found.variance_within == pytest.approx(within.item(), rel=1e-6)
    means = torch.stack([part.mean(0) for part in classes] + [small[31]])
    counts = torch.tensor([10.0, 10, 10, 1], dtype=torch.float64)
    between = counts @ (means - counts @ means / 31).square().sum(1)
    between = (between - 3 * within) / 31
    assert found.separation == pytest.approx((between / (between + within)).item(), rel=1e-6)
    assert sums.read() is None  # they start from nothing


def test_what_changes_in_time_is_no_variety_within_a_class():
    sums, labels = ClassSums((1, 8, 8), 2, CPU), torch.tensor([0, 0, 1, 1])
    for brightness in (-0.5, 0.0, 0.5):
        sums.add(torch.full((4, 1, 8, 8), brightness), labels)
    assert sums.read().variance_within == 0
    sums.add(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))
    assert math.isnan(sums.read().variance_within)


@pytest.mark.parametrize("steps", [1, 2])
def test_turns_tell_of_their_images(teacher, steps):
    """Those of generator turns alone, whole whatever the parts; what plain calls of the networks say of them."""
    config = TrainConfig(batch_size=8, dfake_gen_update_ratio=2).replace(accumulation_steps=steps)
    draws, model = distillation.make_draws(config, teacher, CPU), distillation.build(config, copy.deepcopy(teacher))
    torch.manual_seed(0)
    for parameter in model.fake_score.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    drawn = materialised(draws(0))
    with torch.no_grad():
        x_gen = teacher(80 * drawn.noise, torch.full((8,), 80.0), drawn.class_labels)
        x_t = x_gen + drawn.dm_sigma.reshape(-1, 1, 1, 1) * drawn.dm_noise
        D_real, D_fake = (net(x_t, drawn.dm_sigma, drawn.class_labels) for net in (teacher, model.fake_score))
    sums, weights = turn_statistics(x_gen, [comparison(x_gen, D_real, D_fake, drawn.dm_sigma)])
    model.iterate(0, draws)
    model.iterate(1, draws)
    means = model.generator_tally.read().means
    for name, total, weight in zip(model.generator_tally.statistics, sums.tolist(), weights.tolist(), strict=True):
        assert (name in means) == (weight > 0)
        assert weight == 0 or means[name] == pytest.approx(total / weight, rel=1e-3, abs=1e-6), name
    assert means["disagreement_above_5"] > 0.01
    assert model.class_sums.read().counts.tolist() == drawn.class_labels.bincount(minlength=10).tolist()


@pytest.mark.parametrize(("generator_inputs", "watched"), [("simulated", 2), ("noised-data", 0)])
def test_of_several_steps_one_is_watched(generator_inputs, watched):
    """The last, with which sampling ends; the first, where the others start from real images."""
    teacher, changes = make_network(TINY), {"generator_sigmas": (80.0, 5.0, 0.5), "dfake_gen_update_ratio": 1}
    config = ADVERSARIAL.replace(**changes, generator_inputs=generator_inputs, seed=1)
    draws, model = distillation.make_draws(config, teacher, CPU, real_images()), distillation.build(config, teacher)
    for step in range(3):
        fake_score, drawn = copy.deepcopy(model.fake_score), materialised(draws(step))
        model.iterate(step, draws)
        reading, x_gen = model.generator_tally.read(), model.buffers.x_gen
        expected = image_statistics(x_gen[[watched, watched + 3]]).tolist()
        assert [reading.means.get(name) for name in IMAGE_STATISTICS] == pytest.approx(expected, rel=1e-5)
        assert reading.num_watched == reading.num_good == 1
        labels, sigma = drawn.class_labels[[watched, watched + 3]], drawn.dm_sigma
        assert model.class_sums.read().counts.tolist() == labels.bincount(minlength=3).tolist()
        with torch.no_grad():
            x_t = x_gen + sigma.reshape(-1, 1, 1, 1) * drawn.dm_noise
            images = (x_gen, *(net(x_t, sigma, drawn.class_labels) for net in (teacher, fake_score)), sigma)
        for name, *found in zip(COMPARISONS, *comparison(*(x[[watched, watched + 3]] for x in images)), strict=True):
            total, weight = (value.item() for value in found)
            assert reading.means.get(name) == (pytest.approx(total / weight, rel=1e-3) if weight else None), name


def test_a_network_without_classes_has_no_sums_of_them():
    network = make_network(dataclasses.replace(SMALL, num_classes=0))
    model = distillation.build(TrainConfig(batch_size=2), network)
    model.iterate(0, distillation.make_draws(TrainConfig(batch_size=2), network, CPU))
    assert model.class_sums is None and model.generator_tally.read().means["spread"] > 0
