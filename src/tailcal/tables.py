"""The numbers of the grid's cells as rows, summaries and tables to read. Fractions in, percent only in what is read."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from tailcal import posthoc
from tailcal.cell import CellName
from tailcal.duplicates import TWICE
from tailcal.metrics.cell import HEADLINE

DASH = "—"
MARK = "†"  # behind the name of a transductive rule
TEMPERATURE = "temperature"  # the rule
AS_TRAINED = "none"  # the plain predictions, as the tables name them among the post-hoc rules
NUMBERS = (
    "top1",
    "top5",
    "many",
    "medium",
    "few",
    "confidence",
    "ece",
    "ece_floor",
    "ece_many",
    "ece_medium",
    "ece_few",
    "mce",
    "ace",
    "classwise_ece",
    "nll",
    "brier",
)
LISTED_CLASSES = 100  # of more classes than this, the page lists only the WORST_CLASSES
WORST_CLASSES = 50
LARGE = 1000  # what is written in powers of ten, so that a network that diverged does not widen its column
SPREAD_CELLS = 8  # with more cells than this, deviations beside every accuracy no longer fit


@dataclass(frozen=True)
class Cell:
    """One cell of the grid, as the stage evaluate left it."""

    dataset: str
    representation: str
    classifier: str
    metrics: dict[str, Any]
    bins: pd.DataFrame  # reliability.csv
    classes: pd.DataFrame  # per_class.csv

    @property
    def name(self) -> str:
        """How a picture or an axis calls it."""
        return f"{self.representation}/{self.classifier}"

    @property
    def full_name(self) -> CellName:
        """With the data set."""
        return CellName(self.dataset, self.representation, self.classifier)

    def variants(self) -> dict[str, dict[str, Any]]:
        """The numbers AS_TRAINED, then those after each post-hoc rule that could be applied, by rule."""
        return {AS_TRAINED: self.metrics} | self.metrics["posthoc"]


@dataclass(frozen=True)
class Column:
    """A column of a table to read: where its number comes from, how it is written, and which value is the best (None:
    there is no best)."""

    title: str
    number: str
    posthoc: str = AS_TRAINED
    best: Callable[[Iterable[float]], float] | None = max
    percent: bool = True
    spread: bool = True

    def mean(self, cell: Cell) -> float | None:
        """The mean as it is shown, rounded; None when the group is empty or the rule absent."""
        value = cell.variants().get(self.posthoc, {}).get(self.number)
        return None if value is None else self._shown(value)

    def text(self, cell: Cell) -> str:
        """The mean, and the standard deviation where several seeds give one."""
        mean = self.mean(cell)
        if mean is None:
            return DASH
        deviation = cell.variants()[self.posthoc].get(f"{self.number}_std") if self.spread else None
        return self._written(mean) + ("" if deviation is None else f" ± {self._written(self._shown(deviation))}")

    def score(self, cell: Cell) -> float | None:
        """What the best is found by: the mean as it is shown, but 0 for an ECE that is not above its floor, as of two
        such the lower is no better. None where there is no number, or the small ECE of near equal probabilities, which
        a temperature at its bound leaves."""
        mean = self.mean(cell)
        if mean is None or (self.posthoc == TEMPERATURE and _at_bound(cell)):
            return None
        floor = replace(self, number="ece_floor").mean(cell) if self.number == "ece" else None
        return 0.0 if floor is not None and mean <= floor else mean

    def best_score(self, scores: Iterable[float | None]) -> float | None:
        """The best of what `score` gave; None where there is no best, or fewer than two to compare."""
        present = [score for score in scores if score is not None]
        return self.best(present) if self.best and len(present) > 1 else None

    def _written(self, value: float) -> str:
        digits = 2 if self.percent else 3
        return f"{value:.{digits}f}" if abs(value) < LARGE else f"{value:.2g}"

    def _shown(self, value: float) -> float:
        return round(100 * value, 2) if self.percent else round(value, 3)


class Bold(str):
    """A text of a table that stands out: the best of its column or row, or a difference that counts."""


def bold_if(text: str, stands_out: bool) -> str:
    """The text, as Bold where it stands out."""
    return Bold(text) if stands_out else text


@dataclass(frozen=True)
class Table:
    """A table to read: titles, and rows of texts, of which some are Bold."""

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        rule = ["---", "---"] + ["--:"] * (len(self.header) - 2)
        body = [[f"**{text}**" if isinstance(text, Bold) else text for text in row] for row in self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in [self.header, rule, *body])


MAIN = (
    Column("top-1", "top1"),
    Column("many", "many"),
    Column("medium", "medium"),
    Column("few", "few"),
    Column("ECE", "ece", best=min),
    Column("ECE floor", "ece_floor", best=None, spread=False),
    Column("ECE after temperature", "ece", posthoc=TEMPERATURE, best=min),
    Column("ECE floor after it", "ece_floor", posthoc=TEMPERATURE, best=None, spread=False),
    Column("NLL", "nll", best=min, percent=False),
)
# What the page shows of every post-hoc rule, one table each; seven rules side by side leave no room for deviations.
POSTHOC = (
    Column("ECE, %", "ece", best=min, spread=False),
    Column("NLL", "nll", best=min, percent=False, spread=False),
    Column("Top-1 accuracy, %", "top1", spread=False),
    Column("Few-shot accuracy, %", "few", spread=False),
)


def table(cells: list[Cell]) -> Table:
    """One row per cell. The best of a column is bold when there are two to compare; equal as shown is equally good, and
    so are ECEs that are not above their floor."""
    body = [[cell.representation, cell.classifier] for cell in cells]
    for column in MAIN:
        scores = [column.score(cell) for cell in cells]
        best = column.best_score(scores)
        many = 2 * scores.count(best) > len(cells)  # what most have reached tells nobody apart
        for row, cell, score in zip(body, cells, scores, strict=True):
            row.append(bold_if(column.text(cell), score is not None and score == best and not many))
    return Table(["representation", "classifier", *(column.title for column in MAIN)], body)


def rules(cells: list[Cell]) -> list[str]:
    """AS_TRAINED, and the post-hoc rules that could be applied to any of the cells."""
    return list(dict.fromkeys(rule for cell in cells for rule in cell.variants()))


def transductive(cells: list[Cell]) -> set[str]:
    """The post-hoc rules whose prediction for one test sample depends on the other test samples."""
    return {rule for cell in cells for rule, numbers in cell.variants().items() if numbers.get("transductive", False)}


def posthoc_tables(cells: list[Cell]) -> dict[str, Table]:
    """One table per number, by its title: one row per cell, one column per post-hoc rule. {} when none was applied.

    The best of a row is bold, among the rules that treat one sample at a time. A transductive one knows more: it
    carries MARK and does not compete.
    """
    applied = rules(cells)
    if len(applied) == 1:
        return {}
    marked = transductive(cells)
    titles = [f"{spaced(rule)} {MARK}" if rule in marked else spaced(rule) for rule in applied]
    return {
        number.title: Table(
            ["representation", "classifier", *titles],
            [[cell.representation, cell.classifier, *_by_rule(cell, number, applied, marked)] for cell in cells],
        )
        for number in POSTHOC
    }


def _by_rule(cell: Cell, number: Column, applied: list[str], marked: set[str]) -> list[str]:
    """One row of a table of `posthoc_tables`, after the names; the rules `marked` do not compete."""
    columns = {rule: replace(number, posthoc=rule) for rule in applied}
    scores = {rule: columns[rule].score(cell) for rule in applied if rule not in marked}
    best = number.best_score(scores.values())
    return [bold_if(columns[rule].text(cell), best is not None and scores.get(rule) == best) for rule in applied]


def class_table(cells: list[Cell]) -> Table:
    """One row per class, from the most to the least frequent, one column per cell: test accuracy in %, nothing bold.

    Of more than LISTED_CLASSES these are the WORST_CLASSES: those of the lowest accuracy, averaged over the cells.
    """
    classes = cells[0].classes
    accuracies = pd.concat([cell.classes.set_index("class")["accuracy"] for cell in cells], axis=1)
    if len(classes) > LISTED_CLASSES:
        worst = accuracies.mean(axis=1).nsmallest(WORST_CLASSES).index
        classes = classes[classes["class"].isin(worst)]
    ranked = classes.sort_values("train_count", ascending=False, kind="stable")
    texts = [_by_class(cell, spread=len(cells) <= SPREAD_CELLS) for cell in cells]
    body = [
        [row.group, row.name, str(row.number), str(row.train), str(row.test), *(text[row.number] for text in texts)]
        for row in ranked.rename(columns={"class": "number", "train_count": "train", "test_count": "test"}).itertuples()
    ]
    header = ["shot group", "class", "number", "training images", "test images"]
    header += [f"{cell.representation}\N{NO-BREAK SPACE}/ {cell.classifier}" for cell in cells]  # breaks behind the /
    return Table(header, body)


def _by_class(cell: Cell, spread: bool) -> dict[int, str]:
    """One cell's accuracies as `class_table` writes them, by the class's number."""
    percent = 100 * cell.classes.set_index("class")[["accuracy", "accuracy_std"]].astype(float)
    return {
        number: f"{mean:.1f}" + (f" ± {deviation:.1f}" if spread and pd.notna(deviation) else "")
        for number, mean, deviation in percent.itertuples()
    }


def rows(cells: list[Cell]) -> list[dict[str, Any]]:
    """metrics/table.csv: one row per cell and post-hoc rule, the plain predictions first."""
    return [
        {
            "dataset": cell.dataset,
            "representation": cell.representation,
            "classifier": cell.classifier,
            "posthoc": rule,
            "transductive": numbers.get("transductive", False),
            "seeds": cell.metrics["seeds"],
            **{key: numbers.get(key) for name in NUMBERS for key in (name, f"{name}_std")},
        }
        for cell in cells
        for rule, numbers in cell.variants().items()
    ]


def summary(cells: list[Cell]) -> dict[str, float | None]:
    """metrics/summary.json, one data set: means over its cells, without post-hoc rules.

    A best cell is not named here: choosing one by these numbers would be choosing on the test split.
    """
    values = {name: [cell.metrics[name] for cell in cells] for name in HEADLINE}
    return {f"mean_{name}": None if None in each else round(sum(each) / len(each), 4) for name, each in values.items()}


def caption(cells: list[Cell], epochs: Iterable[int]) -> str:
    """What the table of one data set was measured on, counted in the files themselves.

    `epochs` are the last epochs of stage 1, one per representation.
    """
    counts, bins = cells[0].classes["train_count"], cells[0].bins
    tests = bins.loc[bins["seed"] == bins["seed"].iloc[0], "count"].sum()
    dataset = cells[0].metrics["provenance"]["params"]["dataset"]
    imbalance = dataset["imbalance"]
    held_out = len(counts) * dataset.get("holdout_per_class", 0)
    # A natural tail is not cut to a factor; floors make one that is cut differ a little from its factor.
    factor = float(f"{imbalance.get('factor') or counts.max() / counts.min():.3g}")
    seeds = span({cell.metrics["seeds"] for cell in cells})
    over = f"mean ± standard deviation over {seeds} seeds" if seeds != "1" else "one seed"
    return (
        f"{cells[0].dataset}: {imbalance['profile']} profile, imbalance factor {factor:,.10g} "
        f"({len(counts)} classes of {counts.max()} to {counts.min()} training images, {counts.sum()} in all; "
        f"{_groups(cells[0].classes)}), {f'{held_out} held-out and ' if held_out else ''}{tests} test images; {over}, "
        f"at the last epoch ({span(set(epochs))}); accuracies and ECE ({bins['bin_lower'].nunique()} bins) in %. "
        "ECE floor: what chance alone gives a perfectly calibrated classifier of these confidences on so few images."
    )


def _groups(classes: pd.DataFrame) -> str:
    """How many classes each shot group has."""
    sizes = classes["group"].value_counts()
    return ", ".join(f"{sizes[group]} {group}" for group in ("many", "medium", "few") if group in sizes)


def notes(cells: list[Cell]) -> list[str]:
    """Sentences that a table needs: for cells that are worse than a guess or say nothing, for a temperature that does
    harm, for a test split that is not balanced, for images that are left out or are there twice, and for each reason
    why rules are absent."""
    reasons = {rule: reason for cell in cells for rule, reason in cell.metrics["posthoc_absent"].items()}
    absent = [
        f"No {', '.join(spaced(rule) for rule in reasons if reasons[rule] == reason)}: {reason.rstrip('.')}."
        for reason in dict.fromkeys(reasons.values())
    ]
    return [
        *_guess_notes(cells),
        *_bound_notes(cells),
        *_harm_notes(cells),
        *_balance_notes(cells[0].classes),
        *_image_notes(**cells[0].metrics["images"]),
        *absent,
    ]


def _guess_notes(cells: list[Cell]) -> list[str]:
    """What to say of cells whose NLL is above that of equal probabilities: it is their confidence alone that is wrong
    where it is not after a temperature."""
    guess = math.log(len(cells[0].classes))
    worse = [cell for cell in cells if _nll(cell.metrics) > guess]
    tempered = {cell.name: cell.variants()[TEMPERATURE] for cell in worse if TEMPERATURE in cell.variants()}
    lost = [name for name, numbers in tempered.items() if _nll(numbers) > guess]
    sure = [name for name in tempered if name not in lost]
    unknown = [cell.name for cell in worse if cell.name not in tempered]
    return [
        f"{title}: the NLL of {', '.join(names)} is above ln K = {guess:.3f}, that of equal probabilities{advice}"
        for title, names, advice in (
            ("Worse than a guess", lost, ". Look at the training's loss: a lower learning rate usually mends it."),
            ("Much too sure", sure, "; after a temperature it is not."),
            ("Much too sure, or lost", unknown, "; without a temperature nothing tells which."),
        )
        if names
    ]


def _bound_notes(cells: list[Cell]) -> list[str]:
    """What to say of cells whose temperature ended at its bound."""
    names = ", ".join(cell.name for cell in cells if _at_bound(cell))
    return [f"The temperature of {names} ended at its bound: the ECE after it says nothing."] if names else []


def _harm_notes(cells: list[Cell]) -> list[str]:
    """What to say of cells whose ECE the temperature raised by more than chance alone gives."""
    names = ", ".join(cell.name for cell in cells if _harmed(cell) and not _at_bound(cell))
    advice = "too few images are held out, or they are unlike those of the test split"
    return [f"The temperature made the ECE of {names} worse, by more than the floor: {advice}."] if names else []


def _harmed(cell: Cell) -> bool:
    after = cell.metrics["posthoc"].get(TEMPERATURE, {})
    error, floor = after.get("ece"), after.get("ece_floor")
    return error is not None and floor is not None and error - cell.metrics["ece"] > floor


def _at_bound(cell: Cell) -> bool:
    fitted = cell.metrics["posthoc"].get(TEMPERATURE, {}).get("temperature")
    return fitted is not None and posthoc.at_bound(fitted)


def _nll(numbers: dict[str, Any]) -> float:
    """The NLL, 0 where there is none."""
    return numbers.get("nll") or 0.0


def _balance_notes(classes: pd.DataFrame) -> list[str]:
    """What to say of a test split that has not as many images of each class."""
    fewest, most = classes["test_count"].min(), classes["test_count"].max()
    if fewest == most:
        return []
    return [
        f"The test split is not balanced ({fewest:,} to {most:,} images of a class): top-1, ECE and NLL weigh classes "
        "by that, and rules that are fitted on a hold-out, which is balanced, or that take the test split for balanced "
        "need not suit it."
    ]


def _image_notes(skipped: dict[str, int], duplicates: dict[str, int]) -> list[str]:
    """What to say of a data set's images, counted as `splits.Meta` has them."""
    found = [f"{duplicates[which]:,} {what}" for which, what in TWICE.items() if duplicates.get(which)]
    lost = [f"{number:,} of the {split} split" for split, number in skipped.items() if number]
    return [
        *([f"There twice: {'; '.join(found)}."] if found else []),
        *([f"Images that could not be read are left out: {', '.join(lost)}."] if lost else []),
    ]


def markdown(cells: list[Cell], epochs: Iterable[int]) -> str:
    """metrics/table.md, one data set: caption, table, notes."""
    return "\n".join([caption(cells, epochs) + "\n", table(cells).markdown(), *(f"{note}\n" for note in notes(cells))])


def spaced(rule: str) -> str:
    """A rule's name as it is written in a table."""
    return rule.replace("_", " ")


def signed(points: float, digits: int = 2) -> str:
    """A difference with its sign, rounded; it has a minus and no hyphen, and never that of a zero."""
    return f"{round(points, digits) + 0.0:+.{digits}f}".replace("-", "−")


def span(values: set[int]) -> str:
    """The one value, or the least and the greatest of several: "200", "10 to 20"."""
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"
