"""Collect the cells that the grid names into tables, pictures and one page. Reads files only."""

import argparse
import json
from itertools import dropwhile, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import AliasPath, ConfigDict, Field, model_validator

from stages import paths
from tailcal import costs, figures, lineage, lock, page, params, settings, splits, tables
from tailcal.cell import CellName
from tailcal.errors import UserError, run
from tailcal.files import REPRO, read_json, verify, write_json, write_text
from tailcal.params import Strict
from tailcal.tables import Cell

BINS = ("seed", "bin_lower", "bin_upper", "confidence", "accuracy", "count")
CLASSES = ("class", "name", "train_count", "test_count", "group", "accuracy", "accuracy_std")
HISTORY = ("epoch", "seed", "loss", "train_accuracy")
TEXTS = {"name", "group"}  # of these columns; all others are numbers
WHOLE = {"epoch", "seed", "class", "train_count", "test_count", "count"}  # which no line lacks
ROUNDING = 1e-5  # by which a number of a cell's metrics may differ from that of the tables beside it

CONCERNS = {  # what is not as in the provenance of a cell's numbers, and the first stage that is to run again
    "params.dataset.source": "download",
    "params.dataset": "subsample",
    "params.representation": "represent",
    "seeds": "represent",
    "params.classifier": "calibrate",
    "evaluate": "evaluate",
}
DATASET = ("provenance", "params", "dataset")  # where a cell's metrics tell of the data set


class Numbers(Strict):
    """What was measured, by name: numbers, and null where there is none. `transductive` is said of a post-hoc rule."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    transductive: bool = False

    @model_validator(mode="after")
    def _no_deviation_is_negative(self) -> "Numbers":
        for name, value in self.__pydantic_extra__.items():
            if name.endswith("_std") and value is not None and value < 0:
                raise ValueError(f"{name} is {value:g}: must be 0 or more")
        return self


class Images(Strict):
    """What meta.json of the data set counts: see `splits.Meta`."""

    skipped: splits.Counts
    duplicates: splits.Counts


class Metrics(Numbers):
    """What a cell's metrics must have for the report: numbers as trained and after each post-hoc rule, what is to be
    said of the images, and of the provenance how the tail was cut and how many images are held out, which captions
    tell."""

    top1: params.Fraction
    few: params.Fraction | None
    ece: params.Fraction
    nll: Annotated[float, Field(ge=0)] | None
    seeds: Annotated[int, Field(ge=1)]
    posthoc: dict[str, Numbers]
    posthoc_absent: dict[str, str]  # why, by rule
    images: Images
    provenance: dict[str, Any]
    imbalance: params.Imbalance = Field(validation_alias=AliasPath(*DATASET, "imbalance"))
    holdout_per_class: int = Field(0, validation_alias=AliasPath(*DATASET, "holdout_per_class"))


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
            _cell(CellName(dataset, representation, classifier))
            for representation, classifier in product(grid.representations, grid.classifiers)
        ]
        for dataset in grid.datasets
    }
    histories = {
        dataset: {representation: _history(dataset, representation) for representation in grid.representations}
        for dataset in grid.datasets
    }
    epochs = {
        dataset: [int(history["epoch"].max()) for history in group.values()] for dataset, group in histories.items()
    }
    for dataset, group in cells.items():
        _require_same_classes(group)
        for cell in group:
            _require_current(p, cell)
            _require_own_tables(cell)
        if (longtail := paths.longtail(dataset)).exists():
            _require_images(p, dataset, longtail, group)
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


def _cell(name: CellName) -> Cell:
    metrics = _metrics(paths.metrics(*name))
    plots = paths.cell_plots(*name)
    bins, classes = _frame(plots / "reliability.csv", BINS), _frame(plots / "per_class.csv", CLASSES)
    return Cell(*name, metrics, bins, classes)


def _require_same_classes(cells: list[Cell]) -> None:
    """Raise UserError naming a cell's file that does not list each class once, as one cut short does."""
    classes = list(range(max(len(cell.classes) for cell in cells)))
    for cell in cells:
        if sorted(cell.classes["class"]) != classes:
            path = paths.cell_plots(*cell.full_name) / "per_class.csv"
            raise UserError(f"{path} is damaged (not each of {len(classes)} classes once): delete it and {REPRO}")


