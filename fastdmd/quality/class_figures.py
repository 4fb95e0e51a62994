"""What classes tell of images: how sure a classifier is of each and how even over all, and variety within a class."""

from __future__ import annotations

import torch
from torch import Tensor


def classifier_score(logits: Tensor) -> float:
    """``exp(mean_x KL(p(y | x) || p(y)))``, with p(y) the mean of p(y | x) over all images: 1 to K, more is better.

    With the logits of Inception this is the Inception score (Salimans et al. 2016, section 4), of all images at once
    instead of ten parts.

    Args:
        logits: [N, K], floating point, finite.

    Raises ValueError for another shape or no image.
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise _error("classifier_score", "logits (N, K)", tuple(logits.shape))
    log_posterior = logits.double().log_softmax(1)
    posterior = log_posterior.exp()
    marginal = posterior.mean(0)
    divergence = (posterior * log_posterior).sum(1).mean() - torch.special.xlogy(marginal, marginal).sum()
    return divergence.exp().item()


def class_variance(features: Tensor, labels: Tensor) -> float | None:
    """The mean over classes of the total variance of a class: ``mean_c tr(S_c)``, S_c the covariance of its features.

    Unbiased, in float64. A class whose images are all alike counts 0, whatever the others do.

    Args:
        features: [N, D], floating point, finite.
        labels: [N], any integers.

    Returns None where no class has two images; those with one are left out. Raises ValueError for other shapes.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise _error("class_variance", "features (N, D), labels (N,)", (tuple(features.shape), tuple(labels.shape)))
    classes = (features[labels == label] for label in labels.unique())
    variances = [part.double().var(0).sum() for part in classes if len(part) > 1]
    return torch.stack(variances).mean().item() if variances else None


def _error(function: str, expected: str, got: object) -> ValueError:
    return ValueError(f"fastdmd.{function}: expected {expected}, got {got}")
