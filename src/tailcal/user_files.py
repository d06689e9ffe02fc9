"""Files that lie where a user says, of the commands that run outside a project, and without what only Linux has."""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tailcal import files
from tailcal.errors import UserError

try:
    from tailcal import lock
except ModuleNotFoundError:  # of fcntl, which Windows has not
    lock = None


def place(text: str) -> Path:
    """A path, for argparse. Raises ArgumentTypeError for an empty one, as of a variable that is not set: `Path` would
    take it for the present folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: must be a path")
    return Path(text)


@contextlib.contextmanager
def alone(*outputs: Path) -> Iterator[None]:
    """Be the only process that writes `outputs`, files, while the block runs; their leftovers are removed.

    Raises UserError naming the first output and the process that writes it; not where the system has no such locks.
    """
    places = [Path(os.path.realpath(output.parent), output.name) for output in outputs]  # the same from any folder
    if lock is None:
        for output in places:
            files.remove_leftovers(output)
        yield
        return
    # A killed process leaves its lock file behind: not among the user's own files. Where others can write, they could
    # put a link there, to a file of ours for us to empty.
    folder = Path(tempfile.gettempdir()) / f"tailcal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise UserError(f"{folder}: is another user's: set TMPDIR to a folder of your own")
    with lock.alone(folder, *places):
        yield
