"""What papers printed beside what was measured here, and methods compared pair by pair on the same test images.

Fractions in the measurements, percent in the references and in whatever is read. Imports no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from tailcal.cell import CellName
from tailcal.errors import UserError
from tailcal.measured import BestNumbers, Cells, MeasuredCell, Numbers, Run, unpack
from tailcal.metrics.cell import HEADLINE
from tailcal.plan import AS_TRAINED, PLAIN, PLAN, Footing, Plan, cell_name
from tailcal.references import COLUMNS, PERCENT, REFERENCES, Reference

MISS = 1.0  # points beyond the spread of the seeds from which on a difference is marked
RESAMPLES = 2000  # of the test images, by the bootstrap
CONFIDENCE = 0.95
DIGITS = 10  # of a share of images and seeds behind the point
SEEDS = 3  # of each of two methods, below which nothing is known of the spread of their difference
ALIKE = ("precision", "backbone", "epochs", "data.train_images", "data.test_split", "provenance.evaluate")
ALIKE += ("provenance.data.train_images.npy", "provenance.params.representation.settings.augmentation")
ALIKE += tuple(  # but for sam_rho, which is the method's own
    f"provenance.params.representation.recipe.{key}"
    for key in ("batch_size", "last_batch", "lr", "momentum", "weight_decay", "schedule")
)  # which keys of `Run.shared` the rows of a footing have in common


@dataclass(frozen=True)
class ComparedNumber:
    """A number of ours with its standard deviation over seeds, fractions, beside the published one, in percent; None
    where there is none."""

    ours: float | None
    std: float | None
    published: float | None

    @property
    def difference(self) -> float | None:
        """Ours less the published one, in points, of the two as they are shown; None where one is missing."""
        if self.ours is None or self.published is None:
            return None
        return round(points(self.ours) - self.published, 2) + 0.0  # never -0.0

    @property
    def misses(self) -> bool | None:
        """Whether the difference, up or down, is more than MISS points and the deviation; None where there is none."""
        if self.difference is None:
            return None
        return round(abs(self.difference) - points(self.std or 0.0), 2) > MISS


@dataclass(frozen=True)
class Comparison:
    """A published row and our cell, None where it has not been run."""

    reference: Reference
    cell: MeasuredCell | None

    @property
    def numbers(self) -> Numbers | None:
        """Ours at the last epoch, after the row's rule."""
        return self.cell and self.cell.after(self.reference.rule)

    @property
    def best(self) -> BestNumbers | None:
        """Ours at the epoch that is best on test after the row's rule."""
        return self.cell and self.cell.best(self.reference.rule)

    @property
    def top1(self) -> ComparedNumber:
        ours = self.numbers
        return ComparedNumber(ours and ours.top1, ours and ours.top1_std, self.reference.top1)

    @property
    def ece(self) -> ComparedNumber:
        ours = self.numbers
        return ComparedNumber(ours and ours.ece, ours and ours.ece_std, self.reference.ece)


def compare(references: Iterable[Reference], cells: Cells) -> dict[str, list[Comparison]]:
    """The rows of each paper's table beside our cells, the rows of one data set together."""
    tables: dict[str, dict[str, list[Comparison]]] = {}
    for row in references:
        ours = cells.get((row.dataset, row.representation, row.classifier))
        tables.setdefault(row.table, {}).setdefault(row.dataset, []).append(Comparison(row, ours))
    return {table: [row for group in groups.values() for row in group] for table, groups in tables.items()}


def require_known(references: Iterable[Reference], plan: Plan, rules: Iterable[str]) -> None:
    """Raise UserError for a published or footing row that nothing trains, or whose rule is none of `rules`.

    references: as `read_references` has them.
    """
    known = (*PLAIN, *rules)
    for line, row in enumerate(references, start=2):  # one a line, below the names of the columns
        where = f"{REFERENCES} line {line}: {row.method}"
        cell = CellName(row.dataset, row.representation, row.classifier)
        if row.table not in plan.tables or not plan.tables[row.table].trains(*cell):
            raise UserError(f"{where}: {PLAN}: tables.{row.table} does not train {cell}")
        if row.rule not in known:
            raise UserError(f"{where}: there is no rule {row.rule}: use one of {', '.join(rules)}")
    for name, footing in plan.footing.items():
        for row in footing.rows:
            if row.rule not in known:
                raise UserError(f"{PLAN}: footing.{name}: there is no rule {row.rule}: use one of {', '.join(rules)}")


