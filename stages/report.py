"""Collect the cells that the grid names into tables, pictures and one page. Reads files only."""

import json
from itertools import product
from pathlib import Path

import pandas as pd

from stages import paths
from tailcal import costs, evaluated, figures, lock, page, params, splits, tables
from tailcal.cell import CellName
from tailcal.errors import CommandLine, UserError, run
from tailcal.files import REPRO, write_json, write_text
from tailcal.tables import Cell

OUTPUTS = (
    paths.REPORT,
    paths.COSTS_PAGE,
    paths.TABLE,
    paths.TABLE_TEXT,
    paths.SUMMARY,
    paths.RELIABILITY,
    paths.FIGURES,
)


def main() -> None:
    with lock.alone(paths.LOCKS, *OUTPUTS):
        report()


def report() -> None:
    """Everything under metrics/ and plots/ that speaks of more than one cell."""
    p = params.load()
    grid = p.grid
    cells = {
        dataset: [
            _read_cell(CellName(dataset, representation, classifier))
            for representation, classifier in product(grid.representations, grid.classifiers)
        ]
        for dataset in grid.datasets
    }
    histories = {
        dataset: {name: evaluated.read_history(paths.representation(dataset, name)) for name in grid.representations}
        for dataset in grid.datasets
    }
    epochs = {
        dataset: [int(history["epoch"].max()) for history in group.values()] for dataset, group in histories.items()
    }
    for dataset, group in cells.items():
        _require_consistent(p, dataset, group)
    _write_numbers(cells, epochs)
    sections = [
        page.section(
            cells[dataset],
            epochs[dataset],
            _draw(cells[dataset], histories[dataset]),
            [_diagram(cell) for cell in cells[dataset]],
        )
        for dataset in grid.datasets
    ]
    write_text(paths.REPORT, page.render(grid, sections))
    write_text(
        paths.COSTS_PAGE, page.render_costs(sorted(costs.rows(paths.COSTS), key=lambda row: row["stage"], reverse=True))
    )


def _read_cell(name: CellName) -> Cell:
    return evaluated.read_cell(name, paths.metrics(*name), paths.cell_plots(*name))


def _require_consistent(p: params.Params, dataset: str, cells: list[Cell]) -> None:
    """Raise UserError when the cells of a data set are not what the parameters, their own files and those of earlier
    stages say."""
    evaluated.require_same_classes({paths.cell_plots(*cell.full_name): cell for cell in cells})
    for cell in cells:
        name = cell.full_name
        metrics = paths.metrics(*name)
        evaluated.require_current(cell, p, metrics, paths.representation(*name[:2]))
        evaluated.require_own_tables(cell, metrics, paths.cell_plots(*name))
    if (longtail := paths.longtail(dataset)).exists():
        meta = splits.read_meta(longtail)
        splits.require_cut(longtail, meta, params.dataset(p, dataset), paths.raw(dataset))
        for cell in cells:
            evaluated.require_images(cell, paths.metrics(*cell.full_name), meta.checksums, longtail)


def _write_numbers(cells: dict[str, list[Cell]], epochs: dict[str, list[int]]) -> None:
    every = [cell for group in cells.values() for cell in group]
    write_text(paths.TABLE, pd.DataFrame(tables.rows(every)).to_csv(index=False, lineterminator="\n"))
    write_text(paths.TABLE_TEXT, "\n".join(tables.markdown(group, epochs[dataset]) for dataset, group in cells.items()))
    write_json(paths.SUMMARY, {dataset: tables.summary(group) for dataset, group in cells.items()})
    # JSON, since `dvc plots` takes the numbers of a CSV for texts; one line per record, so that git shows what moved.
    records = [json.dumps(record) for cell in every for record in _records(cell)]
    write_text(paths.RELIABILITY, "[\n" + ",\n".join(records) + "\n]\n")


def _records(cell: Cell) -> list[dict]:
    bins = figures.pool(cell.bins)[["confidence", "accuracy", "count"]].round(4)
    names = {
        "dataset": cell.dataset,
        "cell": cell.name,
        "representation": cell.representation,
        "classifier": cell.classifier,
    }
    return [names | record for record in bins.to_dict("records")]


def _draw(cells: list[Cell], histories: dict[str, pd.DataFrame]) -> dict[str, Path]:
    """Draw the pictures of one data set; returns where each lies, in the order of the page."""
    dataset = cells[0].dataset
    drawn = {name: paths.FIGURES / dataset / f"{name}.png" for name in page.CAPTIONS}
    by_name = {(cell.representation, cell.classifier): cell for cell in cells}
    figures.reliability_overview(
        {key: cell.bins for key, cell in by_name.items()}, f"{dataset}: reliability of every cell", drawn["reliability"]
    )
    plain = [row for row in tables.rows(cells) if row["posthoc"] == tables.AS_TRAINED]
    figures.accuracy_against_ece(
        pd.DataFrame(plain), f"{dataset}: accuracy against calibration error", drawn["accuracy_ece"]
    )
    figures.class_counts(cells[0].classes, f"{dataset}: training images per class", drawn["class_counts"])
    figures.per_class_accuracy(
        {key: cell.classes for key, cell in by_name.items()}, f"{dataset}: accuracy of each class", drawn["per_class"]
    )
    figures.training_curves(histories, f"{dataset}: training of the representations", drawn["training"])
    return drawn


def _diagram(cell: Cell) -> Path:
    path = paths.cell_plots(*cell.full_name) / "reliability.png"
    if not path.is_file():
        raise UserError(f"{path} is missing: {REPRO}")
    if not path.read_bytes().startswith(b"\x89PNG"):
        raise UserError(f"{path} is damaged (it is no PNG): delete it and {REPRO}")
    return path


if __name__ == "__main__":
    CommandLine("stages.report", __doc__).parse_args()
    run(main)
