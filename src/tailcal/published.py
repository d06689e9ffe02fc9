"""What papers printed beside what was measured here, and methods compared pair by pair on the same test images.

Fractions in the measurements, percent in the references and in whatever is read. Imports no torch.
"""

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.stats import bootstrap

from tailcal import files, params
from tailcal.errors import UserError
from tailcal.plan import Footing
from tailcal.tables import DASH, HEADLINE, MARK, Table

TITLES = {
    "mislas": "MiSLAS (Zhong et al. 2021)",
    "marc": "MARC (Wang et al. 2022)",
    "bagmar": "BaGMar, also called GALA (Zhang et al. 2024)",
    "fsgl": "FSGL (2024), and GLMC (Du et al. 2023)",
}
PLAIN = ("", "none")  # no post-hoc rule, as the references and as the project's own tables say it
MISS = 1.0  # points beyond the spread of the seeds from which on a difference is marked
RESAMPLES = 2000  # of the test images, by the bootstrap
CONFIDENCE = 0.95
ROUNDING = 1e-5  # by which a stored accuracy may differ from that of the predictions beside it

INTRODUCTION = f"""\
# Published tables, and the same footing

Made by `python -m stages.tables` from `references/published.csv` and the files below `metrics/published`. Top-1 is the
accuracy and ECE the expected calibration error, both in %; a point is a percentage point; ± is the standard deviation
over seeds, each seed a network trained anew. "s a network" is the time in seconds that training one network took, both
stages together. {DASH} is a number that was not printed, or not measured.

"Best on test" is the mean over seeds of the best of the last epochs, chosen on the test split, as the papers' released
codes choose the epoch that they report. It is there so that published numbers can be compared like for like: a
diagnostic, not a result. All else of ours is of the last epoch.
"""


@dataclass(frozen=True)
class Reference:
    """A published number: a row of references/published.csv. top1 and ece in percent, None where not printed."""

    table: str
    method: str
    dataset: str
    representation: str
    classifier: str
    rule: str  # the post-hoc rule that follows, or nothing
    backbone: str
    epochs: str  # as printed: 200+10
    top1: float | None
    ece: float | None
    source: str
    note: str

    @property
    def cell(self) -> str:
        """Our name for the method."""
        return _name(self.representation, self.classifier, self.rule)


COLUMNS = [field.name for field in fields(Reference)]
OPTIONAL = ("rule", "backbone", "epochs", "top1", "ece", "note")
PERCENT = ("top1", "ece")


def read_references(path: Path) -> list[Reference]:
    """The published numbers, in the file's order. Raises UserError naming file and line for whatever is wrong in it."""
    try:
        # The header as a row like any other: with one of its own, pandas takes a field too many for an index.
        frame = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: take it from git again") from None
    except ValueError as error:  # pandas' own errors are some, and so are bytes that are no UTF-8
        raise UserError(f"{path}: not valid CSV: {' '.join(str(error).split())}") from None
    lines = frame.to_numpy(dtype=object).tolist()  # fields that a line lacks are empty
    _check_columns(lines[0], f"{path} line 1")
    references, seen = [], {}
    for number, line in enumerate(lines[1:], start=2):
        reference = _reference(line, f"{path} line {number}")
        # A number that was printed in a table and came with a checkpoint too has two sources, and is two rows.
        key = tuple(getattr(reference, column) for column in COLUMNS if column not in (*PERCENT, "note"))
        if key in seen:
            raise UserError(f"{path} line {number}: repeats line {seen[key]}: the same method, data set and source")
        seen[key] = number
        references.append(reference)
    return references


def _check_columns(columns: list[str], where: str) -> None:
    if columns == COLUMNS:
        return
    wrong = [f"unknown column {column}" for column in columns if column not in COLUMNS]
    wrong += [f"no column {column}" for column in COLUMNS if column not in columns]
    raise UserError(f"{where}: {wrong[0] if wrong else 'wrong order'}: its columns must be {','.join(COLUMNS)}")


def _reference(line: list[str], where: str) -> Reference:
    row: dict[str, Any] = dict(zip(COLUMNS, line, strict=True))
    for column in COLUMNS:
        if not row[column] and column not in OPTIONAL:
            raise UserError(f"{where}: {column} must not be empty")
    if row["table"] not in TITLES:
        raise UserError(f"{where}: table must be one of {', '.join(TITLES)}, got {row['table']!r}")
    return Reference(**row | {column: _percent(row[column], f"{where}: {column}") for column in PERCENT})


