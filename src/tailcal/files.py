"""Atomic writes and checksums: a file of ours is either whole or absent."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tailcal.errors import UserError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it takes the name `path` only when the block ends well.

    Raises OSError when the disk is full or the folder cannot be written; the temporary file is removed then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic(path) as stream:
        stream.write(content)


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` atomically, as UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused (the caller says null instead)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one array as .npy, memory-mappable, without pickling."""
    with atomic(path) as stream:
        np.save(stream, np.ascontiguousarray(array), allow_pickle=False)


def read_array(path: Path, mmap: bool = False) -> np.ndarray:
    """Read a .npy array; never unpickles. Raises UserError naming the file when it is missing or damaged."""
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro` to make it") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run `dvc repro`") from None


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro` to make it") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run `dvc repro`") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


REPRO = "run `dvc repro`"


def verify(path: Path, expected: str | None, remove: Path | None = None, again: str = REPRO) -> None:
    """Check a file's SHA-256, before anything in it is parsed: a flipped bit may sit in its header.

    Raises UserError naming the file when it is missing or other than `expected`; `remove` is what to delete then (by
    default the file itself), `again` how such a file is made.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {again} to make it")
    if (found := sha256(path)) != expected:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {found}, expected {expected}; delete {remove or 'it'} and {again}"
        )
