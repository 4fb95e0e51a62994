"""What images should look like: references of images, of data and of a teacher, and the classes that are lost."""

import pytest
import torch

from fastdmd.data import Dataset
from fastdmd.distill.statistics import IMAGE_STATISTICS, ClassSums, image_statistics
from fastdmd.quality.alarms import LEAST_SEPARATION
from fastdmd.quality.reference import LEAST_IMAGES, Reference, class_figures
from fastdmd.sampling import HeunSampler


def images_of_classes(num=160, seed=0):
    """Three classes of 8x8 images, each around a mean of its own."""
    labels = torch.arange(num) % 3
    random = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 1, 8, 8, generator=random).clamp(-0.6, 0.6)
    return (means[labels] + 0.1 * torch.randn(num, 1, 8, 8, generator=random)).clamp(-1, 1), labels


def test_a_reference_and_the_classes_that_are_lost():
    images, labels = images_of_classes()
    reference = Reference.of(images, labels, 3)
    found = [getattr(reference, name) for name in IMAGE_STATISTICS]
    assert found == image_statistics(images).tolist() and reference.excess == 0
    assert reference.classes.variance_within == pytest.approx(0.64, rel=0.05)
    assert reference.classes.separation > 0.8 and reference.least_images == 3 * LEAST_IMAGES

    def figures(images, labels):
        sums = ClassSums((1, 8, 8), 3, torch.device("cpu"))
        sums.add(images, labels)
        return class_figures(sums.read(), reference.classes)

    right = figures(images, labels)
    assert (right["classes_lost"], right["classes_seen"]) == (0, 3)
    assert right["class_spread"] == pytest.approx(0.8, rel=0.05)
    assert figures(images[labels < 2], labels[labels < 2])["classes_seen"] == 2
    confused = torch.where((labels == 2)[:, None, None, None], images.roll(1, 0), images)  # what follows is of class 1
    assert figures(confused, labels)["classes_lost"] == 1
    shuffled = figures(images[torch.randperm(160, generator=torch.Generator().manual_seed(1))], labels)
    assert abs(shuffled["class_separation"]) < 0.1 < 0.8 < right["class_separation"]


@pytest.mark.parametrize("seed", range(5))
def test_classes_that_are_hard_to_tell_apart_are_not_lost_by_chance(seed):
    """Images that differ most in brightness, whatever their class."""
    random = torch.Generator().manual_seed(seed)
    means = 0.05 * torch.randn(10, 3, 8, 8, generator=random)

    def some(num):
        labels = torch.randint(0, 10, (num,), generator=random)
        brightness = 0.25 * torch.randn(num, 3, 1, 1, generator=random)
        return means[labels] + brightness + 0.1 * torch.randn(num, 3, 8, 8, generator=random), labels

    right = Reference.of(*some(1000), 10)
    assert right.classes.separation < 0.1 and right.least_images > 160
    sums = ClassSums((3, 8, 8), 10, torch.device("cpu"))
    sums.add(*some(right.least_images))
    found = class_figures(sums.read(), right.classes)
    assert found["classes_lost"] == 0 and found["class_separation"] > LEAST_SEPARATION * right.classes.separation


def test_references_that_know_less():
    images, labels = images_of_classes(3 * LEAST_IMAGES)
    assert Reference.of(images, labels, 3).classes is not None
    for few, of, num_classes in ((images[1:], labels[1:], 3), (images, labels, 4), (images, None, 0)):
        found = Reference.of(few, of, num_classes)
        assert found.classes is None and found.spread > 0
    images[3, 0, 0, 0] = torch.nan
    assert Reference.of(images, labels, 3) is None


def test_the_references_of_a_run():
    """Of its images, of a seed; without any of the teacher's."""
    images, labels = images_of_classes(60)
    dataset = Dataset(((images + 1) * 127.5).round().to(torch.uint8), labels, "mine")
    assert Reference.of_dataset(dataset, 3, 0).brightness == pytest.approx(images.mean().item(), abs=1e-3)

    class Constant(torch.nn.Module):
        image_shape, num_classes, foreign_name = (1, 8, 8), 3, ""

        def __init__(self):
            super().__init__()
            self.means = torch.nn.Parameter(torch.tensor([-0.5, 0.0, 0.5]))
            self.sizes = []

        def forward(self, x, sigma, class_labels=None):
            self.sizes.append(len(x))
            return self.means[class_labels].reshape(-1, 1, 1, 1).expand_as(x)

    network = Constant()
    found = Reference.of_teacher(HeunSampler(network, 3), 24, 0)
    assert set(network.sizes) == {24, 16} and found.contrast == pytest.approx(0, abs=1e-3)
    assert found.classes.separation == pytest.approx(1)
    assert found.classes.means[:, 0].tolist() == pytest.approx([-0.5, 0, 0.5], abs=1e-6)