def _require_current(p: params.Params, cell: Cell) -> None:
    """Raise UserError when a cell's numbers are of other parameters than those in force, of other seeds, or not of the
    representation that lies there. (DVC sees to that; a stage that was left out without it is noticed here.)"""
    where = cell.full_name
    path, provenance = paths.metrics(*where), cell.metrics["provenance"]
    changed = [*lineage.outdated(provenance, settings.of_cell(p, *where), p.evaluate.model_dump())]
    if provenance.get("seeds") != p.seeds:
        changed.append(("seeds", provenance.get("seeds"), p.seeds))
    for part, first in CONCERNS.items():
        for key, of, wanted in changed:
            if key.startswith(part):
                raise UserError(f"{lineage.unlike(path, key, of, wanted)}: {_again(where, first)}")
    origin = params.recorded(lineage.Origin, provenance, path)
    lineage.require_cell(origin, path, where, paths.representation(*where[:2]), ("evaluate",))


def _require_own_tables(cell: Cell) -> None:
    """Raise UserError naming a table whose numbers are not those of the cell's metrics, as those of another cell are
    not, or of an evaluation that was cut short."""
    where = cell.full_name
    of_tables = {
        "per_class.csv": ("top1", np.average(cell.classes["accuracy"], weights=cell.classes["test_count"])),
        "reliability.csv": ("ece", figures.calibration_error(cell.bins)),
    }
    for name, (number, found) in of_tables.items():
        if not abs(found - cell.metrics[number]) <= ROUNDING:
            raise UserError(
                f"{paths.cell_plots(*where) / name} gives {number} {found:.6f}, and {paths.metrics(*where)} says "
                f"{cell.metrics[number]:.6f}: {lineage.again(evaluate=where)}"
            )


def _require_images(p: params.Params, dataset: str, longtail: Path, cells: list[Cell]) -> None:
    """Raise UserError when a cell's numbers are not of the images in `longtail`, or these not cut from those that were
    downloaded."""
    meta = splits.read_meta(longtail)
    splits.require_cut(longtail, meta, params.dataset(p, dataset), paths.raw(dataset))
    for cell in cells:
        where = cell.full_name
        path = paths.metrics(*where)
        origin = params.recorded(lineage.Origin, cell.metrics["provenance"], path)
        lineage.require_images(origin, path, where, meta, longtail, ("evaluate",))


def _again(cell: CellName, first: str) -> str:
    """How a cell is made anew from the stage `first` on."""
    stages = {"download": cell[:1], "subsample": cell[:1], "represent": cell[:2], "calibrate": cell, "evaluate": cell}
    return lineage.again(**dict(dropwhile(lambda stage: stage[0] != first, stages.items())))


def _metrics(path: Path) -> dict[str, Any]:
    """A cell's metrics. Raises UserError naming the file and the key."""
    content = read_json(path)
    params.recorded(Metrics, content, path)
    return content


def _history(dataset: str, representation: str) -> pd.DataFrame:
    stage1 = paths.representation(dataset, representation)
    verify(stage1 / "history.csv", lineage.read_represented(stage1).history)
    return _frame(stage1 / "history.csv", HISTORY)


def _diagram(cell: Cell) -> Path:
    path = paths.cell_plots(*cell.full_name) / "reliability.png"
    if not path.is_file():
        raise UserError(f"{path} is missing: {REPRO}")
    if not path.read_bytes().startswith(b"\x89PNG"):
        raise UserError(f"{path} is damaged (it is no PNG): delete it and {REPRO}")
    return path


def _frame(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        # Only an empty field is an absent value: a class may be called NA, null or 7.
        frame = pd.read_csv(path, dtype={"name": str}, keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {REPRO}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and {REPRO}") from None
    if frame.empty or not set(columns) <= set(frame.columns):
        raise UserError(
            f"{path} is damaged (it must have rows, and the columns {', '.join(columns)}): delete it and {REPRO}"
        )
    for column in set(columns) - TEXTS:
        if not pd.api.types.is_numeric_dtype(frame[column]) or (column in WHOLE and frame[column].isna().any()):
            raise UserError(f"{path} is damaged ({column} has what is no number): delete it and {REPRO}")
    return frame


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m stages.report", description=__doc__).parse_args()
    run(main)
