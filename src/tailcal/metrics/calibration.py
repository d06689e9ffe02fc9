"""Calibration: does a confidence of 0.8 come true eight times in ten?

Everything with bins rests on one definition, `_pool`: the mean confidence and the accuracy of each bin.

The bins of the ECE are those of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2: B
equal-width bins (0, 1/B], ..., ((B-1)/B, 1] on the confidence of the predicted class. All results are fractions in
[0, 1], except the Brier score (0 to 2) and the NLL (nats).
"""

from dataclasses import dataclass

import numpy as np

from tailcal.metrics.scores import check, log_softmax

# float32 probabilities over some thousand classes still sum to 1 within this.
_SUM_TOLERANCE = 1e-4
_BLOCK = 1 << 20  # probabilities that are binned at a time: of all N x K, several copies would be held


@dataclass(frozen=True)
class Bins:
    """A reliability diagram as numbers, each array [B]; confidence and accuracy are NaN where a bin is empty."""

    lower: np.ndarray
    upper: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """Accuracy minus confidence [B]: below 0 where the predictions are over-confident."""
        return self.accuracy - self.confidence


def reliability_bins(probabilities_NK: np.ndarray, labels_N: np.ndarray, bins: int = 15) -> Bins:
    """Accuracy against top-1 confidence in equal-width bins (lower, upper] (Guo et al. 2017, section 2).

    Raises ValueError when the input is empty or misshapen, a row is no distribution, a label is out of range, or
    `bins` is below 1.
    """
    confidence_N, correct_N = _top1(probabilities_NK, labels_N)
    edges = _edges(bins)
    count, confidence, accuracy = _pool(_bin_of(confidence_N, edges), confidence_N, correct_N, bins)
    return Bins(edges[:-1], edges[1:], confidence, accuracy, count)


