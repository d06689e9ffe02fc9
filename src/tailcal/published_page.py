"""The published tables and those of one footing in Markdown."""

import re
from collections.abc import Iterable

from tailcal.published import CONFIDENCE, MISS, RESAMPLES, Comparison, FootingTable, Measured, Method, Numbers, points
from tailcal.references import TITLES
from tailcal.tables import DASH, MARK, Table

INTRODUCTION = f"""\
# Published tables, and the same footing

Made by `python -m stages.tables` from `references/published.csv` and the files below `metrics/published/cells`. Top-1
is the accuracy and ECE the expected calibration error, both in %; a point is a percentage point; ± is the standard
deviation over seeds, each seed a network trained anew. "s a network" is the time in seconds that training one network
took, both stages together. {DASH} is a number that was not printed, or not measured.

"Best on test" is the mean over seeds of the best of the last epochs, chosen on the test split, as the papers' released
codes choose the epoch that they report. It is there so that published numbers can be compared like for like: a
diagnostic, not a result. "ECE in those epochs" is the least and the most of any of them and of any seed: of mixup it
changes much from epoch to epoch, so that a difference of ECE says little where the published epoch is another. All else
of ours is of the last epoch; stage 2 too starts from the last epoch of stage 1, where those codes start from the one
that was best on test.
"""


def paper(name: str, rows: list[Comparison], command: str) -> str:
    """One paper's table to read: caption, table, and below it what a reader must know.

    command: what runs the cells that are missing.
    """
    sources = list(dict.fromkeys((row.reference.source, row.reference.note) for row in rows))
    best = {row.cell.best_on_test.epochs for row in rows if row.best}
    header = ["data set", "method", "published top-1", "published ECE", "our top-1", "difference"]
    header += [f"best on test, last {_span(best)} epochs" if best else "best on test", "our ECE"]
    header += ["ECE in those epochs", "ECE difference"]
    table = Table([*header, "seeds", "s a network", "source"], [_texts(row, sources) for row in rows])
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
    after = [
        _spread(row.best and row.best.top1, row.best and row.best.top1_std),
        _spread(ours and ours.ece, ours and ours.ece_std),
        _between(row.best and row.best.ece_least, row.best and row.best.ece_most),
        _difference(row.ece_difference),
        str(row.cell.seeds) if ours else DASH,
        f"{row.cell.cost.seconds:,.0f}" if ours else DASH,
        f"[{sources.index((published.source, published.note)) + 1}]",
    ]
    return [
        *((text, False) for text in before),
        (_difference(row.difference), row.misses),
        *((text, False) for text in after),
    ]


def _caption(rows: list[Comparison]) -> str:
    measured = [row.cell for row in rows if row.numbers]
    if not measured:
        return "Nothing of this table has been run yet."
    return (
        f"Ours: mean ± standard deviation over seeds, at the last epoch ({_span({cell.epochs for cell in measured})}). "
        "Difference: ours less the published one, in points; of top-1 **bold** where it is more, up or down, than "
        f"{MISS:g} point plus our standard deviation (of one seed: than {MISS:g} point). "
        f"{_conditions((row.reference.dataset, row.cell) for row in rows if row.numbers)}"
    )


def _conditions(measured: Iterable[tuple[str, Measured]]) -> str:
    """Sentences: in which precision and on which machine (data set, cell)s were trained, and on which images."""
    measured = list(measured)
    machines = {
        f"in {cell.precision}, {_networks(cell.cost.at_once)} at a time on {cell.cost.machine}": None
        for _, cell in measured
    }
    drawn = {f"{name} ({cell.data.train_images:,})": None for name, cell in measured if not cell.data.official}
    sentences = [f"Trained {', or '.join(machines)}."]
    if drawn:
        sentences.append(
            f"The training images of {', '.join(drawn)} were taken from a folder and not from the official archive, "
            "whose order decides which are kept: as many a class, but a draw of their own, not the published list."
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
    paragraphs += _otherwise(rows)
    if any(row.numbers and row.numbers.transductive for row in rows):
        paragraphs.append(_TRANSDUCTIVE)
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row.reference.cell, []).append(row.reference.method)
    cells = [f"{', '.join(dict.fromkeys(methods))} = `{cell}`" for cell, methods in names.items()]
    return [*paragraphs, f"The cells of ours: {'; '.join(cells)}."]


def _otherwise(rows: list[Comparison]) -> list[str]:
    """A paragraph that lists the rows whose training differs from the published one; none where none does."""
    others: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if text := _other(row):
            others.setdefault((text, row.reference.dataset), []).append(row.reference.method)
    lines = [f"- {text}: {dataset}, {', '.join(methods)}" for (text, dataset), methods in others.items()]
    return ["Not trained as published:\n\n" + "\n".join(lines)] if lines else []


