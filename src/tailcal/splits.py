"""Reading one split of a long-tailed data set, verified against the checksums beside it.

A training stage asks for the split `train` and never names another: the test split is opened where predictions are
made.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from tailcal.files import read_array, read_json, verify


def read_meta(folder: Path) -> dict[str, Any]:
    """Class names, counts and checksums of the data set in `folder`."""
    return read_json(folder / "meta.json")


def read_split(folder: Path, split: Literal["train", "holdout", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C], memory-mapped, and labels int64 [N] of one split.

    Raises UserError naming the file when one is missing or not the one that meta.json describes.
    """
    checksums = read_meta(folder)["checksums"]
    for name in (f"{split}_images.npy", f"{split}_labels.npy"):
        verify(folder / name, checksums.get(name))
    return read_array(folder / f"{split}_images.npy", mmap=True), read_array(folder / f"{split}_labels.npy")
