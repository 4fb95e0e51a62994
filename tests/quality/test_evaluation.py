"""What a measurement says of a sampler and of real images, what a record of it is worth, and how it is shown."""

import dataclasses
import types

import pytest
import torch
from torch import nn

from fastdmd import data, quality
from fastdmd.quality import Measurement, metrics
from fastdmd.quality import evaluation as evaluating
from fastdmd.quality.class_figures import class_variance, classifier_score
from fastdmd.quality.kernel_distance import kernel_distance
from fastdmd.quality.precision_recall import precision_recall
from fastdmd.randomness import Stream, generator, permutation

SHAPE = (1, 28, 28)
COMPARED = ("precision", "recall", "kernel_distance", "num_compared")


class Given:
    """A sampler of real digits of the labels asked for, in their order."""

    num_evaluations = 1
    num_step_noises = 0

    class network:
        foreign_name = None

    def __init__(self, dataset: data.Dataset):
        self.of_class = [dataset.batch((dataset.labels == label).nonzero().flatten())[0] for label in range(10)]
        self.made: list[torch.Tensor] = []

    def __call__(self, noise, class_labels, step_noise):
        start = sum(map(len, self.made))  # images of balanced classes, ten of them
        images = [self.of_class[label][(start + i) // 10] for i, label in enumerate(class_labels)]
        self.made.append(torch.stack(images))
        return self.made[-1]


def digits(start: int, stop: int) -> data.Dataset:
    whole = data.load()
    return data.Dataset(whole.images[start:stop], whole.labels[start:stop], "these.npz")


def evaluation(dataset: data.Dataset, num_samples: int = 300, **options) -> quality.Evaluation:
    return quality.Evaluation(SHAPE, 10, num_samples=num_samples, dataset=dataset, **options)


def test_figures_are_those_of_the_features():
    """Of every image of a dataset; a generator of 300, the floor of one half against the other."""
    dataset = digits(0, 400)
    measured = evaluation(dataset)
    sampler = Given(digits(400, 1000))
    row = measured.measure(sampler, name="generator")
    network = metrics.load_feature_network()
    made, logits = network(((torch.cat(sampler.made) + 1) * 127.5).round() / 127.5 - 1)
    assert row.classifier_score == pytest.approx(classifier_score(logits), rel=1e-5)
    assert row.class_variance == pytest.approx(class_variance(made, torch.arange(300) % 10), rel=1e-5)
    assert row.frechet_means + row.frechet_covariances == pytest.approx(row.frechet_distance)

    order = permutation(400, seed=0, stream=Stream.EVALUATION_ORDER)
    real, _ = network(dataset.batch(order)[0])
    for found, a, b in ((row, made, real[:300]), (measured.floor, real[:200], real[200:])):
        assert found.num_compared == len(a) == len(b)
        assert (found.precision, found.recall) == pytest.approx(precision_recall(b, a), abs=1.01 / len(a))
        random = generator(0, Stream.KERNEL_DISTANCE)
        assert found.kernel_distance == pytest.approx(kernel_distance(a, b, random=random), rel=1e-4)
    assert 0 < measured.floor.precision < 1 and 0 < row.recall < 1


def test_few_of_many_real_images_are_drawn_at_random(monkeypatch):
    """Of a dataset that is sorted by class, too; the same ones for a seed, and others for another."""
    monkeypatch.setattr(metrics, "MAX_KEPT", 100)
    whole = digits(0, 1000)
    order = whole.labels.argsort()
    dataset = data.Dataset(whole.images[order], whole.labels[order], "sorted.npz")
    names, drawn = {}, []
    for seed in (0, 0, 1):
        measured = evaluation(dataset, seed=seed)
        row = measured.measure(Given(whole), name="generator")
        assert row.num_compared == 100 and measured.floor.num_compared == 50
        assert row.precision > 0.5 and row.recall > 0.5  # all classes are among them
        names.setdefault(seed, set()).add(measured.record(row)["settings"]["real_images"])
        drawn.append(dataclasses.replace(row, images_per_second=None))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(names[0]) == 1 and names[0] != names[1]


def test_the_floor_is_of_as_few_images_as_the_samples():
    """Of 300 samples: what 300 real digits have, not what all have. Few are far from any reference."""
    network, whole = metrics.load_feature_network(), data.load()
    drawn = permutation(len(whole), seed=0, stream=Stream.EVALUATION_ORDER)[:300]
    few = quality.Evaluation(SHAPE, 10, num_samples=300).floor
    expected = metrics.evaluate([whole.batch(drawn)], network, metrics.reference_statistics())
    assert few.num_images == 300
    assert few.frechet_distance == pytest.approx(expected.frechet_distance, rel=1e-6)
    assert few.class_accuracy == expected.class_accuracy
    every = quality.Evaluation(SHAPE, 10, num_samples=20_000).floor
    assert every.num_images == 10_000 and every.frechet_distance < few.frechet_distance / 5


def test_a_collapsed_generator_shows():
    dataset = digits(0, 600)
    good = Given(digits(600, 1200))
    collapsed = Given(digits(600, 1200))
    collapsed.of_class = [images[:1].expand(30, *SHAPE) for images in collapsed.of_class]
    rows = [evaluation(dataset).measure(sampler, name="generator") for sampler in (good, collapsed)]
    assert rows[1].class_variance == pytest.approx(0, abs=1e-6) and rows[0].class_variance > 1
    assert rows[1].recall < 0.1 < 0.5 < rows[0].recall
    assert rows[1].kernel_distance > 2 * rows[0].kernel_distance
    assert min(row.classifier_score for row in rows) > 9


def test_too_few_images_have_no_neighbours():
    measured = evaluation(digits(0, 6), num_samples=3)
    row = measured.measure(Given(digits(0, 600)), name="generator")
    for found in (row, measured.floor):
        assert all(getattr(found, name) is None for name in COMPARED) and found.frechet_distance is not None


def test_what_is_beyond_float64_is_not_known():
    found = metrics.evaluate(
        [(torch.rand(8, *SHAPE), torch.zeros(8, dtype=torch.int64))],
        metrics.load_feature_network(Made()),
        None,
        real=torch.rand(9, 28, dtype=torch.float64),
    )
    assert found.kernel_distance is None and found.classifier_score is None and found.precision == 0
    assert found.class_accuracy is None  # of NaN, though argmax has an answer


class Made(nn.Module):
    def forward(self, images):
        return images[:, 0, 0].double() * 1e55, torch.full((len(images), 3), torch.nan)


def test_a_record_is_of_the_real_images_that_it_was_compared_with(tmp_path):
    reference = str(tmp_path / "reference.npz")
    metrics.reference_statistics().save_npz(reference)
    these, others, source = digits(0, 300), digits(300, 600), digits(0, 600)
    measured = evaluation(these, reference=reference)
    row = measured.measure(Given(source), name="teacher")
    record = measured.record(row)
    known = measured.measure(Given(source), name="teacher", record=record)
    assert known == dataclasses.replace(row, recorded=True, images_per_second=known.images_per_second)
    again = evaluation(others, reference=reference).measure(Given(source), name="teacher", record=record)
    assert not again.recorded and again.frechet_distance == row.frechet_distance
    assert again.kernel_distance != row.kernel_distance

    # From before there were such figures, whose noise was not Philox's either; and of another seed.
    settings = record["settings"]
    old = {name: value for name, value in settings.items() if name != "real_images"}
    for other in (old, settings | {"seed": 1}):
        found = measured.measure(Given(source), name="teacher", record=record | {"settings": other})
        assert not found.recorded and found.frechet_distance == row.frechet_distance


class Pooled(nn.Module):
    factor = 1.0

    def forward(self, images):
        return self.factor * nn.functional.avg_pool2d(images, 7).flatten(1)


class Doubled(Pooled):
    factor = 2.0


def test_a_record_is_of_the_features_that_it_was_measured_in(tmp_path):
    """Also against statistics of a file, which do not tell in which features they were made."""
    reference, these = str(tmp_path / "reference.npz"), digits(0, 300)
    pooled = metrics.load_feature_network(f"{__name__}:Pooled")
    metrics.feature_statistics(metrics.dataset_batches(these), pooled).save_npz(reference)
    found = {}
    for name in ("Pooled", "Doubled"):
        measured = evaluation(these, reference=reference, feature_network=f"{__name__}:{name}")
        source = digits(300, 900)
        first = measured.measure(Given(source), name="teacher")
        record = measured.record(first)
        assert measured.measure(Given(source), name="teacher", record=record).recorded
        found[name] = measured, record
    for name, other in (("Pooled", "Doubled"), ("Doubled", "Pooled")):
        assert not found[name][0].measure(Given(digits(300, 900)), name="teacher", record=found[other][1]).recorded


def test_of_more_samples_than_real_images_some_of_all_classes_are_compared():
    """The first ones, so few as there are real images, could be of the first of many classes alone."""
    random = torch.Generator().manual_seed(0)
    places = torch.arange(400)[:, None].div(40, rounding_mode="floor") * 100.0  # of ten classes
    samples = places + torch.randn(400, 8, generator=random)
    real = (places + torch.randn(400, 8, generator=random))[torch.randperm(400, generator=random)][:80]
    found = metrics.compare(samples, real, 0)
    assert found["num_compared"] == 80 and found["recall"] > 0.8 and found["precision"] > 0.8
    assert metrics.compare(samples, real, 0) == found != metrics.compare(samples, real, 1)


class Apart:
    """A process of several, with others that are not there."""

    def __init__(self, rank, size):
        self.rank, self.size, self.is_alone, self.is_first = rank, size, False, rank == 0

    def from_first(self, make):
        return make()

    def in_order(self, made, take):
        for one in made:
            take(one)


def test_all_processes_warm_up_or_none(monkeypatch):
    """Also where one has a batch and others none: of a network in parts, a call that one makes alone waits for ever."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(evaluating, "is_cut", lambda network: True)
    on_cpu = {name: getattr(evaluating, name) for name in ("start_noise", "balanced_labels")}
    for name, function in on_cpu.items():
        monkeypatch.setattr(evaluating, name, lambda *given, function=function: function(*given[:-1], "cpu"))
    counts = []
    for rank in range(3):
        measured = quality.Evaluation((1, 8, 8), 10, num_samples=1000)  # no features
        measured.ranks, measured.device = Apart(rank, 3), types.SimpleNamespace(type="cuda")
        calls = []

        class Sampler(Given):
            def __init__(self, calls=calls):
                self.calls = calls

            def __call__(self, noise, class_labels, step_noise):
                self.calls.append(len(noise))
                return noise

        for _ in range(2):
            measured._sample(Sampler(), 1000, "generator", lambda: None)  # three batches, and one of the first process
            calls.append("measured")
        counts.append([place for place, call in enumerate(calls) if call == "measured"])
    assert counts == [[3, 6]] * 3  # two rounds, and the warm-up of the first time


def test_the_table_shows_what_is_known():
    full = Measurement(
        0.25,
        0.5,
        100.0,
        1,
        300,
        frechet_means=0.1,
        frechet_covariances=0.15,
        precision=0.75,
        recall=0.5,
        kernel_distance=-0.00123,
        num_compared=150,
        classifier_score=9.5,
    )
    short = quality.table({"generator": Measurement(0.25, None, 100.4, 1)})
    assert [line.split() for line in short.splitlines()[1:]] == [["generator", "1", "0.250", "-", "100"]]
    lines = quality.table(
        {"generator": full, "floor: real images": Measurement(None, None, precision=1.0, kernel_distance=2857760.08)}
    ).splitlines()
    assert lines[1].split() == ["generator", "1", "0.250", "50.00%", "100"] and lines[3] == ""
    assert lines[4].split() == ["generator", "floor:", "real", "images"]
    assert {line[:32].strip(): line[32:].split() for line in lines[5:]} == {
        "Fréchet distance: of means": ["0.100", "-"],
        "of covariances": ["0.150", "-"],
        "precision": ["75.00%", "100.00%"],
        "recall": ["50.00%", "-"],
        "kernel distance × 1000": ["-1.23", "2.858e+09"],
        "real images of these three": ["150", "-"],
        "classifier score": ["9.500", "-"],
    }
    assert len({len(line) for line in lines[4:]}) == 1
