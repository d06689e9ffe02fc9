"""Atomic writes and checksums: a file of ours is either whole or absent."""

import contextlib
import glob
import hashlib
import io
import json
import math
import os
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tailcal.errors import UserError

REPRO = "run `dvc repro`, or without DVC or off the grid the stage that makes it"  # how most files are made
REASON = 200  # characters of a library's message that an error line repeats


@contextlib.contextmanager
def naming(path: Path, doing: str) -> Iterator[None]:
    """Give an OSError of the block the name of the file it is about; the system names none when a read or write fails.

    doing: what could not be done, as in "cannot write".
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot {doing}: {error.strerror or error}", str(path)) from error


@contextlib.contextmanager
def atomic(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it takes the name `path` only when the block ends well.

    What was called `path` until then is kept as `previous`, where one is named. Raises OSError naming `path` when the
    disk is full or the folder cannot be written; the temporary file is removed then.
    """
    with naming(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
        try:
            with temporary.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            if previous and path.exists():
                path.replace(previous)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(output: Path) -> None:
    """Remove the temporary files, `.<name>.<random>.part`, that killed processes left of an output, file or folder.

    In a folder these are those of whatever lies there, at any depth: it must be one of ours.
    """
    for left in [*output.parent.glob(f".{glob.escape(output.name)}.*.part"), *output.rglob(".*.part")]:
        left.unlink(missing_ok=True)


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


def write_header(stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write what a .npy file of this shape begins with, as np.save would."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one array of numbers as .npy, memory-mappable: the bytes of np.save.

    np.save itself writes past Python, and of a full disk it only says how many items it has written.
    """
    array = np.ascontiguousarray(array)
    with atomic(path) as stream:
        write_header(stream, array.shape, array.dtype)
        stream.write(array.data)


def read_array(path: Path, mmap: bool = False) -> np.ndarray:
    """Read a .npy array of numbers; never unpickles, and never allocates more than the file holds.

    Raises UserError naming the file when it is missing or damaged.
    """
    with _whole(path):
        with path.open("rb") as stream:
            _check_header(stream, os.fstat(stream.fileno()).st_size)
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read these arrays of numbers from an .npz that np.savez wrote; never unpickles or decompresses.

    The checksum of each is verified, so a flipped bit is found; the memory taken is what the file holds. Raises
    UserError naming the file when it is missing or damaged, or lacks one of `names`.
    """
    with _whole(path), zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        return {name: _member(archive, f"{name}.npy") for name in names}


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    if name not in archive.namelist():
        raise ValueError(f"{name.removesuffix('.npy')} is not a file in the archive")
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    content = archive.read(name)
    _check_header(io.BytesIO(content), len(content))
    return np.load(io.BytesIO(content), allow_pickle=False)


def _check_header(stream: BinaryIO, size: int) -> None:
    """Raise ValueError unless a .npy of `size` bytes is what its header says: numpy would allocate before it looks."""
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("no .npy of version 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"it holds {dtype}, not numbers")
    if min(shape, default=0) < 0 or stream.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"its header promises {dtype} {list(shape)}, which are not {size} bytes")


@contextlib.contextmanager
def _whole(path: Path, again: str = REPRO) -> Iterator[None]:
    """Turn whatever the block raises while it reads `path` into a UserError naming it; `again` is how it is made."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {again}") from None
    except PermissionError:
        raise
    except Exception as error:  # numpy and zipfile raise a different type for each way in which a file can be damaged
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise UserError(f"{path} is damaged ({reason}): delete it and {again}") from None


def read_json(path: Path, again: str = REPRO) -> Any:
    """Read a JSON file; `again` is how it is made. Raises UserError naming the file when it is missing or damaged."""
    with _whole(path, again):
        return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises OSError naming it when it cannot be read."""
    with naming(path, "read"), path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def verify(path: Path, expected: str | None, remove: Path | None = None, again: str = REPRO) -> None:
    """Check a file's SHA-256, before anything in it is parsed: a flipped bit may sit in its header.

    Raises UserError naming the file when it is missing or other than `expected`; `remove` is what to delete then (by
    default the file itself), `again` how such a file is made.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {again}")
    if (found := sha256(path)) != expected:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {found}, expected {expected}; delete {remove or 'it'} and {again}"
        )
