"""Predictions of a cell, one file per seed: logits of the test split, never seen in training, and of the hold-out."""

import hashlib
import io
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from tailcal.errors import UserError
from tailcal.files import REPRO, read_arrays, verify, write_bytes
from tailcal.metrics.scores import check


@dataclass(frozen=True)
class Predictions:
    """Logits float32 [N, K] and labels int64 [N] of the test split and of the hold-out, which may be empty."""

    test_logits: np.ndarray
    test_labels: np.ndarray
    holdout_logits: np.ndarray
    holdout_labels: np.ndarray

    def write(self, path: Path) -> str:
        """Write them atomically, as .npz; returns the file's SHA-256."""
        stream = io.BytesIO()
        np.savez(stream, **vars(self))
        write_bytes(path, content := stream.getvalue())
        return hashlib.sha256(content).hexdigest()


def read(path: Path, expected: str | None, K: int) -> Predictions:
    """The predictions of a file whose SHA-256 must be `expected`, for a data set of K classes.

    Raises UserError naming the file when it is missing, damaged, of other classes, or holds no finite logits.
    """
    verify(path, expected)
    predictions = Predictions(**read_arrays(path, [field.name for field in fields(Predictions)]))
    for split, logits_NK, labels_N in (
        ("test", predictions.test_logits, predictions.test_labels),
        ("holdout", predictions.holdout_logits, predictions.holdout_labels),
    ):
        if logits_NK.shape[1:] != (K,):
            raise UserError(f"{path}: {split}_logits has shape {list(logits_NK.shape)}: the data set has {K} classes")
        if split == "holdout" and len(logits_NK) == 0 and labels_N.shape == (0,):
            continue
        try:
            check(logits_NK, labels_N)
        except ValueError as error:
            raise UserError(f"{path}: {split}: {error}") from None
    return predictions


def read_seeds(folder: Path, checksums: dict[str, str], seeds: list[int], K: int) -> list[Predictions]:
    """The predictions of every seed of a cell, in `folder`; `checksums` are the files' SHA-256, by name.

    Raises UserError as `read` does, and naming a file whose test labels are others than those of the first, or where
    only one of the two has a hold-out.
    """
    cell = [read(folder / f"seed{seed}.npz", checksums.get(f"seed{seed}.npz"), K) for seed in seeds]
    for seed, run in zip(seeds, cell, strict=True):
        if not np.array_equal(run.test_labels, cell[0].test_labels):
            raise UserError(
                f"{folder}/seed{seed}.npz: its test labels differ from seed {seeds[0]}'s: delete both and {REPRO}"
            )
        if bool(len(run.holdout_labels)) != bool(len(cell[0].holdout_labels)):
            raise UserError(
                f"{folder}/seed{seed}.npz: one of it and seed {seeds[0]}'s has a hold-out: delete both and {REPRO}"
            )
    return cell
