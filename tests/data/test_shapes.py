"""The coloured shapes of examples/shapes.py: what the folder holds, a function of the seed, whole or not there."""

import numpy as np
import pytest
import torch

from examples import shapes
from fastdmd import data
from fastdmd.quality.features import load_feature_network, verify

FILES = ["features.pt", "test.npz", "train.npz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    shapes.main(folder, num_train=80, num_test=16, iterations=2, seed=3)
    return folder


def test_images_and_labels(folder):
    """Every class equally often in both files, whose images differ; the same as uint8 and through `data.load`."""
    assert sorted(path.name for path in folder.iterdir()) == FILES
    train, test = data.load(folder / "train.npz"), data.load(folder / "test.npz")
    assert train.image_shape == test.image_shape == (3, 32, 32) and train.num_classes == len(shapes.CLASSES) == 8
    assert train.labels.bincount().tolist() == [10] * 8 and test.labels.bincount().tolist() == [2] * 8
    assert not (test.images[:, None] == train.images).flatten(2).all(2).any()
    stored = np.load(folder / "train.npz")
    assert stored["images"].dtype == np.uint8 and stored["images"].shape == (80, 32, 32, 3)
    assert np.array_equal(stored["images"].transpose(0, 3, 1, 2), train.images)


def test_all_is_a_function_of_the_seed(folder, tmp_path):
    shapes.main(tmp_path / "again", num_train=80, num_test=16, iterations=2, seed=3)
    shapes.main(tmp_path / "other", num_train=80, num_test=16, iterations=2, seed=4)
    networks = [load_feature_network(path / "features.pt") for path in (folder, tmp_path / "again", tmp_path / "other")]
    images, _ = data.load(folder / "test.npz").batch(torch.arange(16))
    features = [network(images)[0] for network in networks]
    assert torch.equal(features[0], features[1]) and not torch.allclose(features[0], features[2])
    for name in ("train.npz", "test.npz"):
        arrays = [np.load(path / name) for path in (folder, tmp_path / "again", tmp_path / "other")]
        for key in ("images", "labels"):
            assert np.array_equal(arrays[0][key], arrays[1][key]) and not np.array_equal(arrays[0][key], arrays[2][key])


def test_the_feature_network_fits(folder):
    """64 features and a logit per class, of any number of images, each by itself."""
    network = load_feature_network(folder / "features.pt")
    assert verify(network, (3, 32, 32), "features.pt") == shapes.NUM_FEATURES == 64
    images, _ = data.load(folder / "test.npz").batch(torch.arange(5))
    features, logits = network(images)
    assert features.shape == (5, 64) and logits.shape == (5, 8)
    torch.testing.assert_close(network(images[3:4])[0], features[3:4])


def test_each_class_has_its_shape():
    """Areas in units of the square around the unit circle, which every shape fits; the centre is covered or is not."""
    points = (np.arange(400) + 0.5) / 200 - 1
    u, v = np.meshgrid(points, points)
    a, pi = np.cos(np.pi / 5), np.pi
    areas = {
        "circle": pi * 0.9**2,
        "ring": pi * (1 - 0.55**2),
        "square": 1.5**2,
        "triangle": 3 * 3**0.5 / 4,
        "cross": 2 * 1.9 * 0.52 - 0.52**2,
        "star": 5 * 0.42 * (1 - a**2) ** 0.5,
        "bar": 1.9 * 0.6,
    }
    for label, name in enumerate(shapes.CLASSES):
        covered = shapes.inside(label, u[None], v[None])[0]
        assert not covered[np.hypot(u, v) > 1.07].any()  # the square's corners
        assert covered[200, 200] == (name not in ("ring", "crescent")), name
        if name != "crescent":
            assert covered.mean() * 4 == pytest.approx(areas[name], rel=0.01), name
        assert np.array_equal(covered, covered[:, ::-1]) == (name != "crescent"), name


def test_images_are_plain_but_for_the_edge():
    """Few shapes touch the border; in an image of two flat colours every pixel is one of them or between."""
    images, _ = shapes.draw(400, np.random.default_rng(0))
    flat = images[(images[:, 0, 0] == images[:, -1, 0]).all(-1) & (images[:, 0, 0] == images[:, 0, -1]).all(-1)]
    assert 0.4 < len(flat) / len(images) < 0.6
    difference = abs(flat.astype(int) - flat[:, :1, :1]).sum(-1)  # [N, 32, 32]
    largest = difference.max((1, 2))
    touches = [(difference[:, [0, -1]] > 0).any((1, 2)), (difference[:, :, [0, -1]] > 0).any((1, 2))]
    assert (largest > 60).all() and 0 < np.mean(touches) < 0.1
    inner = difference > largest[:, None, None] - 3  # roundings of three channels
    assert (inner.sum((1, 2)) / (difference > 0).sum((1, 2)) > 0.3).all()
    assert len(np.unique(flat[:, 0, 0], axis=0)) == len(flat)


@pytest.mark.parametrize(("flag", "least"), [("num-train", 8), ("num-test", 8), ("iterations", 1), ("seed", 0)])
def test_too_few(tmp_path, flag, least, capsys):
    with pytest.raises(SystemExit) as exit:
        shapes.main(tmp_path / "shapes", **{flag.replace("-", "_"): least - 1})
    assert exit.value.code == 2 and not any(tmp_path.iterdir())
    line = f"examples/shapes.py: error: expected --{flag} of at least {least}, got {least - 1}\n"
    assert capsys.readouterr().err == line