def _percent(text: str, where: str) -> float | None:
    if not text:
        return None
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) > 100:
        raise UserError(f"{where} must be a number in percent, 0 to 100, or empty, got {text!r}")
    return float(text)


class _Part(BaseModel):
    """A part of a measurement. It has keys beside those that are used here."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]


class Numbers(_Part):
    """Means over seeds and their standard deviations, fractions; None where there is none."""

    top1: params.Fraction
    top1_std: float | None = None
    many: float | None = None
    medium: float | None = None
    few: float | None = None
    ece: float | None
    ece_std: float | None = None
    nll: float | None
    transductive: bool = False
    correct: dict[str, str] | None = None  # {seed: as `unpack` reads it}


class Data(_Part):
    """official: the published list of images, or else a fair draw of as many from the real ones."""

    train_images: int
    official: bool


class Cost(_Part):
    """seconds: training one network, stage 1 and 2, with `at_once` networks side by side."""

    machine: str
    seconds: float
    at_once: Count


class Best(_Part):
    """Mean over seeds of the best of the last `epochs` epochs, chosen on the test split: a diagnostic."""

    epochs: Count
    top1: params.Fraction
    top1_std: float | None = None


class Measured(Numbers):
    """A cell as it was measured: a file of metrics/published."""

    seeds: Count
    posthoc: dict[str, Numbers] = {}
    data: Data
    cost: Cost
    best_on_test: Best | None = None
    epochs: Count
    backbone: str
    test_images: Annotated[int, Field(ge=2)]

    def after(self, rule: str) -> Numbers | None:
        """The numbers after a post-hoc rule, as trained for a rule of PLAIN, None where the rule was not applied."""
        return self if rule in PLAIN else self.posthoc.get(rule)


Cells = dict[tuple[str, str, str], Measured]


def read_measured(folder: Path) -> Cells:
    """Every cell measured below `folder`, by (data set, representation, classifier).

    Raises UserError naming a file that is damaged.
    """
    found = {}
    for path in sorted(folder.glob("*/*/*.json")):
        try:
            cell = Measured.model_validate(files.read_json(path))
        except ValidationError as error:
            raise UserError(f"{path} is damaged ({params.describe(error, '')}): delete it and make it again") from None
        found[path.parts[-3], path.parts[-2], path.stem] = cell
    return found


@dataclass(frozen=True)
class Comparison:
    """A published row and our cell, None where it has not been run."""

    reference: Reference
    cell: Measured | None

    @property
    def numbers(self) -> Numbers | None:
        """Ours at the last epoch, after the row's rule."""
        return self.cell and self.cell.after(self.reference.rule)

    @property
    def best(self) -> Best | None:
        """Ours at the epoch that is best on test. It is known of the plain predictions only."""
        return None if self.cell is None or self.reference.rule not in PLAIN else self.cell.best_on_test

    @property
    def difference(self) -> float | None:
        """Ours less the published top-1, in points, of the two as they are shown; None where one is missing."""
        if self.numbers is None or self.reference.top1 is None:
            return None
        return round(_points(self.numbers.top1) - self.reference.top1, 2) + 0.0  # never -0.0

    @property
    def misses(self) -> bool:
        """Whether ours is further from the published top-1, up or down, than MISS points and the seeds' spread."""
        if self.difference is None:
            return False
        return round(abs(self.difference) - _points(self.numbers.top1_std or 0.0), 2) > MISS


def compare(references: Iterable[Reference], cells: Cells) -> dict[str, list[Comparison]]:
    """The rows of each paper's table beside our cells, a data set's rows together."""
    tables: dict[str, dict[str, list[Comparison]]] = {}
    for row in references:
        ours = cells.get((row.dataset, row.representation, row.classifier))
        tables.setdefault(row.table, {}).setdefault(row.dataset, []).append(Comparison(row, ours))
    return {table: [row for group in groups.values() for row in group] for table, groups in tables.items()}


def comparison_rows(tables: dict[str, list[Comparison]]) -> pd.DataFrame:
    """One row a published row; accuracies and ECE in percent, nothing where there is no number."""
    return pd.DataFrame([_flat(row) for rows in tables.values() for row in rows], dtype=object)  # whole numbers stay so


