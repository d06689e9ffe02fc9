"""What the stage evaluate left of the grid's cells: read, and held against the parameters and against each other."""

from itertools import dropwhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import AliasPath, ConfigDict, Field, model_validator

from tailcal import figures, lineage, params, settings, splits
from tailcal.cell import CellName
from tailcal.errors import UserError
from tailcal.files import REPRO, read_json, verify
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


def read_cell(name: CellName, metrics: Path, plots: Path) -> Cell:
    """A cell whose metrics are the file `metrics`, and whose tables lie in the folder `plots`. Raises UserError naming
    the file that is missing or damaged, and the key or column."""
    content = read_json(metrics)
    params.recorded(Metrics, content, metrics)
    bins, classes = _table(plots / "reliability.csv", BINS), _table(plots / "per_class.csv", CLASSES)
    return Cell(*name, content, bins, classes)


def read_history(stage1: Path) -> pd.DataFrame:
    """The training of a representation, with the columns HISTORY, from its folder `stage1`. Raises UserError as
    `read_cell` does."""
    verify(stage1 / "history.csv", lineage.read_represented(stage1).history)
    return _table(stage1 / "history.csv", HISTORY)


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
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


def require_same_classes(cells: dict[Path, Cell]) -> None:
    """Raise UserError naming a cell's table that does not list each class once, as one cut short does.

    cells: those of one data set, by the folder of their tables.
    """
    classes = list(range(max(len(cell.classes) for cell in cells.values())))
    for plots, cell in cells.items():
        if sorted(cell.classes["class"]) != classes:
            path = plots / "per_class.csv"
            raise UserError(f"{path} is damaged (not each of {len(classes)} classes once): delete it and {REPRO}")


def require_current(cell: Cell, p: params.Params, metrics: Path, stage1: Path) -> None:
    """Raise UserError when a cell's numbers, in the file `metrics`, are of other parameters than those in force, of
    other seeds, or not of the representation in the folder `stage1`, where that is there. (DVC sees to that; a stage
    that was left out without it is noticed here.)"""
    provenance = cell.metrics["provenance"]
    changed = [*lineage.outdated(provenance, settings.of_cell(p, *cell.full_name), p.evaluate.model_dump())]
    if provenance.get("seeds") != p.seeds:
        changed.append(("seeds", provenance.get("seeds"), p.seeds))
    for part, first in CONCERNS.items():
        for key, of, wanted in changed:
            if key.startswith(part):
                raise UserError(f"{lineage.unlike(metrics, key, of, wanted)}: {_again(cell.full_name, first)}")
    origin = params.recorded(lineage.Origin, provenance, metrics)
    lineage.require_cell(origin, metrics, cell.full_name, stage1, ("evaluate",))


def require_own_tables(cell: Cell, metrics: Path, plots: Path) -> None:
    """Raise UserError naming a table in the folder `plots` whose numbers are not those of the cell's file `metrics`, as
    those of another cell are not, or of an evaluation that was cut short."""
    of_tables = {
        "per_class.csv": ("top1", np.average(cell.classes["accuracy"], weights=cell.classes["test_count"])),
        "reliability.csv": ("ece", figures.calibration_error(cell.bins)),
    }
    for name, (number, found) in of_tables.items():
        if not abs(found - cell.metrics[number]) <= ROUNDING:
            raise UserError(
                f"{plots / name} gives {number} {found:.6f}, and {metrics} says {cell.metrics[number]:.6f}: "
                f"{lineage.again(evaluate=cell.full_name)}"
            )


def require_images(cell: Cell, metrics: Path, checksums: dict[str, str], longtail: Path) -> None:
    """Raise UserError when a cell's numbers, in the file `metrics`, are not of the images in the folder `longtail`,
    of these checksums."""
    origin = params.recorded(lineage.Origin, cell.metrics["provenance"], metrics)
    lineage.require_images(origin, metrics, cell.full_name, checksums, longtail, ("evaluate",))


def _again(cell: CellName, first: str) -> str:
    """How a cell is made anew from the stage `first` on."""
    stages = {"download": cell[:1], "subsample": cell[:1], "represent": cell[:2], "calibrate": cell, "evaluate": cell}
    return lineage.again(**dict(dropwhile(lambda stage: stage[0] != first, stages.items())))
