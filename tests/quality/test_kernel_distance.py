"""The kernel distance against its formula, written out, and against what it is on average."""

import numpy as np
import pytest
import torch

from fastdmd.quality.kernel_distance import kernel_distance


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_formula(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    m = len(a)
    within = sum(kernel(side[i], side[j]) for side in (a, b) for i in range(m) for j in range(m) if i != j)
    return within / (m * (m - 1)) - 2 * np.mean([kernel(x, y) for x in a for y in b])


@pytest.mark.parametrize("num_features", [1, 3, 20])
def test_of_all_images_it_is_the_formula(num_features):
    random = np.random.default_rng(num_features)
    a, b = random.normal(size=(12, num_features)), random.normal(size=(12, num_features)) + 0.5
    found = kernel_distance(torch.from_numpy(a), torch.from_numpy(b), random=seeded())
    assert found == pytest.approx(by_formula(a, b), rel=1e-10)


def test_subsets_are_drawn_from_each_side_without_replacement():
    a, b = np.arange(5.0)[:, None], np.arange(3.0)[:, None] ** 2
    of_pairs = {
        by_formula(a[[i, j]], b[[k, m]]) for i in range(5) for j in range(i) for k in range(3) for m in range(k)
    }
    found = {
        kernel_distance(torch.from_numpy(a), torch.from_numpy(b), random=seeded(seed), num_subsets=1, subset_size=2)
        for seed in range(400)
    }
    assert sorted(found) == pytest.approx(sorted(of_pairs))  # all of them, and no pair of an image with itself
    both = [kernel_distance(*map(torch.from_numpy, (a, b)), random=seeded(7), subset_size=2) for _ in range(2)]
    assert both[0] == both[1]


def test_it_is_without_bias_where_images_are_few():
    """Five images a side of one distribution: zero on average, and as far on average as of many where they differ."""
    a, b = torch.randn(2, 4000, 4, generator=seeded(), dtype=torch.float64)
    pairs = list(zip(a.split(5), b.split(5), strict=True))
    values = [kernel_distance(x, y, random=seeded(), num_subsets=1) for x, y in pairs]
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 3 * error and error < 0.1
    far = [kernel_distance(x, y + 1, random=seeded(), num_subsets=1) for x, y in pairs]
    of_many = kernel_distance(a, b + 1, random=seeded())
    assert abs(np.mean(far) - of_many) < 4 * np.std(far) / len(far) ** 0.5 < 0.15 * of_many


def test_sets_of_which_the_answer_is_known():
    a = torch.randn(300, 6, generator=seeded())
    # Of a set with itself, what a pair of the same image has too much: 2 (mean of all pairs - mean of those of equals).
    kernel = (a.double() @ a.double().T / 6 + 1) ** 3
    excess = 2 * (kernel.mean() - kernel.diagonal().mean()) / 299
    assert kernel_distance(a, a, random=seeded()) == pytest.approx(excess.item(), rel=1e-9)
    # One image over and over, at the origin, where the kernel is 1 with any: E k(a, a') + 1 - 2.
    off_diagonal = (kernel.sum() - kernel.diagonal().sum()) / (300 * 299)
    collapsed = kernel_distance(a, torch.zeros(300, 6), random=seeded())
    assert collapsed == pytest.approx(off_diagonal.item() - 1, rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ((1, 2), (9, 2), {}, "expected at least 1 subset of at least 2 images a side, got 50 of 1000 out of 1 and 9"),
        ((9, 2), (9, 2), {"subset_size": 1}, "expected at least 1 subset .*, got 50 of 1 out of 9 and 9"),
        ((9, 2), (9, 2), {"num_subsets": 0}, "expected at least 1 subset .*, got 0 of 1000 out of 9 and 9"),
        ((9, 2), (9, 3), {}, r"expected features \(N, D\) and \(M, D\), got \(9, 2\) and \(9, 3\)"),
    ],
)
def test_what_has_no_kernel_distance_is_refused(a, b, options, message):
    with pytest.raises(ValueError, match=f"^fastdmd.kernel_distance: {message}$"):
        kernel_distance(torch.zeros(a), torch.zeros(b), random=seeded(), **options)
