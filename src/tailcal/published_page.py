"""The published tables and those of one footing in Markdown."""

import re
from collections.abc import Hashable, Iterable
from typing import TypeVar

from tailcal.measured import MeasuredCell, Numbers, Run
from tailcal.published import (
    CONFIDENCE,
    MISS,
    RESAMPLES,
    SEEDS,
    ComparedNumber,
    Comparison,
    FootingRow,
    FootingTable,
    points,
)
from tailcal.references import TITLES
from tailcal.tables import DASH, MARK, Table, bold_if, signed, span

Key = TypeVar("Key", bound=Hashable)

INTRODUCTION = f"""\
# Published tables, and the same footing

Made by `python -m stages.tables` from `references/published.csv` and the files below `metrics/published/cells`. Top-1
is the accuracy and ECE the expected calibration error, both in %. A point is a percentage point. ± is the standard
deviation over seeds; with each seed a network is trained anew. "s per network" is how many seconds it took to train one
network, both stages together. {DASH}: the number was not printed, or not measured.

"Best on test" takes each seed's best epoch among the last ones, chosen on the test split, and is the mean over seeds.
The papers' released codes choose the epoch that they report in that way, so published numbers can be compared with it
like for like. It is a diagnostic, not a result. "ECE there" is the ECE of those epochs, and "ECE in all" the smallest
and the largest ECE of any of the last epochs and of any seed. All other numbers of ours are of the last epoch. Our
stage 2, too, starts from the last epoch of stage 1; the released codes start it from the epoch that was best on test.
"""


def paper(name: str, rows: list[Comparison], command: str) -> str:
    """One paper's table to read: caption, table, and below it what a reader must know.

    command: what runs the cells that are missing.
    """
    sources = list(dict.fromkeys((row.reference.source, row.reference.note) for row in rows))
    best = {row.cell.late_epochs for row in rows if row.best}
    header = ["data set", "method", "published top-1", "published ECE", "our top-1", "difference"]
    header += ["our ECE", "ECE difference"]
    header += [f"best on test, last {span(best)} epochs" if best else "best on test", "ECE there", "ECE in all"]
    table = Table([*header, "seeds", "s per network", "source"], [_texts(row, sources) for row in rows])
    parts = [f"## {TITLES[name]}", _caption(rows), table.markdown().rstrip(), *_below(rows, command)]
    listed = [f"- [{i}] {'; '.join(filter(None, source))}" for i, source in enumerate(sources, start=1)]
    return "\n\n".join([*parts, "Sources:", "\n".join(listed)]) + "\n"


def _texts(row: Comparison, sources: list[tuple[str, str]]) -> list[str]:
    published, ours = row.reference, row.numbers
    return [
        published.dataset,
        _marked(published.method, ours),
        _printed(published.top1),
        _printed(published.ece),
        *_ours(row.top1),
        *_ours(row.ece),
        _spread(row.best and row.best.top1, row.best and row.best.top1_std),
        _spread(row.best and row.best.ece, row.best and row.best.ece_std),
        _between(row.best and row.best.ece_least, row.best and row.best.ece_most),
        str(row.cell.seeds) if ours else DASH,
        f"{row.cell.seconds:,.0f}" if ours else DASH,
        f"[{sources.index((published.source, published.note)) + 1}]",
    ]


def _ours(number: ComparedNumber) -> list[str]:
    """Ours, and its difference from the published number, bold where it misses."""
    difference = DASH if number.difference is None else signed(number.difference)
    return [_spread(number.ours, number.std), bold_if(difference, number.misses)]


def _caption(rows: list[Comparison]) -> str:
    epochs = {row.cell.one.epochs for row in rows if row.numbers}
    if not epochs:
        return "Nothing of this table has been run yet."
    return (
        f"Ours: mean ± standard deviation over seeds, at the last epoch ({span(epochs)}). "
        "Differences: ours minus published, in points; **bold** where larger, up or down, than "
        f"{MISS:g} point plus our standard deviation (with one seed: than {MISS:g} point). "
        f"{_networks_behind([row for row in rows if row.numbers])} "
        f"{_conditions((row.reference.dataset, row.cell) for row in rows if row.numbers)}"
    )