def _flat(row: Comparison) -> dict[str, Any]:
    published, cell, ours, best = row.reference, row.cell, row.numbers, row.best
    names = {column: getattr(published, column) for column in COLUMNS if column not in (*PERCENT, "source", "note")}
    return names | {
        "published_top1": published.top1,
        "published_ece": published.ece,
        "top1": ours and _points(ours.top1, 4),
        "top1_std": ours and _points(ours.top1_std, 4),
        "best_on_test": best and _points(best.top1, 4),
        "best_on_test_std": best and _points(best.top1_std, 4),
        "best_on_test_epochs": best and best.epochs,
        "ece": ours and _points(ours.ece, 4),
        "ece_std": ours and _points(ours.ece_std, 4),
        "difference": row.difference,
        "misses": None if row.difference is None else row.misses,
        "seeds": cell and cell.seeds,
        "seconds": cell and cell.cost.seconds,
        "at_once": cell and cell.cost.at_once,
        "machine": cell and cell.cost.machine,
        "measured_backbone": cell and cell.backbone,
        "measured_epochs": cell and cell.epochs,
        "train_images": cell and cell.data.train_images,
        "official": cell and cell.data.official,
        "source": published.source,
        "note": published.note,
    }


def published_markdown(name: str, rows: list[Comparison], command: str) -> str:
    """One paper's table to read: caption, table, and below it what a reader must know.

    command: what runs the cells that are missing.
    """
    sources = list(dict.fromkeys((row.reference.source, row.reference.note) for row in rows))
    best = {row.best.epochs for row in rows if row.best}
    header = ["data set", "method", "published top-1", "published ECE", "our top-1", "difference"]
    header += [f"best on test, last {_span(best)} epochs" if best else "best on test", "our ECE", "seeds"]
    table = Table([*header, "s a network", "source"], [_texts(row, sources) for row in rows])
    parts = [f"## {TITLES[name]}", _caption(rows), table.markdown().rstrip(), *_below(rows, command)]
    listed = [f"- [{i}] {'; '.join(filter(None, source))}" for i, source in enumerate(sources, start=1)]
    return "\n\n".join([*parts, "Sources:", "\n".join(listed)]) + "\n"


def _texts(row: Comparison, sources: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    published, ours = row.reference, row.numbers
    before = [
        published.dataset,
        _marked(published.method, ours),
        _printed(published.top1),
        _printed(published.ece),
        _spread(ours and ours.top1, ours and ours.top1_std),
    ]
    difference = DASH if row.difference is None else _signed(row.difference, 2)
    after = [
        _spread(row.best and row.best.top1, row.best and row.best.top1_std),
        _spread(ours and ours.ece, ours and ours.ece_std),
        str(row.cell.seeds) if ours else DASH,
        f"{row.cell.cost.seconds:,.0f}" if ours else DASH,
        f"[{sources.index((published.source, published.note)) + 1}]",
    ]
    return [*((text, False) for text in before), (difference, row.misses), *((text, False) for text in after)]


def _caption(rows: list[Comparison]) -> str:
    measured = [row.cell for row in rows if row.numbers]
    if not measured:
        return "Nothing of this table has been run yet."
    return (
        f"Ours: mean ± standard deviation over seeds, at the last epoch ({_span({cell.epochs for cell in measured})}). "
        "Difference: our top-1 less the published one, in points; **bold** where it is more, up or down, than "
        f"{MISS:g} point plus our standard deviation (of one seed: than {MISS:g} point). "
        f"{_conditions((row.reference.dataset, row.cell) for row in rows if row.numbers)}"
    )


def _conditions(measured: Iterable[tuple[str, Measured]]) -> str:
    """Sentences: on which machine (data set, cell)s were measured, and on which images."""
    measured = list(measured)
    machines = {f"{_networks(cell.cost.at_once)} at a time on {cell.cost.machine}": None for _, cell in measured}
    drawn = {f"{name} ({cell.data.train_images:,})": None for name, cell in measured if not cell.data.official}
    sentences = [f"Trained {', or '.join(machines)}."]
    if drawn:
        sentences.append(
            f"Training images of {', '.join(drawn)}: the images are the real ones, the subset a fair draw of the right "
            "size, not the published image list."
        )
    return " ".join(sentences)


def _below(rows: list[Comparison], command: str) -> list[str]:
    """The paragraphs below a paper's table."""
    paragraphs = []
    if missing := [row for row in rows if row.numbers is None]:
        paragraphs.append(
            f"{DASH} in ours: {len(missing)} of {len(rows)} rows have not been measured. `{command}` runs them."
        )
    compared = [row for row in rows if row.difference is not None]
    off = f"Rows off by more than {MISS:g} point plus our standard deviation"
    if missed := [row for row in compared if row.misses]:
        lines = [f"- {row.reference.dataset}, {row.reference.method}: {_missed(row)}" for row in missed]
        paragraphs.append(f"{off}: {len(missed)} of {len(compared)}.\n\n" + "\n".join(lines))
    elif compared:
        paragraphs.append(f"{off}: none of {len(compared)}.")
    if other := [f"- {row.reference.dataset}, {row.reference.method}: {text}" for row in rows if (text := _other(row))]:
        paragraphs.append("Not trained as published:\n\n" + "\n".join(other))
    if any(row.numbers and row.numbers.transductive for row in rows):
        paragraphs.append(_TRANSDUCTIVE)
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row.reference.cell, []).append(row.reference.method)
    cells = [f"{', '.join(dict.fromkeys(methods))} = `{cell}`" for cell, methods in names.items()]
    return [*paragraphs, f"The cells of ours: {'; '.join(cells)}."]


