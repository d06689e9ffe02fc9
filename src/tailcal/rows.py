"""Writing chosen rows of a large array without ever holding them all."""

from pathlib import Path

import numpy as np

from tailcal.files import atomic, write_header

CHUNK_BYTES = 16 << 20


def chunk(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many rows of an array [N, ...] make about `CHUNK_BYTES`, at least one."""
    return max(1, CHUNK_BYTES // max(1, int(np.prod(shape[1:])) * dtype.itemsize))


def write_rows(path: Path, array: np.ndarray, rows: np.ndarray) -> None:
    """Write `array[rows]` as .npy, atomically: the bytes of np.save, and no more than `CHUNK_BYTES` in memory at once.

    `array` is [N, ...], usually memory-mapped; `rows` are int64 [M] positions in it, in the order wanted.
    """
    step = chunk(array.shape, array.dtype)
    with atomic(path) as stream:
        write_header(stream, (len(rows), *array.shape[1:]), array.dtype)
        for start in range(0, len(rows), step):
            stream.write(np.ascontiguousarray(array[rows[start : start + step]]).data)
