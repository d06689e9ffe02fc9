"""The honest protocol, enforced: while a training runs, the process cannot open what it must not see.

Below data/ a training may read its own split, the meta.json of data sets, the weights it begins from and its settings.
Opening anything else there (the test split and the hold-out, the source's own images, predictions, which hold test
labels) raises an error, in a method, in a library or in the stage itself, as long as Python opens the file. It is a
guard against mistakes: compiled code that opens files by itself (safetensors, torch.from_file) passes it by.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
DATA = "data/"
ALLOWED = re.compile(
    r"data/((lt|raw)/[^/]+/meta\.json|lt/[^/]+/train_(images|labels)\.npy|(settings|pretrained|representations|classifiers|costs)/.*)"
)


class SealedError(RuntimeError):
    """Code that runs in a training has tried to open a file that trainings must not see."""


class _Seal:
    """An audit hook cannot be taken away again, so there is one, and it looks whether the seal is on."""

    def __init__(self):
        self.depth, self.installed = 0, False

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.depth or event != "open" or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        opened = Path(os.path.normpath(Path.cwd() / os.fsdecode(arguments[0])))
        # A stage may work in a folder below the project's data/, as in a project of its own: it sees neither's.
        root = next((root for root in (Path.cwd(), PROJECT) if opened.is_relative_to(root)), None)
        path = opened.relative_to(root).as_posix() if root else ""
        if path.startswith(DATA) and not ALLOWED.fullmatch(path):
            raise SealedError(f"{path}: must not be opened while a training runs, which may see its own split only")


_SEAL = _Seal()


@contextlib.contextmanager
def training() -> Iterator[None]:
    """While this block runs, in every thread of the process, SealedError is raised by opening other data. May nest."""
    if not _SEAL.installed:
        sys.addaudithook(_SEAL)
        _SEAL.installed = True
    _SEAL.depth += 1
    try:
        yield
    finally:
        _SEAL.depth -= 1