_TRANSDUCTIVE = f"{MARK} transductive: the prediction for one test image depends on the other test images."


def _missed(row: Comparison) -> str:
    text = f"{_signed(row.difference, 2)} (ours {_spread(row.numbers.top1, row.numbers.top1_std)}, published "
    text += _printed(row.reference.top1)
    if row.best:
        text += f"; best on test {_points(row.best.top1):.2f}"
    return f"{text})"


def _other(row: Comparison) -> str:
    """In what our training differs from the published one, as far as the two say; nothing where it does not."""
    if row.cell is None:
        return ""
    published = {
        "epochs": re.match(r"\d*", row.reference.epochs)[0],  # of 200+10 those of stage 1
        "backbone": row.reference.backbone.lower().replace("-", "").partition(" ")[0],
    }
    ours = {"epochs": str(row.cell.epochs), "backbone": row.cell.backbone}
    return ", ".join(
        f"{key} {ours[key]} (published {text})" for key, text in published.items() if text not in ("", ours[key])
    )


@dataclass(frozen=True)
class Method:
    """A measured row of a footing table."""

    name: str
    cell: Measured
    numbers: Numbers
    correct: np.ndarray | None  # [N], the share of seeds that were right; None where it was not kept


def measured_methods(footing: Footing, cells: Cells) -> tuple[list[Method], list[str]]:
    """The measured rows of a footing table, and the names of those that have not been run.

    Raises UserError naming the cell whose predictions are damaged or of other test images than the first one's.
    """
    found, missing = [], []
    for row in footing.rows:
        name = row.name
        cell = cells.get((footing.dataset, row.representation, row.classifier))
        numbers = cell and cell.after(row.rule)
        if numbers is None:
            missing.append(name)
            continue
        where = f"{footing.dataset}/{name}"
        if found and cell.test_images != found[0].cell.test_images:
            first = f"{found[0].name} on {found[0].cell.test_images:,}"
            raise UserError(f"{where}: measured on {cell.test_images:,} test images, {first}: make one of them again")
        found.append(Method(name, cell, numbers, _seed_mean(numbers, cell, where)))
    return found, missing


def _seed_mean(numbers: Numbers, cell: Measured, where: str) -> np.ndarray | None:
    if numbers.correct is None:
        return None
    try:
        correct_SN = np.stack([unpack(text, cell.test_images) for text in numbers.correct.values()])
    except ValueError as error:
        raise UserError(f"{where}: `correct` is damaged ({error}): delete the cell's file and make it again") from None
    if len(correct_SN) != cell.seeds or abs(correct_SN.mean() - numbers.top1) > ROUNDING:
        raise UserError(
            f"{where}: `correct` has {len(correct_SN)} seeds and an accuracy of {correct_SN.mean():.6f}, the numbers "
            f"beside it {cell.seeds} and {numbers.top1:.6f}: delete the cell's file and make it again"
        )
    return correct_SN.mean(axis=0)


