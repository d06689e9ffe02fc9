"""All the numbers of one cell of the grid: measured per seed, then brought together over seeds."""

import numpy as np

from tailcal.longtail import shot_groups
from tailcal.metrics.accuracy import group_accuracy, per_class_accuracy, top1, topk
from tailcal.metrics.calibration import adaptive_ece, brier, classwise_ece, ece, ece_floor, mce, nll
from tailcal.metrics.scores import softmax

Numbers = dict[str, float | None]
HEADLINE = ("top1", "few", "ece", "nll")  # the few numbers of a cell that are listed and summed up
DIGITS = 6  # of a number behind the point


def measure(logits_NK: np.ndarray, labels_N: np.ndarray, counts_K: np.ndarray, bins: int = 15) -> Numbers:
    """Every metric of one seed's test logits; `counts_K` are training images per class, which decide the shot groups.

    top5 only where K > 5. confidence is the mean of the top-1 confidence: where it is above top1, the classifier is
    overconfident on average. A number of a shot group without test samples is None. The scores of a group are those of
    the images whose true class is in it. Calibration over all images does not imply calibration within a group. Raises
    ValueError as `tailcal.metrics.scores.check` does.
    """
    numbers: Numbers = {"top1": top1(logits_NK, labels_N)}
    if logits_NK.shape[1] > 5:
        numbers["top5"] = topk(logits_NK, labels_N, k=5)
    p_NK = softmax(logits_NK)
    numbers |= {"confidence": float(p_NK.max(axis=1).mean()), "ece_floor": ece_floor(p_NK, bins)}
    numbers |= (whole := calibration(logits_NK, p_NK, labels_N, bins))
    numbers |= group_accuracy(per_class_accuracy(logits_NK, labels_N), counts_K)
    for group, mask_K in shot_groups(counts_K).items():
        of_group_N = mask_K[labels_N]
        some = logits_NK[of_group_N], p_NK[of_group_N], labels_N[of_group_N]
        found = calibration(*some, bins) if of_group_N.any() else dict.fromkeys(whole)
        numbers |= {f"{name}_{group}": value for name, value in found.items()}
    return numbers


def calibration(logits_NK: np.ndarray, p_NK: np.ndarray, labels_N: np.ndarray, bins: int) -> Numbers:
    """The calibration errors of p, the softmax of the logits, and the two proper scores, NLL and Brier."""
    return {
        "ece": ece(p_NK, labels_N, bins),
        "mce": mce(p_NK, labels_N, bins),
        "ace": adaptive_ece(p_NK, labels_N, bins),
        "classwise_ece": classwise_ece(p_NK, labels_N, bins),
        "nll": nll(logits_NK, labels_N),
        "brier": brier(p_NK, labels_N),
    }


def rounded(numbers: Numbers) -> Numbers:
    """The same to DIGITS, as they are written."""
    return {name: None if value is None else round(value, DIGITS) for name, value in numbers.items()}


def over_seeds(runs: list[Numbers]) -> Numbers:
    """Mean of each number over the seeds, and beside it <name>_std, the sample standard deviation (ddof = 1).

    The standard deviation of one seed is None, and so is a number that is None in any seed. Rounded to DIGITS.
    """
    summary: Numbers = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        known = None not in values
        summary[name] = float(np.mean(values)) if known else None
        summary[f"{name}_std"] = float(np.std(values, ddof=1)) if known and len(runs) > 1 else None
    return rounded(summary)
