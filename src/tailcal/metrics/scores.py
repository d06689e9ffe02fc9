"""Scores of samples for classes (logits or probabilities): what is accepted, and the softmax between the two."""

import numpy as np


def check(scores_NK: np.ndarray, labels_N: np.ndarray) -> None:
    """Check that `scores_NK` (one score a sample and class) and `labels_N` (true classes) can be measured together.

    Raises ValueError when there are no samples, a shape is wrong, a score is NaN or infinite, or a label is not an
    integer in 0..K-1.
    """
    scores_NK, labels_N = np.asarray(scores_NK), np.asarray(labels_N)
    if scores_NK.ndim != 2 or scores_NK.shape[1] == 0:
        raise ValueError(f"scores must have shape [samples, classes], got {list(scores_NK.shape)}")
    N, K = scores_NK.shape
    if N == 0:
        raise ValueError("there are no samples to measure")
    if labels_N.shape != (N,):
        raise ValueError(f"labels must have shape [{N}] like the scores, got {list(labels_N.shape)}")
    if not np.issubdtype(labels_N.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels_N.dtype}")
    if labels_N.min() < 0 or labels_N.max() >= K:
        raise ValueError(f"labels must lie in 0..{K - 1}, got {labels_N.min()}..{labels_N.max()}")
    if not np.issubdtype(scores_NK.dtype, np.number) or not np.isfinite(scores_NK).all():
        raise ValueError("scores must be finite numbers, got NaN, infinity or no number")


def log_softmax(logits_NK: np.ndarray) -> np.ndarray:
    """Log-probabilities [N, K] in float64, whatever the precision of the logits; a common shift cannot overflow it."""
    logits_NK = np.asarray(logits_NK, dtype=np.float64)
    shifted_NK = logits_NK - logits_NK.max(axis=1, keepdims=True)
    return shifted_NK - np.log(np.exp(shifted_NK).sum(axis=1, keepdims=True))


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    """Probabilities [N, K] in float64."""
    return np.exp(log_softmax(logits_NK))
