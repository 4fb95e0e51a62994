"""`fastdmd.train` with an adversarial term: what it reads and writes, and what it refuses in one line."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from fastdmd import train
from fastdmd.data import Dataset
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.presets import PRESETS
from tests.helpers.adversarial import TINY
from tests.helpers.networks import make_network
from tests.helpers.tiny_runs import QUICK, digits, refuses, run_train

ON = ["--gan-guidance-weight", "1e-2", "--gan-features", "fake", "--num-samples", "0"]


@pytest.fixture
def labelled(tmp_path):
    images, labels = digits()
    np.savez(tmp_path / "labelled.npz", images=images, labels=labels)
    return str(tmp_path / "labelled.npz")


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_the_term(teacher_file, labelled, tmp_path):
    """Its losses are logged and its settings recorded, resolved; the same again; other images give other losses."""
    options = [*ON, "--gan-r1-weight", "2", "--divergence", "hellinger", "--guidance-lr", "5e-4", "--data", labelled]
    run_train(teacher_file, tmp_path / "a", *options)
    run_train(teacher_file, tmp_path / "b", *options)
    first, last = lines(tmp_path / "a")
    for line in (first, last):
        assert 0 < line["gan_r1"] < line["loss_gan_guidance"] < 10 and 0 < line["loss_gan_generator"] < 10
        assert line["head_grad_norm"] > 0
    timeless = [
        {k: v for k, v in line.items() if not re.search("second|bytes", k)}
        for line in (*lines(tmp_path / "b"), first, last)
    ]
    assert timeless[:2] == timeless[2:]
    config = json.loads((tmp_path / "a" / "config.json").read_text())["gan"]
    assert config == {
        "gan_generator_weight": 3e-3,
        "gan_guidance_weight": 1e-2,
        "gan_r1_weight": 2.0,
        "gan_translation": 0.0,
        "gan_max_sigma": pytest.approx(80, rel=1e-6),
        "gan_features": "fake",
        "gan_lr": 5e-4,
        "divergence": "hellinger",
    }


SMALL_IMAGES = {"gan_features": "images", "gan_generator_weight": 0.02, "gan_max_sigma": 1.0}
PUBLISHED = {"gan_features": "fake", "gan_generator_weight": 3e-3, "gan_max_sigma": 80.0}


@pytest.mark.parametrize(
    ("size", "has_features", "given", "expected"),
    [
        (32, True, {}, SMALL_IMAGES),
        (40, True, {}, PUBLISHED),
        (40, False, {}, SMALL_IMAGES),
        (32, True, {"gan_features": "fake"}, PUBLISHED),
        (
            40,
            True,
            {"gan_features": "teacher", "gan_r1_weight": 2.0},
            PUBLISHED | {"gan_features": "teacher", "gan_r1_weight": 2.0},
        ),
        (32, True, {"divergence": "hellinger"}, SMALL_IMAGES | {"gan_max_sigma": 80.0}),
        (
            32,
            True,
            {"gan_generator_weight": 0.0, "gan_lr": 1e-4},
            SMALL_IMAGES | {"gan_generator_weight": 0.0, "gan_lr": 1e-4},
        ),
    ],
)
def test_defaults_depend_on_what_is_judged(size, has_features, given, expected):
    teacher = make_network(dataclasses.replace(TINY, image_size=size))
    if not has_features:
        teacher.feature_shape = None
    gan = TrainConfig().replace(gan_guidance_weight=1e-2, guidance_lr=7e-4, **given).for_teacher(teacher).gan
    for name, value in ({"gan_lr": 7e-4} | expected).items():
        found = getattr(gan, name)
        assert found == (pytest.approx(value, rel=1e-6) if name == "gan_max_sigma" else value), name


def test_mnist_best_moves_images_where_it_judges_them():
    """Of another teacher, and where the term is taken back, nothing is left of it, and nothing to take back."""
    best, teacher = PRESETS["mnist-best"].config, make_network(TINY)
    found = {
        name: best.replace(**given).for_teacher(teacher).gan
        for name, given in {
            "its own": {},
            "another teacher": {"teacher": "another"},
            "no term": {"gan_guidance_weight": 0.0},
        }.items()
    }
    told = {name: (gan.gan_guidance_weight, gan.gan_translation) for name, gan in found.items()}
    assert told == {"its own": (1e-2, 0.036), "another teacher": (0.0, 0.0), "no term": (0.0, 0.0)}
    best.replace(gan_guidance_weight=0.0).check()
    with pytest.raises(ValueError, match="expected --gan-translation together with --gan-guidance-weight"):
        best.replace(gan_guidance_weight=0.0, gan_translation=0.1).check()


def test_the_embedded_teacher_has_its_digits(tmp_path):
    """Without --data, by default; and a run without the term logs nothing of it."""
    for name, options in (("with", []), ("without", ["--gan-guidance-weight", "0"])):
        train.main(["--out", str(tmp_path / name), *QUICK, "--iterations", "2", "--num-samples", "0", *options])
    assert json.loads((tmp_path / "with" / "config.json").read_text())["gan"] == {
        "gan_guidance_weight": 1e-2,
        "gan_r1_weight": 0.0,
        "gan_translation": 0.0,
        "gan_lr": 1.2e-3,
        "divergence": "reverse-kl",
        **SMALL_IMAGES,
    }
    assert 0 < lines(tmp_path / "with")[0]["loss_gan_guidance"] < 10
    assert not any("gan" in name or "head" in name for name in lines(tmp_path / "without")[0])


def test_classes_without_real_images_are_told(teacher_file, labelled, tmp_path, capsys):
    """The teacher has more than the three of these images; without the term it does not matter."""
    run_train(teacher_file, tmp_path / "run", *ON, "--data", labelled)
    told = "7 of the teacher's 10 classes have no image in .*labelled.npz: the adversarial term takes"
    assert re.search(told, capsys.readouterr().err)
    run_train(teacher_file, tmp_path / "plain", "--num-samples", "0", "--data", labelled)
    assert "have no image" not in capsys.readouterr().err
    whole = Dataset(torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10), "whole")
    assert train.unseen_classes(whole, 10, are_judged=True) is None
    assert train.unseen_classes(whole, 11, are_judged=True).startswith("1 of the teacher's")


def test_what_the_term_has_seen_of_the_figures_is_told(teacher_file, labelled, tmp_path, capsys):
    run_train(teacher_file, tmp_path / "run", *ON, "--num-samples", "20", "--data", labelled)
    assert f"The adversarial term trained on {labelled}, with which these figures compare" in capsys.readouterr().out
    run_train(teacher_file, tmp_path / "plain", "--num-samples", "20", "--data", labelled)
    assert "adversarial" not in capsys.readouterr().out
    assert "precision, recall and kernel distance compare with them" in train.overlap(None, "It")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gan-guidance-weight", "1e-2"], "expected --data with real images for --gan-guidance-weight, got none"),
        (
            ["--gan-generator-weight", "1"],
            "expected --gan-generator-weight together with --gan-guidance-weight, .* 1.0",
        ),
        (["--gan-r1-weight", "1"], "expected --gan-r1-weight together with --gan-guidance-weight, .* got 1.0"),
        (["--gan-lr", "1"], "expected --gan-lr together with --gan-guidance-weight, .* got 1.0"),
        (["--gan-max-sigma", "1"], "expected --gan-max-sigma together with --gan-guidance-weight, .* got 1.0"),
        (["--gan-features", "teacher"], "expected --gan-features together with --gan-guidance-weight, .* got teacher"),
        (
            ["--divergence", "forward-kl"],
            "expected --divergence together with --gan-guidance-weight, .* got forward-kl",
        ),
        (["--gan-guidance-weight", "-1"], "expected --gan-guidance-weight >= 0, got -1.0"),
        (
            [*ON, "--gan-max-sigma", "1e-3"],
            r"expected --gan-max-sigma >= 0.00(2|19)\d*, the least noise level, got 0.001",
        ),
        (
            [*ON, "--divergence", "jensen-shannon", "--gan-max-sigma", "2"],
            "expected --gan-max-sigma >= 72.0538.*, which is matched by --divergence jensen-shannon, got 2.0",
        ),
    ],
)
def test_mistakes(options, message, teacher_file, tmp_path, capsys):
    refuses(train, ["--teacher", str(teacher_file), "--out", str(tmp_path / "run"), *QUICK, *options], message, capsys)
    assert not (tmp_path / "run").exists()


def test_real_images_need_the_labels_that_the_teacher_takes(teacher_file, tmp_path, capsys):
    np.savez(tmp_path / "bare.npz", images=digits()[0])
    arguments = ["--teacher", str(teacher_file), "--out", str(tmp_path / "run"), *QUICK]
    refuses(train, [*arguments, *ON, "--data", str(tmp_path / "bare.npz")], "expected .*labels.*bare.npz", capsys)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def foreign(tmp_path):
    """Arguments of a run with 8x8 images of three classes, but for its teacher."""
    np.savez(tmp_path / "data.npz", images=digits()[0][:, :, :8, :8], labels=digits()[1])
    arguments = ["--parameterization", "x0", "--teacher-sigma-data", "0.5", "--data", str(tmp_path / "data.npz")]
    return [*QUICK, *ON, *arguments, "--out", str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("kind", "whose"), [("with_features", "fake"), ("with_features", "teacher"), ("build", "images")]
)
@pytest.mark.filterwarnings("ignore:Network")  # which nobody has trained
def test_a_foreign_network_with_features_or_without(foreign, kind, whose, tmp_path):
    train.main([*foreign, "--teacher", f"tests.helpers.foreign:{kind}", "--gan-features", whose])
    assert all(0 < line["loss_gan_guidance"] < 10 and line["head_grad_norm"] > 0 for line in lines(tmp_path / "run"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("build", r"Network to have feature_shape, .* and features\(x, level, labels\), which gives them, got none"),
        ("with_detached_features", "expected a gradient of NetworkWithFeatures's features in the images, got none"),
        (
            "with_small_features",
            r"expected features.x, level, labels. to give .* of shape \(2, 8, 8, 8\), got \(2, 4, 8, 8\) of",
        ),
        ("with_infinite_features", "expected finite features of NetworkWithFeatures, got NaN or infinity"),
        ("with_broken_features", "expected features of NetworkWithFeatures for .*, got AttributeError: .* line [0-9]+"),
    ],
)
@pytest.mark.filterwarnings("ignore:Network")  # which nobody has trained
def test_features_that_cannot_be_judged(foreign, kind, message, tmp_path, capsys):
    refuses(train, [*foreign, "--teacher", f"tests.helpers.foreign:{kind}"], message, capsys)
    assert not (tmp_path / "run").exists()
