"""Accuracy: overall, by class, and by shot group. All results are fractions in [0, 1].

Scores may be logits or probabilities: only their order within a sample counts. Where scores tie, the lower class
index is the prediction, as in argmax.
"""

import numpy as np

from tailcal.longtail import shot_groups
from tailcal.metrics.scores import check


def top1(scores_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Fraction of samples whose label has the highest score. Raises ValueError on input that `check` refuses."""
    return topk(scores_NK, labels_N, k=1)


def topk(scores_NK: np.ndarray, labels_N: np.ndarray, k: int = 5) -> float:
    """Fraction of samples whose label is among the k highest scores.

    Raises ValueError when k is not in 1..K, or on input that `check` refuses.
    """
    check(scores_NK, labels_N)
    scores_NK, labels_N = np.asarray(scores_NK), np.asarray(labels_N)
    K = scores_NK.shape[1]
    if not 1 <= k <= K:
        raise ValueError(f"k must lie in 1..{K}, got {k}")
    of_label_N1 = np.take_along_axis(scores_NK, labels_N[:, None], axis=1)
    tied_before_NK = (scores_NK == of_label_N1) & (np.arange(K) < labels_N[:, None])
    rank_N = ((scores_NK > of_label_N1) | tied_before_NK).sum(axis=1)
    return float(np.mean(rank_N < k))


def per_class_accuracy(scores_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Accuracy of each class [K]; NaN for a class without samples. Raises ValueError as `check` does."""
    check(scores_NK, labels_N)
    labels_N, K = np.asarray(labels_N), np.shape(scores_NK)[1]
    right_K = np.bincount(labels_N[np.argmax(scores_NK, axis=1) == labels_N], minlength=K)
    with np.errstate(invalid="ignore"):
        return right_K / np.bincount(labels_N, minlength=K)


def group_accuracy(accuracy_K: np.ndarray, counts_K: np.ndarray) -> dict[str, float | None]:
    """Mean of the per-class accuracies in each shot group; None for a group in which no class was measured.

    `counts_K` are the training images of each class: they decide the group. Raises ValueError when the two differ in
    length.
    """
    accuracy_K, counts_K = np.asarray(accuracy_K), np.asarray(counts_K)
    if accuracy_K.shape != counts_K.shape:
        raise ValueError(f"{len(accuracy_K)} accuracies, but training counts of {len(counts_K)} classes")
    measured_K = ~np.isnan(accuracy_K)
    return {
        group: float(accuracy_K[mask_K & measured_K].mean()) if (mask_K & measured_K).any() else None
        for group, mask_K in shot_groups(counts_K).items()
    }
