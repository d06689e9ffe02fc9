"""references/published.csv: what papers printed, with sources. Percent. Imports no torch."""

import csv
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tailcal.errors import UserError
from tailcal.plan import cell_name

REFERENCES = Path("references/published.csv")
TITLES = {
    "mislas": "MiSLAS (Zhong et al. 2021)",
    "marc": "MARC (Wang et al. 2022)",
    "bagmar": "BaGMar, also called GALA (Zhang et al. 2024)",
    "fsgl": "FSGL (2024), and GLMC (Du et al. 2023)",
}


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
        return cell_name(self.representation, self.classifier, self.rule)


COLUMNS = [field.name for field in fields(Reference)]
OPTIONAL = ("rule", "backbone", "epochs", "top1", "ece", "note")
PERCENT = ("top1", "ece")


def read_references(path: Path) -> list[Reference]:
    """The published numbers, in the file's order. Raises UserError naming file and line for whatever is wrong in it."""
    lines = _lines(path)
    _check_columns(lines[0][1], f"{path} line 1")
    references, seen = [], {}
    for number, line in lines[1:]:
        reference = _reference(line, f"{path} line {number}")
        # A number that was printed in a table and came with a checkpoint too has two sources, and is two rows.
        key = tuple(getattr(reference, column) for column in COLUMNS if column not in (*PERCENT, "note"))
        if key in seen:
            raise UserError(f"{path} line {number}: repeats line {seen[key]}: the same method, data set and source")
        seen[key] = number
        references.append(reference)
    return references


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Each line with its number. A field goes over no line's end: a stray quotation mark would swallow what follows."""
    lines = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            for line in reader:
                if reader.line_num != len(lines) + 1:
                    raise UserError(f"{path} line {len(lines) + 1}: a quotation mark is not closed in its line")
                lines.append((reader.line_num, line))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: take it from git again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: must be text in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path} line {len(lines) + 1}: not valid CSV: {error}") from None
    if not lines:
        raise UserError(f"{path}: is empty: take it from git again")
    return lines


def _check_columns(columns: list[str], where: str) -> None:
    if columns == COLUMNS:
        return
    wrong = [f"unknown column {column}" for column in columns if column not in COLUMNS]
    wrong += [f"no column {column}" for column in COLUMNS if column not in columns]
    raise UserError(f"{where}: {wrong[0] if wrong else 'wrong order'}: its columns must be {','.join(COLUMNS)}")


def _reference(line: list[str], where: str) -> Reference:
    if len(line) != len(COLUMNS):
        raise UserError(f"{where}: has {len(line)} fields: must have {len(COLUMNS)}, {','.join(COLUMNS)}")
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
