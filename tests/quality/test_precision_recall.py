"""Improved precision and recall against the formula, written out in float64, and against what is known of some sets."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from fastdmd.quality import precision_recall as module
from fastdmd.quality.precision_recall import precision_recall


def by_formula(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """Every ball of one set, one image of the other after another."""

    def share(images, manifold):
        radii = [np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(cdist(manifold, manifold))]
        return np.mean(
            [any(np.linalg.norm(x - m) <= radius for m, radius in zip(manifold, radii, strict=True)) for x in images]
        )

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("sizes", [(60, 40), (33, 70)])
def test_it_is_the_formula_whatever_the_chunks(k, sizes, monkeypatch):
    random = np.random.default_rng(k)
    real, fake = random.normal(size=(sizes[0], 5)), random.normal(size=(sizes[1], 5)) + 1.2
    expected = by_formula(real, fake, k)
    assert 0 < min(expected) and max(expected) < 1
    for chunk in (1000, 17, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        found = precision_recall(torch.from_numpy(real), torch.from_numpy(fake), num_neighbours=k)
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sets_of_which_the_answer_is_known(size, dtype):
    random = torch.Generator().manual_seed(0)
    real = size * torch.randn(200, 8, generator=random, dtype=dtype)
    assert precision_recall(real, real.flip(0)) == (1, 1)
    assert precision_recall(real, real + 100 * size) == (0, 0)
    # One image over and over: on the manifold of the others, of which its own, a point, holds that image alone.
    assert precision_recall(real, real[:1].expand(50, 8)) == (1, 1 / 200)
    assert precision_recall(real, real[:1].expand(50, 8) + 100 * size) == (0, 0)
    near = real[real[:, 0] > 0]
    precision, recall = precision_recall(real, near)  # half of what there is: all of it good, half of it missing
    assert precision == 1 and len(near) / 200 <= recall < 0.9


def test_images_that_are_all_the_same():
    zeros = torch.zeros(9, 3)
    assert precision_recall(zeros, zeros) == (1, 1)
    assert precision_recall(zeros, zeros + 1) == (0, 0)


@pytest.mark.parametrize(
    ("real", "fake", "k", "message"),
    [
        ((3, 2), (9, 2), 3, "expected more than 3 images a side, .*, got 3 and 9"),
        ((9, 2), (3, 2), 3, "expected more than 3 images a side, .*, got 9 and 3"),
        ((9, 2), (9, 2), 0, "expected more than 0 images a side, for as many neighbours and 1 at least, got 9 and 9"),
        ((9, 2), (9, 3), 3, r"expected features \(N, D\) and \(M, D\), got \(9, 2\) and \(9, 3\)"),
        ((9,), (9, 3), 3, r"expected features \(N, D\) and \(M, D\), got \(9,\) and \(9, 3\)"),
    ],
)
def test_what_has_no_manifold_is_refused(real, fake, k, message):
    with pytest.raises(ValueError, match=f"^fastdmd.precision_recall: {message}$"):
        precision_recall(torch.zeros(real), torch.zeros(fake), num_neighbours=k)
