"""What a cell is called, of the grid as of the published tables."""

from collections.abc import Sequence
from typing import NamedTuple


class CellName(NamedTuple):
    """A data set, a representation (stage 1) and a classifier (stage 2) by their names; `dataset/representation/
    classifier` as a text."""

    dataset: str
    representation: str
    classifier: str

    def __str__(self) -> str:
        return "/".join(self)


def options(names: Sequence[str]) -> str:
    """What tells a stage a cell, or with fewer names a part of one: `--dataset d --representation r`."""
    return " ".join(f"--{axis} {name}" for axis, name in zip(CellName._fields, names, strict=False))
