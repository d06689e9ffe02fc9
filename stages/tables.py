"""Put what the papers printed beside what metrics/published holds, and compare methods on the same footing.

Reads references/published.csv, the measured cells, and the parameters that these must be of.
"""

from pathlib import Path

import pandas as pd

from stages import official, paths
from tailcal import lock, measured, params, plan, published, published_page, references
from tailcal.errors import CommandLine, run
from tailcal.files import write_json, write_text

TEXT = Path("metrics/published/tables.md")
ROWS = Path("metrics/published/tables.csv")
PAIRS = Path("metrics/published/footing.csv")
SUMMARY = Path("metrics/published/summary.json")
EVERYTHING = "dvc repro --force published/dvc.yaml"


def main() -> None:
    with lock.alone(paths.LOCKS, TEXT, ROWS, PAIRS, SUMMARY, paths.OVERVIEW):
        tables()


def tables() -> None:
    """Write the five files. Raises UserError when one that is read is missing or wrong."""
    chosen, p = plan.load(params.load())
    cells = measured.read_measured(paths.PUBLISHED, chosen)
    runs = {measured.run_file(paths.PUBLISHED, cell, run.seed): run for cell in cells for run in cells[cell].runs}
    official.require_planned(runs, p)
    printed = references.read_references(references.REFERENCES)
    published.require_known(printed, chosen, p.evaluate.posthoc)
    papers = published.compare(printed, cells)
    footings = [published.footing_table(name, footing, cells) for name, footing in chosen.footing.items()]
    sections = [published_page.paper(name, rows, _command(name)) for name, rows in papers.items()]
    sections += [
        published_page.footing(table, _command(table.footing.table, table.footing.dataset)) for table in footings
    ]
    write_text(TEXT, "\n".join([published_page.INTRODUCTION, *sections]))
    write_text(paths.OVERVIEW, published_page.overview(papers, footings, EVERYTHING))
    write_json(SUMMARY, published.summary(cells))
    _write(ROWS, published.comparison_rows(papers))
    _write(PAIRS, published.pair_rows(footings))


def _command(table: str, dataset: str | None = None) -> str:
    narrow = f" --dataset {dataset}" if dataset else ""
    return f"python -m stages.published --table {table}{narrow} --missing"


def _write(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    CommandLine("stages.tables", __doc__).parse_args()
    run(main)