def _networks_behind(measured: list[Comparison]) -> str:
    """A sentence: how many networks of stage 1 there are, since rows that share one do not agree independently."""
    number = len(
        {
            (
                row.reference.dataset,
                row.reference.representation,
                run.provenance.params.representation.model_dump_json(),
                run.seed,
            )
            for row in measured
            for run in row.cell.runs
        }
    )
    return f"Behind these rows stand{'' if number > 1 else 's'} {_networks(number)} of stage 1."


def _conditions(measured: Iterable[tuple[str, MeasuredCell]]) -> str:
    """Sentences: in which precision, on which machine and on which images these (data set, cell) were trained."""
    measured = list(measured)
    return " ".join([_trained(cell for _, cell in measured), *_of_data_sets(measured)])


def _trained(cells: Iterable[MeasuredCell]) -> str:
    """A sentence: in which precision and on which machine."""
    machines = {
        f"in {run.precision}, {_networks(run.cost.at_once)} at a time on {run.cost.machine}{_processes(run)}": None
        for cell in cells
        for run in cell.runs
    }
    return f"Trained {'; or '.join(machines)}."


def _of_data_sets(measured: list[tuple[str, MeasuredCell]]) -> list[str]:
    """Sentences, each of which names its data sets: on which images these (data set, cell) were trained, and whether
    all seeds in one way."""
    sentences = []
    trained_on = {name: run.data.trained_on for name, cell in measured for run in cell.runs if run.data.trained_on}
    if trained_on:
        known = " and ".join(f"{images:,} of {name}" for name, images in trained_on.items())
        sentences.append(f"Of the test images, {known} are in the training split too.")
    data = [(name, cell.one.data) for name, cell in measured]
    if drawn := {f"{name} ({of.train_images:,})": None for name, of in data if not of.official}:
        sentences.append(
            f"The training images of {', '.join(drawn)} were taken from a folder and not from the official archive, "
            "whose order decides which images are kept: they are another draw than the published list."
        )
    for name, keys in {(name, ", ".join(cell.made_differently)): None for name, cell in measured}:
        if keys:
            sentences.append(f"Of {name}, some seeds of a cell were trained apart, and their files differ in {keys}.")
    return sentences


def _processes(run: Run) -> str:
    return f" by {run.provenance.processes} processes" if run.provenance.processes > 1 else ""


def _below(rows: list[Comparison], command: str) -> list[str]:
    """The paragraphs below a paper's table."""
    paragraphs = []
    if missing := [row for row in rows if row.numbers is None]:
        paragraphs.append(
            f"{DASH} in ours: {len(missing)} of {len(rows)} rows have not been measured. `{command}` runs them."
        )
    compared = [row for row in rows if (row.top1.difference, row.ece.difference) != (None, None)]
    off = f"Rows off by more than {MISS:g} point plus our standard deviation"
    if missed := [row for row in compared if row.top1.misses or row.ece.misses]:
        lines = [f"- {row.reference.dataset}, {row.reference.method}: {_missed(row)}" for row in missed]
        paragraphs.append(f"{off}, in top-1 or ECE: {len(missed)} of {len(compared)}.\n\n" + "\n".join(lines))
    elif compared:
        paragraphs.append(f"{off}, in top-1 or ECE: none of {len(compared)}.")
    paragraphs += _otherwise(rows)
    if any(row.numbers and row.numbers.transductive for row in rows):
        paragraphs.append(_TRANSDUCTIVE)
    cells = _grouped((row.reference.cell, row.reference.method) for row in rows)
    said = "; ".join(f"{methods} = `{cell}`" for cell, methods in cells.items())
    return [*paragraphs, f"Our cells: {said}."]


def _otherwise(rows: list[Comparison]) -> list[str]:
    """A paragraph that lists the rows whose training differs from the published one; none where none does."""
    others = _grouped(((text, row.reference.dataset), row.reference.method) for row in rows if (text := _other(row)))
    lines = [f"- {text}: {dataset}, {methods}" for (text, dataset), methods in others.items()]
    return ["Not trained as published:\n\n" + "\n".join(lines)] if lines else []


_TRANSDUCTIVE = f"{MARK} transductive: the prediction for one test image depends on the other test images."


