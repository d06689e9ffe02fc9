"""Accuracy metrics against hand-computed numbers, scikit-learn, and their own limits; and how a cell is summed up."""

import numpy as np
import pytest
from sklearn.metrics import recall_score, top_k_accuracy_score

from tailcal.metrics.accuracy import group_accuracy, per_class_accuracy, top1, topk
from tailcal.metrics.calibration import adaptive_ece, brier, classwise_ece, ece, mce, nll
from tailcal.metrics.cell import measure, over_seeds
from tailcal.metrics.scores import softmax

# Predictions 0, 0, 1, 2, 1 for labels 0, 0, 0, 1, 1.
SCORES = np.array([[3.0, 2, 1, 0], [3, 1, 2, 0], [2, 3, 1, 0], [1, 2, 3, 0], [0, 3, 1, 2]])
LABELS = np.array([0, 0, 0, 1, 1])


def test_by_hand():
    assert top1(SCORES, LABELS) == 3 / 5
    assert topk(SCORES, LABELS, k=2) == 1
    np.testing.assert_array_equal(per_class_accuracy(SCORES, LABELS), [2 / 3, 1 / 2, np.nan, np.nan])


def test_equal_scikit_learn():
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(500, 9)), generator.integers(0, 9, 500)
    for k in range(1, 9):
        assert topk(scores, labels, k) == top_k_accuracy_score(labels, scores, k=k, labels=range(9))
    expected = recall_score(labels, scores.argmax(1), average=None)
    np.testing.assert_array_equal(per_class_accuracy(scores, labels), expected)


def test_ties_are_broken_as_argmax_breaks_them():
    scores, labels = np.zeros((4, 4)), np.arange(4)
    assert top1(scores, labels) == np.mean(scores.argmax(1) == labels) == 1 / 4
    assert [topk(scores, labels, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1]


def test_top_k_limits():
    assert topk(SCORES, LABELS, k=4) == 1
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k must lie in 1\.\.4, got {k}"):
            topk(SCORES, LABELS, k)


def test_shot_groups_at_their_borders():
    counts = np.array([101, 100, 20, 19])
    groups = group_accuracy(np.array([0.1, 0.2, 0.4, 0.8]), counts)
    assert groups == pytest.approx({"many": 0.1, "medium": 0.3, "few": 0.8})


def test_an_empty_group_is_none_and_an_unmeasured_class_is_left_out():
    assert group_accuracy(np.array([0.5, 1.0, np.nan]), np.array([200, 150, 110])) == {
        "many": 0.75,
        "medium": None,
        "few": None,
    }
    assert group_accuracy(np.array([0.5, np.nan]), np.array([200, 5]))["few"] is None


def test_group_accuracy_refuses_other_counts():
    with pytest.raises(ValueError, match="2 accuracies, but training counts of 3 classes"):
        group_accuracy(np.zeros(2), np.ones(3))


@pytest.mark.parametrize("metric", [top1, per_class_accuracy])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (SCORES[:0], LABELS[:0], "no samples"),
        (SCORES[0], LABELS, "shape"),
        (SCORES, LABELS[:2], r"labels must have shape \[5\]"),
        (SCORES, LABELS + 3, r"labels must lie in 0\.\.3, got 3\.\.4"),
        (SCORES * np.nan, LABELS, "finite"),
    ],
)
def test_bad_input_is_refused_with_its_reason(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, labels)


def test_a_cell_is_measured_by_group_on_the_samples_of_its_classes():
    numbers = measure(SCORES, LABELS, np.array([300, 50, 5, 4]))
    first = LABELS == 0
    assert "top5" not in numbers
    assert (numbers["top1"], numbers["many"], numbers["medium"], numbers["few"]) == (3 / 5, 2 / 3, 1 / 2, None)
    assert numbers["ece_many"] == ece(softmax(SCORES[first]), LABELS[first])
    assert numbers["mce_many"] == mce(softmax(SCORES[first]), LABELS[first])
    assert numbers["ace_many"] == adaptive_ece(softmax(SCORES[first]), LABELS[first])
    assert numbers["classwise_ece_many"] == classwise_ece(softmax(SCORES[first]), LABELS[first])
    assert numbers["nll_many"] == nll(SCORES[first], LABELS[first])
    assert numbers["brier_medium"] == brier(softmax(SCORES[~first]), LABELS[~first])
    assert numbers["ece_few"] is numbers["nll_few"] is numbers["brier_few"] is None


def test_top5_is_of_the_five_highest():
    scores = np.tile(np.arange(7.0, 0, -1), (7, 1))  # label k has the rank k + 1
    assert measure(scores, np.arange(7), np.full(7, 30))["top5"] == topk(scores, np.arange(7)) == 5 / 7


def test_top5_needs_more_than_five_classes():
    labels = np.arange(6)
    assert measure(np.eye(6), labels, np.full(6, 30))["top5"] == 1
    assert "top5" not in measure(np.eye(5), labels[:5], np.full(5, 30))


def test_over_seeds_by_hand():
    runs = [{"top1": 0.5, "few": None}, {"top1": 0.7, "few": None}]
    assert over_seeds(runs) == {"top1": 0.6, "top1_std": 0.141421, "few": None, "few_std": None}
    assert over_seeds(runs[:1]) == {"top1": 0.5, "top1_std": None, "few": None, "few_std": None}