_TRANSDUCTIVE = f"{MARK} transductive: the prediction for one test image depends on the other test images."


def _missed(row: Comparison) -> str:
    text = f"{_signed(row.difference, 2)} (ours {_spread(row.numbers.top1, row.numbers.top1_std)}, published "
    text += _printed(row.reference.top1)
    if row.best:
        text += f"; best on test {points(row.best.top1):.2f}"
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
    other = [f"{key} {ours[key]} (published {text})" for key, text in published.items() if text not in ("", ours[key])]
    return ", ".join(other + ([] if row.cell.precision == "float32" else [f"in {row.cell.precision}"]))


def overview(papers: dict[str, list[Comparison]], footings: list[FootingTable], command: str) -> str:
    """What a first page shows: each published row that has been measured, and the methods of each footing table.

    command: what measures the rows that are missing.
    """
    rows = [row for table in papers.values() for row in table if row.reference.top1 is not None]
    measured = [row for row in rows if row.numbers]
    said = f"{len(measured)} of the {len(rows)} published numbers have been measured here."
    if len(measured) < len(rows):
        said += f" `{command}` measures all; most take hours each on a few cores, and are work for a GPU."
    parts = [said]
    if measured:
        header = ["data set", "method", "published", "ours", "difference", "published ECE", "our ECE", "ECE difference"]
        table = Table([*header, "seeds", "s a network"], [_short(row) for row in measured])
        parts += [table.markdown().rstrip(), f"{_caption(measured)} {_BEST_ON_TEST}", *_otherwise(measured)]
    for table in footings:
        if table.methods:
            parts += [f"**{table.footing.title}**", _footing_numbers(table.methods).markdown().rstrip()]
            parts.append(_footing_caption(table))
    if any(row.numbers.transductive for row in measured) or any(
        method.numbers.transductive for table in footings for method in table.methods
    ):
        parts.append(_TRANSDUCTIVE)
    return "\n\n".join(parts) + "\n"


_BEST_ON_TEST = (
    "The published numbers are of the epoch that was best on the test split, as the released codes have it; ours are "
    "not, and metrics/published/tables.md has the best of our last epochs beside them."
)


def _short(row: Comparison) -> list[tuple[str, bool]]:
    published, ours = row.reference, row.numbers
    return [
        (published.dataset, False),
        (_marked(published.method, ours), False),
        (_printed(published.top1), False),
        (_spread(ours.top1, ours.top1_std), False),
        (_difference(row.difference), row.misses),
        (_printed(published.ece), False),
        (_spread(ours.ece, ours.ece_std), False),
        (_difference(row.ece_difference), False),
        (str(row.cell.seeds), False),
        (f"{row.cell.cost.seconds:,.0f}", False),
    ]


def footing(table: FootingTable, command: str) -> str:
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
    "the interval, before rounding, excludes 0, for these very networks; each pair is taken for itself, with no "
    "correction for their number. The interval covers the choice of test images, and not that of seeds: their standard "
    "deviation stands in the table above, and where it is as large as a difference, other seeds may turn it round."
)


def _footing_caption(table: FootingTable) -> str:
    cells = [method.cell for method in table.methods]
    backbones = ", ".join(dict.fromkeys(cell.backbone for cell in cells))
    return (
        f"{table.footing.dataset}, {cells[0].test_images:,} test images, {backbones}; mean ± standard deviation over "
        f"seeds, at the last epoch ({_span({cell.epochs for cell in cells})}). All in %, but for the negative "
        "log-likelihood (NLL), which has no unit. Many, medium and few: classes with more than 100, 20 to 100 and "
        f"fewer than 20 training images; {DASH}: there is no such class, or no such number. "
        f"{_conditions((table.footing.dataset, cell) for cell in cells)}"
        + (f" Not the same for all: {table.footing.apart}" if table.footing.apart else "")
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


def _marked(name: str, numbers: Numbers | None) -> str:
    return f"{name} {MARK}" if numbers and numbers.transductive else name


def _printed(percent: float | None) -> str:
    """A published number with the one decimal, or two, that it was printed with."""
    return DASH if percent is None else f"{percent:.2f}".removesuffix("0")


def _spread(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return DASH
    return f"{points(mean):.2f}" + ("" if deviation is None else f" ± {points(deviation):.2f}")


def _between(least: float | None, most: float | None) -> str:
    return DASH if least is None else f"{points(least):.2f} to {points(most):.2f}"


def _difference(points: float | None) -> str:
    return DASH if points is None else _signed(points, 2)


def _signed(points: float, digits: int) -> str:
    return f"{round(points, digits) + 0.0:+.{digits}f}".replace("-", "−")


def _span(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def _networks(number: int) -> str:
    return f"{number} networks" if number > 1 else "one network"