def _missed(row: Comparison) -> str:
    """By how much, of what: top-1, ECE or both."""
    best, said = row.best, []
    for name, number, of_best in (("top-1", row.top1, best and best.top1), ("ECE", row.ece, best and best.ece)):
        if number.misses:
            there = f"; at the epoch that is best on test {points(of_best):.2f}" if best else ""
            told = f"(ours {_spread(number.ours, number.std)}, published {_printed(number.published)}{there})"
            said.append(f"{name} {signed(number.difference)} {told}")
    return ", ".join(said)


def _other(row: Comparison) -> str:
    """In what our training differs from the published one, as far as the two say; nothing where it does not."""
    if row.cell is None:
        return ""
    published = {
        "epochs": re.match(r"\d*", row.reference.epochs)[0],  # of 200+10 those of stage 1
        "backbone": row.reference.backbone.lower().replace("-", "").partition(" ")[0],
    }
    one = row.cell.one
    ours = {"epochs": str(one.epochs), "backbone": one.backbone}
    other = [f"{key} {ours[key]} (published {text})" for key, text in published.items() if text not in ("", ours[key])]
    return ", ".join(other + ([] if one.precision == "float32" else [f"in {one.precision}"]))


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
        table = Table([*header, "seeds", "s per network"], [_short(row) for row in measured])
        parts += [table.markdown().rstrip(), f"{_caption(measured)} {_BEST_ON_TEST}", *_otherwise(measured)]
        parts += _noted(measured)
    if found := [table for table in footings if table.rows]:
        parts += _footings(found)
    if any(row.numbers.transductive for row in [*measured, *(row for table in found for row in table.rows)]):
        parts.append(_TRANSDUCTIVE)
    return "\n\n".join(parts) + "\n"


def _footings(tables: list[FootingTable]) -> list[str]:
    """The paragraphs of an overview's footing tables: first what holds of all of them, and then each with its own."""
    trained = [_trained(row.cell for row in table.rows) for table in tables]
    shared = set(trained) if len(set(trained)) == 1 else set()
    images = _of_data_sets([(table.footing.dataset, row.cell) for table in tables for row in table.rows])
    parts = [" ".join(["Each table below compares methods on one footing.", _LEGEND, *shared, *images])]
    for table, how in zip(tables, trained, strict=True):
        parts += [f"**{table.footing.title}**", _footing_numbers(table.rows).markdown().rstrip()]
        parts.append(" ".join([_footing_setup(table), *({how} - shared), *_footing_caveats(table)]))
    return parts


def _noted(measured: list[Comparison]) -> list[str]:
    """A paragraph of what the references note of these rows; none where they note nothing."""
    notes = _grouped((row.reference.note, row.reference.method) for row in measured if row.reference.note)
    lines = [f"- {methods}: {note}" for note, methods in notes.items()]
    return ["Of the published numbers:\n\n" + "\n".join(lines)] if lines else []


_BEST_ON_TEST = (
    "The published numbers are of the epoch that was best on the test split, as the released codes choose it. Ours are "
    "not; metrics/published/tables.md shows the best of our last epochs beside them."
)


def _short(row: Comparison) -> list[str]:
    published = row.reference
    return [
        published.dataset,
        _marked(published.method, row.numbers),
        _printed(published.top1),
        *_ours(row.top1),
        _printed(published.ece),
        *_ours(row.ece),
        str(row.cell.seeds),
        f"{row.cell.seconds:,.0f}",
    ]


def footing(table: FootingTable, command: str) -> str:
    """A footing table to read, and the matrix of its pairs; one line where nothing has been run.

    command: what runs the cells that are missing.
    """
    title, found = f"## {table.footing.title}", table.rows
    if not found:
        return f"{title}\n\nNot run yet: `{command}` runs it.\n"
    parts = [title, _footing_caption(table), _footing_numbers(found).markdown().rstrip()]
    if table.missing:
        parts.append(f"Not run yet: {', '.join(table.missing)}. `{command}` runs what is missing.")
    if any(row.numbers.transductive for row in found):
        parts.append(_TRANSDUCTIVE)
    if table.pairs:
        parts += [_PAIRS, _matrix(table).markdown().rstrip()]
        if left := [row.name for row in found if row.correct is None]:
            parts.append(f"Not in the matrix, since their predictions were not kept image by image: {', '.join(left)}.")
    return "\n\n".join(parts) + "\n"


