"""One seed's predictions as a file: logits of the test split, never seen in training, and of the hold-out."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailcal.errors import UserError
from tailcal.files import read_arrays, verify, write_bytes
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
    predictions = Predictions(**read_arrays(path, Predictions.__dataclass_fields__))
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
