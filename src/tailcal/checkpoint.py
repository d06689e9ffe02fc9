"""Checkpoints of an unfinished training, outside DVC's outputs and keyed by everything the result depends on.

DVC deletes a stage's outputs before it runs the stage, and knows nothing of a half-finished one. So the state of a
training lies in `.scratch/<cell>/<fingerprint>/seed<k>.pt`. Another parameter, another line of code or other data is
another fingerprint: a stale checkpoint is never taken up.
"""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tailcal.errors import UserError
from tailcal.files import atomic


def fingerprint(parts: dict[str, Any]) -> str:
    """A short digest of what a training depends on (any JSON value)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: tensors, numbers, texts, lists and dicts."""
    with atomic(path) as stream:
        torch.save(state, stream)


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint, or None when there is none. Nothing in the file is executed.

    A damaged file is named, removed, and counts as none: training then starts over.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a different type for each way in which a file can be damaged
        print(f"warning: the checkpoint {path} is damaged ({type(error).__name__}); starting over", file=sys.stderr)
        path.unlink(missing_ok=True)
        return None


def keep_only(folder: Path) -> None:
    """Remove the checkpoints of the same cell under other fingerprints: the results they led to are superseded."""
    for other in folder.parent.iterdir() if folder.parent.exists() else []:
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def require_finite(loss: float, title: str, epoch: int, path: Path) -> None:
    """Raise UserError when the loss is NaN or infinite, naming the training, the epoch and the last good checkpoint."""
    if not math.isfinite(loss):
        last = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
        raise UserError(
            f"{title}: the loss or a weight became {loss} in epoch {epoch + 1}; {last}. "
            "A lower lr, or milder settings of the method, usually help"
        )