_PAIRS = (
    f"Top-1 of the row minus that of the column, in points, mean over seeds. Below it is the {CONFIDENCE:.0%} "
    f"percentile interval of a paired bootstrap ({RESAMPLES:,} resamples of the test images, the same for all pairs). "
    "**Bold**: the interval, before rounding, excludes 0, and all seeds of the one are more accurate than all seeds of "
    f"the other, {SEEDS} or more of each. The interval covers the choice of test images, not that of seeds, and each "
    "pair is taken by itself: nothing corrects for their number."
)


_LEGEND = (
    "Accuracies and ECE are in %; the negative log-likelihood (NLL) has no unit. Many, medium and few are classes with "
    f"more than 100, 20 to 100 and fewer than 20 training images. {DASH}: there is no such class, or no such number."
)


def _footing_caption(table: FootingTable) -> str:
    conditions = _conditions((table.footing.dataset, row.cell) for row in table.rows)
    return " ".join([_footing_setup(table), _LEGEND, conditions, *_footing_caveats(table)])


def _footing_setup(table: FootingTable) -> str:
    """A sentence: what is the same of all rows."""
    one = table.rows[0].cell.one
    return (
        f"{table.footing.dataset}, {one.test_images:,} test images, {one.backbone}; mean ± standard deviation over "
        f"seeds, at the last epoch ({one.epochs}{_stage2(table.rows)})."
    )


def _footing_caveats(table: FootingTable) -> list[str]:
    """Sentences that tell the rows apart; none where all are trained alike, of the same seeds."""
    rows = _grouped((", ".join(str(run.seed) for run in row.cell.runs), row.name) for row in table.rows)
    each = "; ".join(f"{seeds}: {names}" for seeds, names in rows.items())
    sentences = [f"Not the same for all rows: {table.footing.apart}"] if table.footing.apart else []
    return sentences + ([f"Seeds: {each}."] if len(rows) > 1 else [])


def _stage2(found: list[FootingRow]) -> str:
    """What rows with a second stage train longer than the others; nothing where there are none."""
    longer = _grouped((row.cell.stage2, row.trained) for row in found if row.cell.stage2)
    return "".join(f"; stage 2 takes {budget} more: {names}" for budget, names in longer.items())


def _footing_numbers(found: list[FootingRow]) -> Table:
    alike = len({row.cell.at_once for row in found}) == 1  # networks side by side take longer each
    header = ["no.", "method", "top-1", "many", "medium", "few", "ECE", "NLL", "seeds", "s per network"]
    rows = [
        [
            str(number),
            _marked(row.name, row.numbers),
            _spread(row.numbers.top1, row.numbers.top1_std),
            *(_spread(getattr(row.numbers, group), None) for group in ("many", "medium", "few")),
            _spread(row.numbers.ece, row.numbers.ece_std),
            DASH if row.numbers.nll is None else f"{row.numbers.nll:.3f}",
            str(row.cell.seeds),
            f"{row.cell.seconds:,.0f}" + ("" if alike else f", {row.cell.at_once} at a time"),
        ]
        for number, row in enumerate(found, start=1)
    ]
    return Table(header, rows)


def _matrix(table: FootingTable) -> Table:
    """The pairs: one row per method, one column per method's number. Each pair stands once; turned round, it is the
    same negated."""
    texts = {
        (pair.row, pair.column): bold_if(
            f"{signed(100 * pair.difference, 1)}<br>{signed(100 * pair.low, 1)} to {signed(100 * pair.high, 1)}",
            pair.excludes_zero and pair.seeds_apart,
        )
        for pair in table.pairs
    }
    rows = list(dict.fromkeys(row for row, _ in texts))
    columns = list(dict.fromkeys(column for _, column in texts))
    return Table(
        ["no.", "method", *(str(column + 1) for column in columns)],
        [
            [
                str(row + 1),
                _marked(table.rows[row].name, table.rows[row].numbers),
                *(texts.get((row, column), "") for column in columns),
            ]
            for row in rows
        ],
    )


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, str]:
    """{key: its names}: each name once, a comma between two; keys and names in the order in which they first come."""
    groups: dict[Key, dict[str, None]] = {}
    for key, name in pairs:
        groups.setdefault(key, {})[name] = None
    return {key: ", ".join(names) for key, names in groups.items()}


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


def _networks(number: int) -> str:
    return f"{number} networks" if number > 1 else "one network"