def ece(probabilities_NK: np.ndarray, labels_N: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error, sum_b |B_b|/N |acc_b - conf_b| (Guo et al. 2017, eq. 3).

    Errors: as `reliability_bins`.
    """
    diagram = reliability_bins(probabilities_NK, labels_N, bins)
    return _mean_gap(diagram.count, diagram.confidence, diagram.accuracy)


def ece_floor(probabilities_NK: np.ndarray, bins: int = 15, draws: int = 200) -> float:
    """The ECE that these probabilities would have, on average, if they were perfectly calibrated.

    It is above 0, since so many images fill the bins with a chance of their own: each prediction is right with the
    probability that is its confidence, in `draws` imagined test splits. An ECE near it is no sign of miscalibration
    (compare Vaicenavicius et al., AISTATS 2019). Errors: as `reliability_bins`.
    """
    confidence_N, _ = _top1(probabilities_NK, np.zeros(len(probabilities_NK), np.int64))
    bin_N, generator = _bin_of(confidence_N, _edges(bins)), np.random.default_rng(0)
    imagined = (generator.random(len(confidence_N)) < confidence_N for _ in range(draws))
    return float(np.mean([_mean_gap(*_pool(bin_N, confidence_N, correct_N, bins)) for correct_N in imagined]))


def mce(probabilities_NK: np.ndarray, labels_N: np.ndarray, bins: int = 15) -> float:
    """Maximum calibration error, max_b |acc_b - conf_b| (Guo et al. 2017, eq. 5). Errors: as `reliability_bins`."""
    return float(np.nanmax(np.abs(reliability_bins(probabilities_NK, labels_N, bins).gap)))


def adaptive_ece(probabilities_NK: np.ndarray, labels_N: np.ndarray, bins: int = 15) -> float:
    """The ECE over equal-mass bins of the top-1 confidence (Nguyen & O'Connor 2015; Nixon et al., CVPR-W 2019).

    Bin sizes differ by one at most, except that samples of equal confidence share a bin: the result depends on no
    order. Errors: as `reliability_bins`.
    """
    _check_bins(bins)
    confidence_N, correct_N = _top1(probabilities_NK, labels_N)
    rank_N = np.searchsorted(np.sort(confidence_N), confidence_N)
    return _mean_gap(*_pool(rank_N * bins // len(rank_N), confidence_N, correct_N, bins))


def classwise_ece(probabilities_NK: np.ndarray, labels_N: np.ndarray, bins: int = 15) -> float:
    """The ECE of each class's own probability against that class's frequency, averaged over the K classes.

    1/K sum_k sum_b |B_bk|/N |freq_bk - prob_bk| (Kull et al., NeurIPS 2019). A probability of exactly 0 joins the
    first bin. Errors: as `reliability_bins`.
    """
    probabilities_NK = _distributions(probabilities_NK, labels_N)
    labels_N, edges = np.asarray(labels_N), _edges(bins)
    N, K = probabilities_NK.shape
    size, pooled = max(1, _BLOCK // N), []  # classes at a time, called J
    for first in range(0, K, size):
        p_NJ = probabilities_NK[:, first : first + size]
        classes_J = np.arange(p_NJ.shape[1])
        # Class j's bins are the cells j B .. (j+1) B - 1 of one long histogram.
        cell_NJ = _bin_of(p_NJ, edges) + classes_J * bins
        came_true_NJ = labels_N[:, None] == first + classes_J
        pooled.append(_pool(cell_NJ.ravel(), p_NJ.ravel(), came_true_NJ.ravel(), len(classes_J) * bins))
    # Each sample stands in every class's histogram once, so weights |B|/(N K) are the mean over classes.
    return _mean_gap(*(np.concatenate(parts) for parts in zip(*pooled, strict=True)))


def brier(probabilities_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Brier score, 1/N sum_i sum_k (p_ik - 1[k = y_i])^2, in 0..2 (Brier 1950). Errors: as `reliability_bins`."""
    probabilities_NK = _distributions(probabilities_NK, labels_N)
    of_label_N = np.take_along_axis(probabilities_NK, np.asarray(labels_N)[:, None], axis=1)[:, 0]
    return float(np.mean(np.square(probabilities_NK).sum(axis=1) - 2 * of_label_N + 1))


def nll(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Negative log-likelihood in nats, -1/N sum_i log softmax(z_i)_{y_i}.

    From logits, not probabilities: a confident mistake then costs what it should, where a probability that was
    rounded to 0 would cost infinity. Raises ValueError when the input is empty, misshapen or not finite, or a label
    is out of range.
    """
    check(logits_NK, labels_N)
    return float(-np.take_along_axis(log_softmax(logits_NK), np.asarray(labels_N)[:, None], axis=1).mean())


def _distributions(probabilities_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """The probabilities as float64, once they are known to be distributions."""
    check(probabilities_NK, labels_N)
    probabilities_NK = np.asarray(probabilities_NK, dtype=np.float64)
    if probabilities_NK.min() < 0:
        raise ValueError(f"probabilities must not be negative, got {probabilities_NK.min():g}")
    sum_N = probabilities_NK.sum(axis=1)
    worst = sum_N[np.abs(sum_N - 1).argmax()]
    if abs(worst - 1) > _SUM_TOLERANCE:
        raise ValueError(f"each row of probabilities must sum to 1, got {worst:g}: are these logits?")
    return probabilities_NK


def _top1(probabilities_NK: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of the predicted class, and whether that class is the label, each [N]."""
    probabilities_NK = _distributions(probabilities_NK, labels_N)
    return probabilities_NK.max(axis=1), probabilities_NK.argmax(axis=1) == labels_N


def _check_bins(bins: int) -> None:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")


def _edges(bins: int) -> np.ndarray:
    """The B + 1 edges of equal-width bins on [0, 1]."""
    _check_bins(bins)
    return np.arange(bins + 1) / bins


def _bin_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Index of the bin (lower, upper] each value lies in; 0 joins the first bin, a rounding above 1 the last."""
    return np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 2)


def _pool(
    bin_M: np.ndarray, confidence_M: np.ndarray, correct_M: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean confidence and accuracy of each bin, each [bins]; the means of an empty bin are NaN."""
    count = np.bincount(bin_M, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bin_M, weights=confidence_M, minlength=bins) / count
        accuracy = np.bincount(bin_M, weights=correct_M, minlength=bins) / count
    return count, confidence, accuracy


def _mean_gap(count: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray) -> float:
    """|accuracy - confidence| averaged over the pooled samples."""
    return float(np.nansum(count * np.abs(accuracy - confidence)) / count.sum())