def comparison_rows(tables: dict[str, list[Comparison]]) -> pd.DataFrame:
    """One line per published row; accuracies and ECE in percent, nothing where there is no number."""
    return pd.DataFrame([_flat(row) for rows in tables.values() for row in rows], dtype=object)  # whole numbers stay so


def _flat(row: Comparison) -> dict[str, Any]:
    published, cell, ours, best = row.reference, row.cell, row.numbers, row.best
    names = {column: getattr(published, column) for column in COLUMNS if column not in (*PERCENT, "source", "note")}
    return names | {
        "published_top1": published.top1,
        "published_ece": published.ece,
        "top1": ours and points(ours.top1, 4),
        "top1_std": ours and points(ours.top1_std, 4),
        "best_on_test": best and points(best.top1, 4),
        "best_on_test_std": best and points(best.top1_std, 4),
        "best_on_test_ece": best and points(best.ece, 4),
        "late_ece_least": best and points(best.ece_least, 4),
        "late_ece_most": best and points(best.ece_most, 4),
        "best_on_test_epochs": best and cell.late_epochs,
        "ece": ours and points(ours.ece, 4),
        "ece_std": ours and points(ours.ece_std, 4),
        "difference": row.top1.difference,
        "misses": row.top1.misses,
        "ece_difference": row.ece.difference,
        "ece_misses": row.ece.misses,
        "seeds": cell and cell.seeds,
        "seconds": cell and cell.seconds,
        "at_once": cell and cell.at_once,
        "machine": cell and " and ".join(dict.fromkeys(run.cost.machine for run in cell.runs)),
        "measured_backbone": cell and cell.one.backbone,
        "measured_epochs": cell and cell.one.epochs,
        "precision": cell and cell.one.precision,
        "train_images": cell and cell.one.data.train_images,
        "official": cell and cell.one.data.official,
        "source": published.source,
        "note": published.note,
    }


@dataclass(frozen=True)
class FootingRow:
    """A measured row of a footing table. `trained` is the name of its cell, and `name` that with the row's rule."""

    name: str
    trained: str
    cell: MeasuredCell
    numbers: Numbers
    correct: np.ndarray | None  # [S, N], which test images each seed got right; None where that was not kept

    def separated_from(self, other: "FootingRow") -> bool:
        """Whether both have SEEDS seeds or more, and all of the one are more accurate than all of the other."""
        own_S, other_S = self.correct.mean(axis=1), other.correct.mean(axis=1)
        enough = min(len(own_S), len(other_S)) >= SEEDS
        return bool(enough and (own_S.min() > other_S.max() or other_S.min() > own_S.max()))


def measured_rows(footing: Footing, cells: Cells) -> tuple[list[FootingRow], list[str]]:
    """The measured rows of a footing table, and the names of those that have not been run.

    Raises UserError naming the cell that was trained or tested on other images than the first one, in another
    precision, on another backbone or by another recipe.
    """
    found, missing = [], []
    for row in footing.rows:
        name = row.name
        cell = cells.get((footing.dataset, row.representation, row.classifier))
        numbers = cell and cell.after(row.rule)
        if numbers is None:
            missing.append(name)
            continue
        if found:
            _require_common(f"{footing.dataset}/{name}", cell.one, found[0])
        trained = cell_name(row.representation, row.classifier)
        found.append(FootingRow(name, trained, cell, numbers, _correct(numbers, cell.one.test_images)))
    return found, missing


def _require_common(where: str, cell: Run, first: FootingRow) -> None:
    """Raise UserError when a cell cannot stand in one table with the first row's."""
    for key, ours, theirs in cell.differences(first.cell.one, ALIKE):
        raise UserError(
            f"{where}: its {key} is {ours}, that of {first.name} {theirs}: that is no common footing, make one of the "
            "two again"
        )


def _correct(numbers: Numbers, N: int) -> np.ndarray | None:
    return None if numbers.correct is None else np.stack([unpack(text, N) for text in numbers.correct])


