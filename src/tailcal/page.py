"""plots/report.html: one self-contained page, pictures inside it, nothing fetched from anywhere."""

import base64
from pathlib import Path
from typing import Any

import jinja2

from tailcal import posthoc, tables
from tailcal.lineage import flat
from tailcal.tables import Cell

CAPTIONS = {
    "reliability": "Accuracy against confidence: a line ends each bar at its accuracy; hatched is the way from there "
    "to the confidence, in red where a cell is overconfident, in purple where it is underconfident. Of several seeds, "
    "bars pool the predictions, and an ECE is the mean of the seeds' own.",
    "accuracy_ece": "Top-1 accuracy against ECE: the lower right is best. Of several seeds, bars are one standard "
    "deviation.",
    "class_counts": "Training images per class, coloured by shot group.",
    "per_class": "Test accuracy from the most to the least frequent class; of several seeds the mean, with bars of one "
    "standard deviation where classes are named.",
    "training": "Stage 1; of several seeds the mean, and the range as a band. Losses of different representations "
    "are different functions, each with a scale of its own: compare shapes, not heights. Those of fsgl and glmc may be "
    "below zero, as their consistency term is a negative cosine.",
}


def section(cells: list[Cell], epochs: list[int], figures: dict[str, Path], diagrams: list[Path]) -> dict[str, Any]:
    """What the page says about one data set.

    `figures` are the pictures by the names of CAPTIONS; `diagrams` the reliability diagrams, one per cell.
    """
    classes, number = tables.class_table(cells), len(cells[0].classes)
    worst = f"the {len(classes.rows)} classes of the lowest accuracy, averaged over the cells, among the {number:,}"
    provenance = [flat(cell.metrics["provenance"]) for cell in cells]
    common = set.intersection(*(set(facts.items()) for facts in provenance))
    shared = {key: value for key, value in provenance[0].items() if (key, value) in common}
    applied = [rule for rule in tables.rules(cells) if rule in posthoc.RULES]
    return {
        "dataset": cells[0].dataset,
        "caption": tables.caption(cells, epochs),
        "table": tables.table(cells),
        "notes": tables.notes(cells),
        "posthoc": tables.posthoc_tables(cells),
        "rules": {tables.spaced(rule): posthoc.RULES[rule].says for rule in applied},
        "transductive": bool(tables.transductive(cells)),
        "classes": classes,
        "listed": worst if len(classes.rows) < number else "every class",
        "figures": [{"caption": CAPTIONS[name], "image": _encoded(path)} for name, path in figures.items()],
        "shared": shared,
        "representations": list(dict.fromkeys(cell.representation for cell in cells)),
        "cells": [
            {
                "representation": cell.representation,
                "name": cell.name,
                "image": _encoded(diagram),
                "own": {key: value for key, value in facts.items() if key not in shared},
            }
            for cell, diagram, facts in zip(cells, diagrams, provenance, strict=True)
        ],
    }


def render(grid: Any, sections: list[dict[str, Any]]) -> str:
    """The page. `grid` has the lists datasets, representations and classifiers."""
    return _fill("report.html", grid=grid, sections=sections, mark=tables.MARK)


def render_costs(rows: list[dict[str, Any]]) -> str:
    """The page of what the trainings took, from `tailcal.costs.rows`."""
    return _fill("costs.html", rows=rows)


def _fill(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["bold"] = lambda text: isinstance(text, tables.Bold)
    return environment.get_template(template).render(**values) + "\n"


def _encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()