def unpack(text: str, N: int) -> np.ndarray:
    """bool [N] from base64 of numpy.packbits. Raises ValueError when the text is anything else."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(packed) != -(-N // 8):
        raise ValueError(f"{len(packed)} bytes are not one bit for each of {N} images")
    bits = np.unpackbits(packed).astype(bool)
    if bits[N:].any():
        raise ValueError(f"it says something of more than {N} images")
    return bits[:N]


@dataclass(frozen=True)
class Pair:
    """Accuracy of method `row` less that of method `column`, and an interval for it: fractions."""

    row: int
    column: int
    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired(correct_MN: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[Pair]:
    """Every pair of M methods, row > column, with the percentile interval of a paired bootstrap over N test images.

    correct_MN: [M, N] in [0, 1], the share of seeds that were right. An image is drawn with what all methods made of
    it, and every pair sees the same draws. The interval covers the choice of test images, not that of seeds.
    """
    if len(correct_MN) < 2:
        return []
    rows_P, columns_P = np.tril_indices(len(correct_MN), -1)
    difference_PN = correct_MN[rows_P] - correct_MN[columns_P]
    interval = bootstrap(
        (difference_PN,),
        np.mean,
        n_resamples=resamples,
        batch=1,  # the fastest, and P x N numbers at a time
        vectorized=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    ).confidence_interval
    columns = (rows_P, columns_P, difference_PN.mean(axis=1), interval.low, interval.high)
    return [Pair(*pair) for pair in zip(*(numbers.tolist() for numbers in columns), strict=True)]


@dataclass(frozen=True)
class FootingTable:
    """A footing table's methods, and the pairs of those of them whose predictions were kept image by image."""

    name: str
    footing: Footing
    methods: list[Method]
    missing: list[str]
    pairs: list[Pair]  # by position in `methods`


def footing_table(name: str, footing: Footing, cells: Cells) -> FootingTable:
    """Raises UserError as `measured_methods` does."""
    found, missing = measured_methods(footing, cells)
    kept = [position for position, method in enumerate(found) if method.correct is not None]
    pairs = paired(np.stack([found[position].correct for position in kept])) if kept else []
    pairs = [replace(pair, row=kept[pair.row], column=kept[pair.column]) for pair in pairs]
    return FootingTable(name, footing, found, missing, pairs)


def overview(papers: dict[str, list[Comparison]], footings: list[FootingTable], command: str) -> str:
    """What a first page shows: each published row that has been measured, and the methods of each footing table.

    command: what measures the rows that are missing.
    """
    rows = [row for table in papers.values() for row in table]
    measured = [row for row in rows if row.numbers]
    said = f"{len(measured)} of the {len(rows)} published rows have been measured here."
    if len(measured) < len(rows):
        said += f" `{command}` measures the others; they need a GPU."
    parts = [said]
    if measured:
        header = ["data set", "method", "published", "ours", "published ECE", "our ECE", "seeds", "s a network"]
        parts += [_caption(measured), Table(header, [_short(row) for row in measured]).markdown().rstrip()]
    for table in footings:
        if table.methods:
            parts += [f"**{table.footing.title}**", _footing_caption(table)]
            parts.append(_footing_numbers(table.methods).markdown().rstrip())
    if any(row.numbers.transductive for row in measured) or any(
        method.numbers.transductive for table in footings for method in table.methods
    ):
        parts.append(_TRANSDUCTIVE)
    return "\n\n".join(parts) + "\n"


def _short(row: Comparison) -> list[tuple[str, bool]]:
    published, ours = row.reference, row.numbers
    return [
        (published.dataset, False),
        (_marked(published.method, ours), False),
        (_printed(published.top1), False),
        (_spread(ours.top1, ours.top1_std), row.misses),
        (_printed(published.ece), False),
        (_spread(ours.ece, ours.ece_std), False),
        (str(row.cell.seeds), False),
        (f"{row.cell.cost.seconds:,.0f}", False),
    ]


def summary(cells: Cells) -> dict[str, dict[str, float | None]]:
    """The few numbers of each cell that `dvc metrics` lists: fractions, by data set/representation/classifier."""
    return {"/".join(cell): {name: getattr(numbers, name) for name in HEADLINE} for cell, numbers in cells.items()}


PAIR_COLUMNS = ["footing", "dataset", "first", "second", "difference", "low", "high", "excludes_zero", "test_images"]


def pair_rows(tables: list[FootingTable]) -> pd.DataFrame:
    """One row a pair of methods: top-1 of the first less that of the second, in points, and its interval."""
    rows = [
        {
            "footing": table.name,
            "dataset": table.footing.dataset,
            "first": table.methods[pair.row].name,
            "second": table.methods[pair.column].name,
            "difference": _points(pair.difference, 4),
            "low": _points(pair.low, 4),
            "high": _points(pair.high, 4),
            "excludes_zero": pair.excludes_zero,
            "test_images": table.methods[pair.row].cell.test_images,
        }
        for table in tables
        for pair in table.pairs
    ]
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def footing_markdown(table: FootingTable, command: str) -> str:
    """A footing table to read, and the matrix of its pairs; one line where nothing has been run.

    command: what runs the cells that are missing.
    """
    title, found = f"## {table.footing.title}", table.methods
    if not found:
        return f"{title}\n\nNot run yet: `{command}` runs it.\n"
    parts = [title, _footing_caption(table), _footing_numbers(found).markdown().rstrip()]
    if table.missing:
        parts.append(f"Not run yet: {', '.join(table.missing)}. `{command}` runs what is missing.")
    if any(method.numbers.transductive for method in found):
        parts.append(_TRANSDUCTIVE)
    if table.pairs:
        parts += [_PAIRS, _matrix(table).markdown().rstrip()]
        if left := [method.name for method in found if method.correct is None]:
            parts.append(f"Not in the matrix, as only sums of their predictions were kept: {', '.join(left)}.")
    return "\n\n".join(parts) + "\n"


