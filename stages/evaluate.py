"""Measure one cell of the grid from its saved predictions: metrics, reliability diagram, per-class table, confusion.

It measures saved predictions, so a new metric or post-hoc rule retrains nothing. The records of earlier stages it reads
only to check that the predictions belong to them; these are no deps. Imports no torch.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages import paths
from tailcal import errors, files, lineage, lock, params, posthoc, predictions, splits
from tailcal.cell import CellName
from tailcal.errors import UserError
from tailcal.longtail import shot_groups
from tailcal.metrics.accuracy import per_class_accuracy
from tailcal.metrics.calibration import reliability_bins
from tailcal.metrics.cell import HEADLINE, measure, over_seeds
from tailcal.metrics.scores import softmax
from tailcal.predictions import Predictions


def read_cell(folder: Path, checksums: dict[str, str], seeds: list[int], K: int) -> list[Predictions]:
    """The predictions of every seed; all seeds must have been tested on the same samples."""
    cell = [predictions.read(folder / f"seed{seed}.npz", checksums.get(f"seed{seed}.npz"), K) for seed in seeds]
    for seed, run in zip(seeds, cell, strict=True):
        if not np.array_equal(run.test_labels, cell[0].test_labels):
            raise UserError(
                f"{folder}/seed{seed}.npz: its test labels differ from seed {seeds[0]}'s: delete both and {files.REPRO}"
            )
        if bool(len(run.holdout_labels)) != bool(len(cell[0].holdout_labels)):
            raise UserError(
                f"{folder}/seed{seed}.npz: one of it and seed {seeds[0]}'s has a hold-out: delete both and "
                f"{files.REPRO}"
            )
    return cell


def metrics(cell: list[Predictions], counts_K: np.ndarray, rules: dict[str, Any], bins: int) -> dict[str, Any]:
    """The cell's numbers over seeds, as trained and after each post-hoc rule; `transductive` is said of a rule."""
    runs = []
    for run in cell:
        fitted = posthoc.fit(rules, counts_K, run.holdout_logits, run.holdout_labels)
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
    """One block of `bins` rows a seed."""
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


def write_table(path: Path, table: pd.DataFrame) -> None:
    """The table as CSV: six decimals, an empty cell where there is no number."""
    files.write_text(path, table.round(6).to_csv(index=False, lineterminator="\n"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.evaluate", description=__doc__)
    for axis in CellName._fields:
        parser.add_argument(f"--{axis}", required=True, help="a name on the grid of params.yaml")
    cell = CellName(**vars(parser.parse_args(arguments)))
    p = params.load()
    dataset = params.dataset(p, cell.dataset)
    params.chosen(p.representations, cell.representation, "representations")
    params.chosen(p.classifiers, cell.classifier, "classifiers")
    outputs = [place(*cell) for place in (paths.cell_plots, paths.metrics, paths.headline)]
    with lock.alone(paths.LOCKS, *outputs):
        evaluate(p, dataset, cell)


def evaluate(p: params.Params, dataset: params.Dataset, cell: CellName) -> None:
    """Measure a cell; write its numbers, tables and diagram. Raises UserError."""
    rules = posthoc.configure(p.evaluate.posthoc)

    longtail = paths.longtail(cell.dataset)
    meta = splits.read_meta(longtail)
    splits.require_cut(longtail, meta, dataset, paths.raw(cell.dataset))
    if (labels := longtail / "train_labels.npy").exists():
        files.verify(labels, meta["checksums"].get(labels.name))
        splits.require_train_counts(longtail, meta, files.read_array(labels))
    names, counts_K = meta["class_names"], np.array(meta["train_counts"])
    folder = paths.predictions(*cell)
    made = folder / "provenance.json"
    provenance = files.read_json(made)
    record = params.recorded(lineage.Predicted, provenance, made)
    lineage.require_images(record, folder, cell, meta, longtail)
    lineage.require_cell(record, folder, cell, paths.representation(*cell[:2]))
    lineage.require_seeds(record.checksums, p.seeds, folder, lineage.again(calibrate=cell))
    runs = read_cell(folder, provenance.pop("checksums"), p.seeds, len(names))

    plots = paths.cell_plots(*cell)
    write_table(plots / "reliability.csv", reliability_table(runs, p.seeds, p.evaluate.bins))
    write_table(plots / "per_class.csv", per_class_table(runs, names, counts_K))
    write_table(plots / "confusion.csv", confusion_table(runs, names))
    numbers = metrics(runs, counts_K, rules, p.evaluate.bins)
    about = {
        "images": {key: meta[key] for key in ("skipped", "duplicates")},
        "provenance": provenance | {"evaluate": p.evaluate.model_dump(), "seeds": p.seeds},
    }
    files.write_json(paths.metrics(*cell), numbers | about)
    files.write_json(paths.headline(*cell), {name: numbers[name] for name in HEADLINE})

    from tailcal import figures  # matplotlib: a bad input is reported before it is loaded

    diagram = pd.read_csv(plots / "reliability.csv")
    figures.reliability(diagram, numbers["ece_floor"], " / ".join(cell), plots / "reliability.png")


if __name__ == "__main__":
    errors.run(main)
