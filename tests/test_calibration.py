"""Calibration metrics against hand-computed numbers, a naive loop, and independent libraries."""

import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from tailcal.metrics import calibration
from tailcal.metrics.calibration import adaptive_ece, brier, classwise_ece, ece, ece_floor, mce, nll, reliability_bins
from tailcal.metrics.scores import check, log_softmax, softmax


def made_up(N: int = 2000, K: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits that favour the label, and the labels; every class occurs."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(N) % K)
    logits = generator.normal(size=(N, K)) * 2
    logits[np.arange(N), labels] += 1.5
    return logits.astype(np.float32), labels


def naive_pool(confidence: list[float], correct: list[bool], bins: int) -> list[tuple[int, float, float]]:
    """(count, mean confidence, accuracy) of each bin that is not empty, straight from the definition."""
    pooled = []
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if inside:
            n = len(inside)
            pooled.append((n, sum(confidence[i] for i in inside) / n, sum(correct[i] for i in inside) / n))
    return pooled


def naive_ece(confidence: list[float], correct: list[bool], bins: int) -> float:
    return sum(n * abs(acc - conf) for n, conf, acc in naive_pool(confidence, correct, bins)) / len(confidence)


def test_reliability_by_hand():
    # Four samples, two bins a half wide: (0, 0.5] holds the tie of the first row, (0.5, 1] the other three.
    p = np.array([[0.5, 0.5], [0.6, 0.4], [0.2, 0.8], [0.0, 1.0]])
    diagram = reliability_bins(p, np.array([0, 1, 1, 1]), bins=2)
    np.testing.assert_array_equal(diagram.lower, [0, 0.5])
    np.testing.assert_array_equal(diagram.upper, [0.5, 1])
    np.testing.assert_array_equal(diagram.count, [1, 3])
    np.testing.assert_allclose(diagram.confidence, [0.5, 0.8])
    np.testing.assert_allclose(diagram.accuracy, [1, 2 / 3])
    np.testing.assert_allclose(diagram.gap, [0.5, 2 / 3 - 0.8])
    assert ece(p, np.array([0, 1, 1, 1]), bins=2) == pytest.approx(0.25 * 0.5 + 0.75 * (0.8 - 2 / 3))
    assert mce(p, np.array([0, 1, 1, 1]), bins=2) == pytest.approx(0.5)


def test_classwise_ece_of_any_number_of_classes_at_a_time_has_the_same_bits(monkeypatch):
    logits, labels = made_up(N=300, K=11)
    found = set()
    for numbers in (1, 300, 1000, 3300, 1 << 20):  # 1, 1, 3, 11 and 11 classes
        monkeypatch.setattr(calibration, "_BLOCK", numbers)
        found.add(classwise_ece(softmax(logits), labels))
    assert len(found) == 1


def test_classwise_ece_of_many_classes_holds_less_than_its_input_again():
    probabilities = np.full((3000, 2000), 1 / 2000)  # 48 MB
    tracemalloc.start()
    try:
        classwise_ece(probabilities, np.arange(3000) % 2000)
        highest = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert highest < probabilities.nbytes


def test_an_empty_bin_is_nan_and_weighs_nothing():
    p = np.array([[0.9, 0.1], [0.9, 0.1]])
    diagram = reliability_bins(p, np.array([0, 1]))
    assert diagram.count.sum() == 2
    assert np.isnan(diagram.confidence).sum() == np.isnan(diagram.accuracy).sum() == 14
    assert ece(p, np.array([0, 1])) == mce(p, np.array([0, 1])) == pytest.approx(0.4)


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 49])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(bins):
    confidences = [b / bins for b in range(bins // 2 + 1, bins + 1)]
    p = np.array([[c, 1 - c] for c in confidences])
    occupied = np.flatnonzero(reliability_bins(p, np.zeros(len(p), int), bins).count)
    np.testing.assert_array_equal(occupied, range(bins // 2, bins))


@pytest.mark.parametrize("bins", [1, 2, 15, 100])
def test_ece_mce_classwise_equal_the_naive_loop(bins):
    logits, labels = made_up()
    p = softmax(logits)
    confidence, correct = p.max(1).tolist(), (p.argmax(1) == labels).tolist()
    assert ece(p, labels, bins) == pytest.approx(naive_ece(confidence, correct, bins), abs=1e-12)
    worst = max(abs(acc - conf) for _, conf, acc in naive_pool(confidence, correct, bins))
    assert mce(p, labels, bins) == pytest.approx(worst, abs=1e-12)
    classwise = np.mean([naive_ece(p[:, k].tolist(), (labels == k).tolist(), bins) for k in range(7)])
    assert classwise_ece(p, labels, bins) == pytest.approx(classwise, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ece_and_mce_equal_torchmetrics(seed):
    logits, labels = made_up(seed=seed)
    p = softmax(logits)
    for norm, ours in (("l1", ece), ("max", mce)):
        theirs = multiclass_calibration_error(torch.tensor(p), torch.tensor(labels), 7, n_bins=15, norm=norm)
        assert ours(p, labels) == pytest.approx(theirs.item(), abs=1e-6)


def test_brier_and_nll_equal_scikit_learn():
    logits, labels = made_up()
    p = softmax(logits)
    expected = brier_score_loss(labels, p, labels=range(7), scale_by_half=False)
    assert brier(p, labels) == pytest.approx(expected, abs=1e-12)
    assert nll(logits, labels) == pytest.approx(log_loss(labels, p, labels=range(7)), abs=1e-12)


def test_the_floor_of_the_ece_by_hand():
    """Two images of confidence 1/2: right are none, one or both, so the gap is 1/2, 0 or 1/2 in the ratio 1 : 2 : 1."""
    half = np.full((2, 2), 0.5)
    assert ece_floor(half, draws=4000) == pytest.approx(0.25, abs=0.02)
    assert ece_floor(half[:1]) == 0.5
    assert ece_floor(np.eye(3)) == 0


def test_the_floor_is_the_mean_ece_of_what_is_calibrated_and_falls_with_the_images():
    generator, floors = np.random.default_rng(0), []
    for N in (300, 3000):
        p = softmax(made_up(N)[0])
        drawn = [(p.cumsum(axis=1) < generator.random((N, 1))).sum(axis=1).clip(max=6) for _ in range(200)]
        floors.append(ece_floor(p))
        assert floors[-1] == pytest.approx(np.mean([ece(p, labels) for labels in drawn]), rel=0.1)
    assert floors[1] < floors[0] / 2.5


def test_adaptive_ece_by_hand():
    confidence = np.array([0.9, 0.6, 0.7, 0.55, 1.0, 0.8])
    p, labels = np.stack([confidence, 1 - confidence], axis=1), np.array([1, 0, 0, 1, 0, 0])
    # sorted: 0.55 wrong, 0.6 right | 0.7 right, 0.8 right | 0.9 wrong, 1.0 right
    assert adaptive_ece(p, labels, bins=3) == pytest.approx((abs(1 - 1.15) + abs(2 - 1.5) + abs(1 - 1.9)) / 6)
    assert adaptive_ece(p, labels, bins=1) == pytest.approx(abs(4 - 4.55) / 6)


def test_adaptive_ece_equals_sorted_slices():
    p = softmax(made_up(N=1999)[0])
    # Each label is drawn from its own probabilities, so that bins are off in either direction.
    labels = (p.cumsum(axis=1) < np.random.default_rng(1).random((1999, 1))).sum(axis=1).clip(max=6)
    order = p.max(1).argsort()
    slice_of = np.arange(1999) * 15 // 1999
    correct = p.argmax(1) == labels
    expected = sum(abs(correct[s].sum() - p.max(1)[s].sum()) for b in range(15) for s in [order[slice_of == b]]) / 1999
    assert expected > 2 * abs(correct.mean() - p.max(1).mean())  # what one bin would give
    assert adaptive_ece(p, labels) == pytest.approx(expected, abs=1e-12)
    assert np.bincount(slice_of).max() - np.bincount(slice_of).min() <= 1


def test_adaptive_ece_keeps_ties_together_so_that_order_is_nothing():
    p = np.tile([0.9, 0.1], (30, 1))
    labels = np.repeat([0, 1], [20, 10])
    assert adaptive_ece(p, labels) == adaptive_ece(p, labels[::-1]) == pytest.approx(0.9 - 20 / 30)


def test_limits():
    labels = np.arange(30) % 3
    sure_and_right, sure_and_wrong, uniform = np.eye(3)[labels], np.eye(3)[(labels + 1) % 3], np.full((30, 3), 1 / 3)
    for metric in (ece, mce, adaptive_ece, classwise_ece, brier):
        assert metric(sure_and_right, labels) == 0
    for metric in (ece, mce, adaptive_ece):
        assert metric(sure_and_wrong, labels) == 1
        assert metric(uniform, labels) == pytest.approx(0, abs=1e-12)
    assert brier(sure_and_wrong, labels) == 2
    assert nll(np.zeros((30, 3)), labels) == pytest.approx(np.log(3))


def test_nll_of_a_confident_mistake_is_large_and_finite():
    assert nll(np.array([[2000.0, 0.0]], np.float32), np.array([1])) == pytest.approx(2000)
    assert nll(np.array([[2000.0, 0.0]], np.float32), np.array([0])) == 0


def test_softmax_is_float64_shift_free_and_a_distribution():
    logits, _ = made_up()
    p = softmax(logits)
    assert p.dtype == np.float64
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(softmax(logits.astype(np.float64) + 1e4), p, atol=1e-10)
    np.testing.assert_allclose(log_softmax(logits), torch.log_softmax(torch.tensor(logits).double(), 1), atol=1e-12)


GOOD = np.array([[0.5, 0.5], [0.25, 0.75]])


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        (GOOD[0], [0, 1], r"shape \[samples, classes\], got \[2\]"),
        (GOOD[:0], np.zeros(0, int), "no samples"),
        (GOOD, [0, 1, 1], r"labels must have shape \[2\] like the scores, got \[3\]"),
        (GOOD, [0.0, 1.0], "labels must be integers, got float64"),
        (GOOD, [0, 2], r"labels must lie in 0\.\.1, got 0\.\.2"),
        (GOOD, [-1, 1], r"labels must lie in 0\.\.1, got -1\.\.1"),
        (GOOD * np.nan, [0, 1], "finite"),
        (GOOD * 2, [0, 1], "must sum to 1, got 2: are these logits"),
        (np.array([[0.5, 0.5], [0.25, 0.25], [0.25, 0.75]]), [0, 1, 1], "must sum to 1, got 0.5"),
        (np.array([[1.5, -0.5]]), [0], "must not be negative, got -0.5"),
    ],
)
def test_bad_input_is_refused_with_its_reason(p, labels, message):
    for metric in (reliability_bins, ece, mce, adaptive_ece, classwise_ece, brier):
        with pytest.raises(ValueError, match=message):
            metric(p, np.array(labels))


@pytest.mark.parametrize("scores", [[["1", "0"]], [[True, False]], [[None, 1.0]]])
def test_scores_that_are_no_numbers_are_refused(scores):
    with pytest.raises(ValueError, match="no number"):
        check(np.array(scores), np.array([0]))


@pytest.mark.parametrize("metric", [reliability_bins, ece, mce, adaptive_ece, classwise_ece])
def test_no_bins_is_refused(metric):
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        metric(GOOD, np.array([0, 1]), bins=0)


def test_nll_refuses_infinite_logits():
    with pytest.raises(ValueError, match="finite"):
        nll(np.array([[np.inf, 0]]), np.array([0]))