_PAIRS = (
    f"Top-1 of the row less that of the column, in points, mean over seeds; below it the {CONFIDENCE:.0%} percentile "
    f"interval of a paired bootstrap ({RESAMPLES:,} resamples of the test images, the same for all pairs). **Bold**: "
    "the interval, before rounding, excludes 0; each pair is taken for itself, with no correction for their number. "
    "The interval covers the choice of test images, and not that of seeds: their standard deviation stands in the "
    "table above."
)


def _footing_caption(table: FootingTable) -> str:
    cells = [method.cell for method in table.methods]
    backbones = ", ".join(dict.fromkeys(cell.backbone for cell in cells))
    return (
        f"{table.footing.dataset}, {cells[0].test_images:,} test images, {backbones}; mean ± standard deviation over "
        f"seeds, at the last epoch ({_span({cell.epochs for cell in cells})}). All in %, but for the negative "
        "log-likelihood (NLL), which has no unit. Many, medium and few: classes with more than 100, 20 to 100 and "
        f"fewer than 20 training images. {_conditions((table.footing.dataset, cell) for cell in cells)}"
    )


def _footing_numbers(found: list[Method]) -> Table:
    header = ["no.", "method", "top-1", "many", "medium", "few", "ECE", "NLL", "seeds", "s a network"]
    rows = [
        [
            str(number),
            _marked(method.name, method.numbers),
            _spread(method.numbers.top1, method.numbers.top1_std),
            *(_spread(getattr(method.numbers, group), None) for group in ("many", "medium", "few")),
            _spread(method.numbers.ece, method.numbers.ece_std),
            DASH if method.numbers.nll is None else f"{method.numbers.nll:.3f}",
            str(method.cell.seeds),
            f"{method.cell.cost.seconds:,.0f}",
        ]
        for number, method in enumerate(found, start=1)
    ]
    return Table(header, [[(text, False) for text in row] for row in rows])


def _matrix(table: FootingTable) -> Table:
    """The pairs, a row and a column a method by its number; only one of each, as the other is the same negated."""
    texts = {
        (pair.row, pair.column): (
            f"{_signed(100 * pair.difference, 1)}<br>{_signed(100 * pair.low, 1)} to {_signed(100 * pair.high, 1)}",
            pair.excludes_zero,
        )
        for pair in table.pairs
    }
    rows = list(dict.fromkeys(row for row, _ in texts))
    columns = list(dict.fromkeys(column for _, column in texts))
    return Table(
        ["no.", "method", *(str(column + 1) for column in columns)],
        [
            [
                (str(row + 1), False),
                (_marked(table.methods[row].name, table.methods[row].numbers), False),
                *(texts.get((row, column), ("", False)) for column in columns),
            ]
            for row in rows
        ],
    )


def _name(representation: str, classifier: str, rule: str) -> str:
    return f"{representation}/{classifier}" + ("" if rule in PLAIN else f" + {rule}")


def _marked(name: str, numbers: Numbers | None) -> str:
    return f"{name} {MARK}" if numbers and numbers.transductive else name


def _points(fraction: float | None, digits: int = 2) -> float | None:
    return None if fraction is None else round(100 * fraction, digits)


def _printed(percent: float | None) -> str:
    """A published number with the one decimal, or two, that it was printed with."""
    return DASH if percent is None else f"{percent:.2f}".removesuffix("0")


def _spread(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return DASH
    return f"{_points(mean):.2f}" + ("" if deviation is None else f" ± {_points(deviation):.2f}")


def _signed(points: float, digits: int) -> str:
    return f"{round(points, digits) + 0.0:+.{digits}f}".replace("-", "−")


def _span(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def _networks(number: int) -> str:
    return f"{number} networks" if number > 1 else "one network"