@dataclass(frozen=True)
class Pair:
    """Accuracy of method `row` less that of method `column`, and an interval for it: fractions. `seeds_apart`: see
    `FootingRow.separated_from`."""

    row: int
    column: int
    difference: float
    low: float
    high: float
    seeds_apart: bool = False

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero: the choice of test images alone does not explain it."""
        return self.low > 0 or self.high < 0


def paired(correct_MN: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[Pair]:
    """Every pair of M methods, row > column, with the percentile interval of a paired bootstrap over N test images.

    correct_MN: [M, N] in [0, 1], the share of seeds that were right. An image is drawn with what all methods made of
    it, and every pair sees the same draws. The interval covers the choice of test images, not that of seeds.
    """
    if len(correct_MN) < 2:
        return []
    means_MR = bootstrap(
        (correct_MN,),
        np.mean,
        n_resamples=resamples,
        batch=1,  # the fastest, and M x N numbers at a time
        vectorized=True,
        axis=-1,
        method="percentile",  # the cheapest: only the resamples are taken, which are the same by any method
        rng=seed,
    ).bootstrap_distribution
    rows_P, columns_P = np.tril_indices(len(correct_MN), -1)
    tail = 50 * (1 - CONFIDENCE)
    low_P, high_P = np.percentile(means_MR[rows_P] - means_MR[columns_P], [tail, 100 - tail], axis=-1)
    means_M = correct_MN.mean(axis=1)
    # All are shares of the images and seeds: what lies beyond DIGITS is how a version of NumPy sums them, which would
    # decide how a number half way between two shown ones is shown, and whether an end at 0 lies above it. No 0 is -0.0.
    shares = (numbers.round(DIGITS) + 0.0 for numbers in (means_M[rows_P] - means_M[columns_P], low_P, high_P))
    return [Pair(*pair) for pair in zip(*(numbers.tolist() for numbers in (rows_P, columns_P, *shares)), strict=True)]


@dataclass(frozen=True)
class FootingTable:
    """A footing table's measured rows, the names of the others, and the pairs of those measured rows whose predictions
    were kept image by image."""

    name: str
    footing: Footing
    rows: list[FootingRow]
    missing: list[str]
    pairs: list[Pair]  # by position in `rows`


def footing_table(name: str, footing: Footing, cells: Cells) -> FootingTable:
    """Raises UserError as `measured_rows` does."""
    found, missing = measured_rows(footing, cells)
    kept = [position for position, row in enumerate(found) if row.correct is not None]
    pairs = paired(np.stack([found[position].correct.mean(axis=0) for position in kept])) if kept else []
    pairs = [replace(pair, row=kept[pair.row], column=kept[pair.column]) for pair in pairs]
    pairs = [replace(pair, seeds_apart=found[pair.row].separated_from(found[pair.column])) for pair in pairs]
    return FootingTable(name, footing, found, missing, pairs)


def summary(cells: Cells) -> dict[str, dict[str, float | None]]:
    """The few numbers of each cell that `dvc metrics` lists: fractions, by data set/representation/classifier."""
    return {
        str(name): {number: getattr(cell.after(AS_TRAINED), number) for number in HEADLINE}
        for name, cell in cells.items()
    }


PAIR_COLUMNS = ["footing", "dataset", "first", "second", "difference", "low", "high", "excludes_zero", "seeds_apart"]
PAIR_COLUMNS += ["test_images"]


def pair_rows(tables: list[FootingTable]) -> pd.DataFrame:
    """One line per pair of methods: top-1 of the first less that of the second, in points, and its interval."""
    rows = [
        {
            "footing": table.name,
            "dataset": table.footing.dataset,
            "first": table.rows[pair.row].name,
            "second": table.rows[pair.column].name,
            "difference": points(pair.difference, 4),
            "low": points(pair.low, 4),
            "high": points(pair.high, 4),
            "excludes_zero": pair.excludes_zero,
            "seeds_apart": pair.seeds_apart,
            "test_images": table.rows[pair.row].cell.one.test_images,
        }
        for table in tables
        for pair in table.pairs
    ]
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def points(fraction: float | None, digits: int = 2) -> float | None:
    """A fraction in percent, or a difference of two in points, rounded; None stays None."""
    return None if fraction is None else round(100 * fraction, digits)
