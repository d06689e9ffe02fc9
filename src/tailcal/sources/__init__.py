"""Where images come from. One module a kind of source; `source.kind` in params.yaml is the module's name.

A source module declares `Config` (a `Source` with the keys of its block, `kind` included) and
`load(config, downloads) -> Raw | Listing`: arrays where the source holds arrays, a listing where it holds image files,
which `tailcal.pack` then decodes. Heavy libraries are imported inside `load`, so that checking params stays cheap.

(Once the source `list` has been imported, `list` in this module means that source and no longer the type.)
"""

import importlib
import pkgutil
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from tailcal import lineage
from tailcal.errors import UserError
from tailcal.params import Dataset, Strict


@dataclass(frozen=True)
class Raw:
    """A labelled data set as its source gives it, before any subsampling.

    Images are uint8 [N, H, W, C], labels int64 [N] in 0..K-1, `class_names` has K entries.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]


@dataclass(frozen=True)
class Listing:
    """A labelled data set whose images are still files.

    `train_files` and `test_files` are N paths relative to `root`; labels and class names are those of `Raw`. `size`,
    `channels`, `strict` and `workers` are the keys of `ImageFiles`.
    """

    root: Path
    train_files: list[str]
    train_labels: np.ndarray
    test_files: list[str]
    test_labels: np.ndarray
    class_names: list[str]
    size: int
    channels: int
    strict: bool = True
    workers: int | None = None


Split = tuple[list[str], np.ndarray]  # files, labels


class Source(Strict):
    """Base of every source's Config: it knows where its block stands, so that an error can name the key."""

    _block: str = PrivateAttr(default="source")

    def key(self, name: str) -> str:
        """File and full key of a value of this block, as an error line begins: `presets/x.yaml: source.path`."""
        return f"{self._block}.{name}"

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Begin what is raised inside with the key `name`: a UserError, and an OSError as one."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.key(name)}: {error}") from None
        except OSError as error:
            raise UserError(f"{self.key(name)}: {error.filename}: cannot be read ({error.strerror})") from None

    def place(self, name: str, below: Path = Path()) -> Path:
        """The path that the key `name` holds, relative to `below`, `~` being a home. Raises UserError without one."""
        written = getattr(self, name)
        try:
            return below / Path(written).expanduser()
        except RuntimeError:
            raise UserError(f"{self.key(name)}: {written}: there is no such home folder") from None

    def folder(self, name: str) -> Path:
        """The folder that the key `name` holds. Raises UserError when there is none."""
        folder = self.place(name)
        with self.naming(name):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder}: is not a folder")
            if not folder.is_dir():
                copied = ".dvc" in Path.cwd().parts and not folder.is_absolute()
                hint = " in this copy of the project, which an experiment with --temp or --queue works in"
                raise UserError(f"{folder}: there is no such folder{f'{hint}: give its whole path' if copied else ''}")
        return folder


class ImageFiles(Source):
    """What every source of image files has.

    The images become squares of `size` pixels with `channels` colours. With `strict`, one image that cannot be read
    ends the stage; without, such images are left out, listed and counted. `workers` processes decode (by default as
    many as there are processors); their number changes no byte, so it is not recorded and reruns nothing.
    """

    size: Annotated[int, Field(ge=1, le=1024)]
    channels: Literal[1, 3]
    strict: bool = True
    workers: Annotated[int | None, Field(ge=1, le=1024, exclude=True)] = None
    UNRECORDED: ClassVar[frozenset[str]] = frozenset({"strict"})

    def listing(self, root: Path, train: Split, test: Split, class_names: list[str]) -> Listing:
        """These files, to be decoded as the block says."""
        return Listing(root, *train, *test, class_names, self.size, self.channels, self.strict, self.workers)


def kinds() -> list[str]:
    """Names of the sources there are."""
    return sorted(each.name for each in pkgutil.iter_modules(__path__))


def module(kind: str) -> str:
    """The name of a source's module."""
    return f"{__name__}.{kind}"


def official(kind: str) -> bool:
    """Whether a source of this kind has the images as they were published, in the published order, which decides what a
    long tail keeps of them. In a folder they are ordered by their names."""
    return kind != "folder"


def same_name(names: Sequence[str]) -> tuple[int, int] | None:
    """The first two positions whose names a reader cannot tell apart, or None.

    Names are compared in Unicode's canonical composition, a run of blanks as one.
    """
    first: dict[str, int] = {}
    for k, name in enumerate(names):
        before = first.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), k)
        if before != k:
            return before, k
    return None


def configure(dataset: Dataset) -> Source:
    """Check a data set's `source` block with the Config of the module its `kind` names. Raises UserError."""
    kind = dataset.source.get("kind")
    if kind not in kinds():
        raise UserError(f"{dataset.key('source.kind')}: must be one of {', '.join(kinds())}, got {kind!r}")
    config = dataset.validate_block(importlib.import_module(module(kind)).Config, dataset.source, "source")
    config._block = dataset.key("source")
    return config


def record(config: Source) -> dict[str, Any]:
    """What the artefacts say about their source: its block without `UNRECORDED`, the keys that name places.

    A change of those runs the download again, and when that gives the same bytes, no training.
    """
    return config.model_dump(mode="json", exclude=getattr(config, "UNRECORDED", frozenset()))


def require(dataset: Dataset, recorded: dict[str, Any], folder: Path) -> None:
    """Raise UserError unless what is in `folder`, whose source was `recorded`, comes from the data set's `source`
    block as it is now."""
    now = record(configure(dataset))
    for key in sorted(now.keys() | recorded.keys()):
        if now.get(key) != recorded.get(key):
            raise UserError(
                f"{folder} was made with source.{key} {recorded.get(key)}, and {dataset.key(f'source.{key}')} is "
                f"{now.get(key)}: {lineage.again(download=(folder.name,), subsample=(folder.name,))}"
            )


def load(config: Source, downloads: Path) -> Raw | Listing:
    """Fetch the images. `downloads` keeps archives between runs. Raises UserError when they cannot be had whole."""
    return importlib.import_module(module(config.kind)).load(config, downloads)
