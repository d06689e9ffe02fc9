"""Put what the papers printed beside what metrics/published holds, and compare methods on the same footing.

Reads references/published.csv, published/params.yaml and the measured cells; imports no torch.
"""

import argparse
from pathlib import Path

import pandas as pd

from stages import paths
from tailcal import lock, published
from tailcal.errors import run
from tailcal.files import write_text

REFERENCES = Path("references/published.csv")
SETTINGS = Path("published/params.yaml")
MEASURED = Path("metrics/published")
TEXT = MEASURED / "tables.md"
ROWS = MEASURED / "tables.csv"
PAIRS = MEASURED / "footing.csv"


def main() -> None:
    # Not the folder: the cells in it are another program's.
    with lock.alone(paths.LOCKS, TEXT, ROWS, PAIRS):
        tables()


def tables() -> None:
    """Write the three files. Raises UserError when one that is read is missing or wrong."""
    cells = published.read_measured(MEASURED)
    papers = published.compare(published.read_references(REFERENCES), cells)
    footings = [
        published.footing_table(name, footing, cells) for name, footing in published.read_footings(SETTINGS).items()
    ]
    sections = [published.published_markdown(name, rows, _command(name)) for name, rows in papers.items()]
    sections += [published.footing_markdown(table, _command(table.name)) for table in footings]
    write_text(TEXT, "\n".join([published.INTRODUCTION, *sections]))
    _write(ROWS, published.comparison_rows(papers))
    _write(PAIRS, published.pair_rows(footings))


def _command(table: str) -> str:
    return f"python -m stages.published --table {table}"


def _write(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m stages.tables", description=__doc__).parse_args()
    run(main)
