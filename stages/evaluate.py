"""Measure one cell of the grid from its saved predictions: metrics, reliability diagram, per-class table, confusion.

It measures saved predictions, so a new metric or post-hoc rule retrains nothing. The records of earlier stages it reads
only to check that the predictions belong to them; these are no deps. Imports no torch.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from stages import paths
from tailcal import errors, evaluation, files, lineage, lock, params, posthoc, predictions, splits
from tailcal.cell import CellName
from tailcal.metrics.cell import HEADLINE


def write_table(path: Path, table: pd.DataFrame) -> None:
    """The table as CSV: six decimals, an empty cell where there is no number."""
    files.write_text(path, table.round(6).to_csv(index=False, lineterminator="\n"))


def main(arguments: list[str] | None = None) -> None:
    parser = errors.CommandLine("stages.evaluate", __doc__)
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
        files.verify(labels, meta.checksums.get(labels.name))
        splits.require_train_counts(longtail, meta, files.read_array(labels))
    names, counts_K = meta.class_names, np.array(meta.train_counts)
    folder = paths.predictions(*cell)
    made = folder / "provenance.json"
    provenance = files.read_json(made)
    record = params.recorded(lineage.Predicted, provenance, made)
    lineage.require_images(record, folder, cell, meta.checksums, longtail)
    lineage.require_cell(record, folder, cell, paths.representation(*cell[:2]))
    lineage.require_seeds(record.checksums, p.seeds, folder, lineage.again(calibrate=cell))
    runs = predictions.read_seeds(folder, provenance.pop("checksums"), p.seeds, len(names))

    plots = paths.cell_plots(*cell)
    write_table(plots / "reliability.csv", evaluation.reliability_table(runs, p.seeds, p.evaluate.bins))
    write_table(plots / "per_class.csv", evaluation.per_class_table(runs, names, counts_K))
    write_table(plots / "confusion.csv", evaluation.confusion_table(runs, names))
    numbers = evaluation.metrics(runs, counts_K, rules, p.evaluate.bins)
    about = {
        "images": meta.model_dump(include={"skipped", "duplicates"}),
        "provenance": provenance | {"evaluate": p.evaluate.model_dump(), "seeds": p.seeds},
    }
    files.write_json(paths.metrics(*cell), numbers | about)
    files.write_json(paths.headline(*cell), {name: numbers[name] for name in HEADLINE})

    from tailcal import figures  # matplotlib: a bad input is reported before it is loaded

    diagram = pd.read_csv(plots / "reliability.csv")
    figures.reliability(diagram, numbers["ece_floor"], " / ".join(cell), plots / "reliability.png")


if __name__ == "__main__":
    errors.run(main)
