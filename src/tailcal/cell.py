"""What a cell is called, of the grid as of the published tables."""

from typing import NamedTuple


class CellName(NamedTuple):
    """A data set, a representation (stage 1) and a classifier (stage 2) by their names; `dataset/representation/
    classifier` as a text."""

    dataset: str
    representation: str
    classifier: str

    def __str__(self) -> str:
        return "/".join(self)
