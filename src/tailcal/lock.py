"""One process at a time makes an artefact, and begins by removing what a killed one left half-written of it."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tailcal.errors import UserError
from tailcal.files import naming, remove_leftovers


@contextlib.contextmanager
def alone(folder: Path, *outputs: Path) -> Iterator[None]:
    """Be the only process that makes `outputs`, files or folders, while the block runs; their leftovers are removed.

    The lock is the kernel's, on a file in `folder` that is named by the first output: it ends with the process,
    however that ends, so a file without a process locks nothing. Of several processes that train together the first
    takes it for all. Raises UserError naming the first output and the process that is making it, and OSError naming
    `folder` when nothing can be written there.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with naming(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
    # Named by a digest: a path of any length gives a name that every file system takes.
    path = folder / f"{hashlib.sha256(os.fsencode(outputs[0])).hexdigest()[:32]}.lock"
    with _take(path, outputs[0]) as file:
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            for output in outputs:
                remove_leftovers(output)
            yield
        finally:
            path.unlink(missing_ok=True)


def _take(path: Path, output: Path) -> TextIO:
    """Open and lock a file. Raises UserError, naming the output, when another process holds it."""
    while True:
        with naming(path.parent, "write"):
            file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise UserError(
                    f"{output}: another process (pid {file.read() or 'unknown'}) is making it: wait for it, or stop it"
                ) from None
        if os.fstat(file.fileno()).st_nlink > 0:
            return file
        file.close()  # its holder unlinked it before we had the lock: a third process may hold its successor
