"""What is said of a cell from the predictions of its seeds: its numbers, and three tables. Imports no torch.

`cell` has the predictions of each seed, on the same N test samples of K classes; `counts_K` are training images per
class; `names` are the K names of the classes.
"""

from typing import Any

import numpy as np
import pandas as pd

from tailcal import posthoc
from tailcal.longtail import shot_groups
from tailcal.metrics.accuracy import per_class_accuracy
from tailcal.metrics.calibration import reliability_bins
from tailcal.metrics.cell import measure, over_seeds
from tailcal.metrics.scores import softmax
from tailcal.predictions import Predictions


def metrics(cell: list[Predictions], counts_K: np.ndarray, rules: dict[str, Any], bins: int) -> dict[str, Any]:
    """The cell's numbers over seeds, as trained and after each post-hoc rule; `transductive` is said of a rule.

    `rules` are those of `posthoc.configure`.
    """
    runs = []
    for run in cell:
        fitted = posthoc.fit(rules, posthoc.Holdout(counts_K, run.holdout_logits, run.holdout_labels))
        runs.append(
            {
                name: measure(rule(run.test_logits), run.test_labels, counts_K, bins) | rule.numbers
                for name, rule in fitted.items()
            }
        )
    after = {
        name: over_seeds([run[name] for run in runs]) | {"transductive": posthoc.RULES[name].transductive}
        for name in runs[0]
    }
    absent = {name: "fitted on held-out data, and this data set holds none out" for name in rules if name not in after}
    as_trained = over_seeds([measure(run.test_logits, run.test_labels, counts_K, bins) for run in cell])
    return as_trained | {"seeds": len(cell), "posthoc": after, "posthoc_absent": absent}


def reliability_table(cell: list[Predictions], seeds: list[int], bins: int) -> pd.DataFrame:
    """One block of `bins` rows per seed."""
    blocks = []
    for seed, run in zip(seeds, cell, strict=True):
        diagram = reliability_bins(softmax(run.test_logits), run.test_labels, bins)
        blocks.append(
            pd.DataFrame(
                {
                    "seed": seed,
                    "bin_lower": diagram.lower,
                    "bin_upper": diagram.upper,
                    "confidence": diagram.confidence,
                    "accuracy": diagram.accuracy,
                    "count": diagram.count,
                    "gap": diagram.gap,
                }
            )
        )
    return pd.concat(blocks, ignore_index=True)


def per_class_table(cell: list[Predictions], names: list[str], counts_K: np.ndarray) -> pd.DataFrame:
    """One row per class: its accuracy over seeds, its shot group, and the images behind both."""
    accuracy_SK = np.stack([per_class_accuracy(run.test_logits, run.test_labels) for run in cell])
    groups = shot_groups(counts_K)
    return pd.DataFrame(
        {
            "class": np.arange(len(names)),
            "name": names,
            "train_count": counts_K,
            "group": np.select(list(groups.values()), list(groups), default=""),
            "accuracy": accuracy_SK.mean(axis=0),
            "accuracy_std": accuracy_SK.std(axis=0, ddof=1) if len(cell) > 1 else np.nan,
            "test_count": np.bincount(cell[0].test_labels, minlength=len(names)),
        }
    )


def confusion_table(cell: list[Predictions], names: list[str]) -> pd.DataFrame:
    """How often, over all seeds, a class was taken for another or itself: one row for each pair that occurs.

    Most of the K x K pairs of many classes do not: with all, the file would grow to gigabytes.
    """
    pairs = [np.stack([run.test_labels, run.test_logits.argmax(axis=1)]) for run in cell]
    (actual, predicted), counts = np.unique(np.concatenate(pairs, axis=1), axis=1, return_counts=True)
    names_K = np.array(names, dtype=object)
    return pd.DataFrame({"actual": names_K[actual], "predicted": names_K[predicted], "count": counts})
