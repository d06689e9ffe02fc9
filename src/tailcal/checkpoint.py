"""Checkpoints of an unfinished training, outside DVC's outputs and keyed by everything the result depends on.

DVC deletes a stage's outputs before it runs the stage, and knows nothing of a half-finished one. So the state of a
training lies in `.scratch/<stage>/<cell>/<fingerprint>/seed<k>.pt`. Another parameter, another line of code or other
data is another fingerprint, and in stage 2 a checkpoint says which network it began with: a stale one is never taken
up.

torch reads a checkpoint with a flipped bit in a weight without a word, so each begins with the SHA-256 of the rest, and
nothing is parsed before it is right. Two generations are kept: when the newest is damaged, training goes on from
`seed<k>.previous.pt`, and loses the seconds between the two.
"""

import errno
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tailcal import distributed
from tailcal.files import atomic, naming

DIGEST = hashlib.sha256().digest_size


def fingerprint(parts: dict[str, Any]) -> str:
    """A short digest of what a training depends on (any JSON value)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_suffix(".previous.pt")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: tensors, numbers, texts, lists and dicts. The one before it is kept.

    Raises OSError naming the file when the disk is full or cannot be written; the older checkpoints are untouched then.
    """
    content = io.BytesIO()
    torch.save(state, content)
    with atomic(path, previous(path)) as stream:
        stream.write(hashlib.sha256(content.getbuffer()).digest())
        stream.write(content.getbuffer())


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None when there is none. Nothing in a file is executed.

    A damaged one is named in a warning and removed; the one before it is taken up, or else training starts over.
    Raises OSError naming the file when it may not be read, or not be removed.
    """
    older = previous(path)
    then = f"going on from {older}" if older.exists() else "starting over"
    for generation, instead in ((path, then), (older, "starting over")):
        if not generation.exists():
            continue
        try:
            return _read(generation, device)
        except ValueError as error:
            if distributed.is_first():
                print(f"warning: the checkpoint {generation} is damaged ({error}); {instead}", file=sys.stderr)
            generation.unlink(missing_ok=True)
    return None


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """The checkpoint in a file. Raises ValueError saying in what way it is damaged."""
    content = memoryview(_content(path))
    if len(content) <= DIGEST or hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
        raise ValueError(f"its {len(content)} bytes do not have the SHA-256 that they begin with")
    try:
        state = torch.load(io.BytesIO(content[DIGEST:]), map_location=device, weights_only=True)
    except Exception as error:  # torch raises a different type for each way in which a file can be wrong
        raise ValueError(f"it is no checkpoint of torch's: {type(error).__name__}") from None
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a training's state")
    return state


def _content(path: Path) -> bytes:
    try:
        with naming(path, "read"):
            return path.read_bytes()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise ValueError("the disk cannot read it") from None


def keep_only(folder: Path) -> None:
    """Remove the checkpoints of the same cell under other fingerprints: the results they led to are superseded."""
    for other in folder.parent.iterdir() if folder.parent.exists() else []:
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
