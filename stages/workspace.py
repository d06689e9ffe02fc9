"""A folder below the project in which the stages run as in a project of their own, and leave its results alone."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from stages import paths


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, made if need be, while the block runs. It shares the project's downloads and nothing else."""
    paths.DOWNLOADS.mkdir(parents=True, exist_ok=True)
    downloads = folder / paths.DOWNLOADS
    downloads.parent.mkdir(parents=True, exist_ok=True)
    if not downloads.is_symlink():
        downloads.symlink_to(paths.DOWNLOADS.resolve())
    project = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(project)
