"""Classifier score and variance within classes, against numpy and against what is known of some sets."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from fastdmd.quality.class_figures import class_variance, classifier_score


@pytest.mark.parametrize("num_classes", [1, 2, 10])
def test_the_score_is_the_mean_divergence_from_the_mean(num_classes):
    logits = 3 * np.random.default_rng(num_classes).normal(size=(50, num_classes))
    posterior = scipy.special.softmax(logits, axis=1)
    divergences = [scipy.stats.entropy(row, posterior.mean(0)) for row in posterior]
    assert classifier_score(torch.from_numpy(logits)) == pytest.approx(np.exp(np.mean(divergences)), rel=1e-12)


def test_scores_of_which_the_answer_is_known():
    sure = 1000 * torch.eye(10)
    assert classifier_score(sure) == pytest.approx(10)  # all classes, surely: as many as there are
    assert classifier_score(sure[:4].repeat(3, 1)) == pytest.approx(4)
    assert classifier_score(sure[:1].repeat(9, 1)) == pytest.approx(1)  # one class
    assert classifier_score(torch.zeros(9, 10)) == pytest.approx(1)  # any class, for all the classifier knows
    assert classifier_score(sure[:1]) == pytest.approx(1)


def test_variance_within_classes_is_the_mean_of_traces():
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(60, 4)) * [1, 2, 3, 4] + 1e3, random.integers(0, 5, 60) * 7 - 3
    labels[0] = 999  # alone in its class
    traces = [np.cov(features[labels == label], rowvar=False).trace() for label in sorted(set(labels[1:]))]
    assert len(traces) == 5
    found = class_variance(torch.from_numpy(features), torch.from_numpy(labels))
    assert found == pytest.approx(np.mean(traces), rel=1e-10)


def test_variances_of_which_the_answer_is_known():
    features = torch.tensor([[0.0, 0], [2, 0], [5, 5], [5, 5], [9, 9]])
    assert class_variance(features, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(1.0)  # 2 and 0
    assert class_variance(features, torch.arange(5)) is None
    collapsed = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))  # one image for each class
    assert class_variance(collapsed.repeat(5, 1), torch.arange(3).repeat(5)) == 0


def test_other_shapes_are_refused():
    for logits in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match=r"^fastdmd.classifier_score: expected logits \(N, K\), got \("):
            classifier_score(logits)
    for labels in (torch.zeros(4), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=r"^fastdmd.class_variance: expected features \(N, D\), labels \(N,\), go"):
            class_variance(torch.zeros(3, 2), labels)
