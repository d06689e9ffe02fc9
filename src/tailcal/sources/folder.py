"""Images in folders, one per class: `path/train/<class>/...` and `path/test/<class>/...`, or `path/<class>/...`.

Class names are the folders' names, sorted; images are found at any depth inside a class, by the endings of
`tailcal.images.EXTENSIONS`. A class folder and an image may be symbolic links; a linked folder deeper inside is not
entered, since links may form a circle. Everything that is not taken is counted in a warning: other files, hidden ones,
linked folders.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from tailcal import longtail
from tailcal.errors import UserError
from tailcal.images import EXTENSIONS, shown
from tailcal.sources import ImageFiles, Listing, Split, same_name

SPLITS = ("train", "test")
CALLED = {  # what the splits are called, in lower case
    "train": frozenset({"train", "training"}),
    "test": frozenset({"val", "valid", "validation", "dev", "test", "testing"}),
}


class Config(ImageFiles):
    """With `test_per_class` 0 the folder is split already; above, so many of each class are set aside by `seed`."""

    kind: Literal["folder"]
    path: Annotated[str, Field(min_length=1)]
    test_per_class: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    UNRECORDED: ClassVar[frozenset[str]] = ImageFiles.UNRECORDED | {"path"}


def load(config: Config, downloads: Path) -> Listing:  # noqa: ARG001 (every source has this signature)
    """List the images of a folder, sorted by class and path; none is opened.

    Raises UserError naming the key, and the folder or class: when there is no such folder, fewer than two classes, two
    of the same name, a class without images or missing from one of the splits, or one with too few images to set
    `test_per_class` aside.
    """
    root = config.folder("path")
    ignored: list[str] = []
    with config.naming("path"):
        names, splits = _one_split(root, config, ignored) if config.test_per_class else _two_splits(root, ignored)
    if ignored:
        print(
            f"warning: {root}: {len(ignored):,} files or folders are not taken for images or classes, "
            f"the first is {shown(min(ignored))}",
            file=sys.stderr,
        )
    return config.listing(root, *splits, names)


def _one_split(root: Path, config: Config, ignored: list[str]) -> tuple[list[str], list[Split]]:
    names = _classes(root, "", ignored)
    if all(_is_split(name, *SPLITS) for name in names):
        raise UserError(
            f"{root}: is split into {' and '.join(names)} already: source.test_per_class must be 0, and the splits "
            "must be called train and test"
        )
    files, labels = _images(root, "", names, ignored)
    _warn_of_splits(root, names, files)
    available = np.bincount(labels, minlength=len(names))
    if config.test_per_class >= available.min():
        raise UserError(
            f"{root}: source.test_per_class is {config.test_per_class}: "
            f"{longtail.class_title(int(available.argmin()), names)} has {available.min()} images, "
            f"so must be at most {available.min() - 1} to leave one to train on"
        )
    train, test = longtail.balanced_split(labels, len(names), config.test_per_class, config.seed, names)
    return names, [([files[i] for i in part], labels[part]) for part in (train, test)]


def _two_splits(root: Path, ignored: list[str]) -> tuple[list[str], list[Split]]:
    of_split = {}
    for split in SPLITS:
        if not (root / split).is_dir():
            others = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and _is_split(entry.name, split))
            hint = f" (rename {' or '.join(others)} to it)" if others else ""
            raise UserError(
                f"{root}: has no folder {split}{hint}: must hold train/<class>/ and test/<class>/, or <class>/ with a "
                "source.test_per_class above 0"
            )
        of_split[split] = _classes(root, f"{split}/", ignored)
    for split, other in (("train", "test"), ("test", "train")):
        if lacking := sorted(set(of_split[other]) - set(of_split[split])):
            if not _walk(root, f"{other}/{lacking[0]}", ignored):
                raise UserError(f"{root / other / lacking[0]}: has no images, and {split} no such class: remove it")
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise UserError(
                f"{root}: class {lacking[0]}{more} is in {other} and not in {split}: every class must be in both"
            )
    ignored.extend(entry.name for entry in os.scandir(root) if entry.name not in of_split)
    names = of_split["train"]
    return names, [_images(root, f"{split}/", names, ignored) for split in of_split]


def _warn_of_splits(root: Path, names: list[str], files: list[str]) -> None:
    """A line on stderr where classes may be splits: none has an image of its own, and all have the same folders."""
    inside: dict[str, set[str]] = {name: set() for name in names}
    for file in files:
        name, first, *deeper = file.split("/")
        if not deeper:
            return
        inside[name].add(first)
    if all(found == inside[names[0]] for found in inside.values()):
        print(
            f"warning: {root}: {', '.join(names)} are taken for classes, and all have the same folders "
            f"({shown(min(inside[names[0]]))}, ...): if they are splits, call them train and test, with "
            "source.test_per_class 0",
            file=sys.stderr,
        )


def _is_split(name: str, *splits: str) -> bool:
    """Whether a folder is called like one of `splits`. Where all are, none is meant as a class."""
    return any(name.lower() in CALLED[split] for split in splits)


def _classes(root: Path, below: str, ignored: list[str]) -> list[str]:
    """Names of the class folders in `root/below`, sorted; what else lies there goes to `ignored`."""
    folder, names = root / below, []
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or not entry.is_dir():
            ignored.append(below + entry.name)
        elif not entry.name.isprintable():
            raise UserError(f"{folder}: the class folder {shown(entry.name)} must have a printable name in UTF-8")
        else:
            names.append(entry.name)
    if len(names) < 2:
        raise UserError(f"{folder}: has {len(names)} class folders: must have at least 2, each with its images")
    names = sorted(names)
    if same := same_name(names):
        one, other = (ascii(names[k]) for k in same)
        raise UserError(f"{folder}: the class folders {one} and {other} read the same: rename one, or merge them")
    return names


def _images(root: Path, below: str, names: list[str], ignored: list[str]) -> Split:
    """The images of every class in `root/below`, relative to `root`, and their labels int64 [N]."""
    files, labels = [], []
    for k, name in enumerate(names):
        found = sorted(_walk(root, f"{below}{name}", ignored))
        if not found:
            looked_for = " ".join(sorted(EXTENSIONS))
            raise UserError(
                f"{root / below / name}: has no images ({looked_for} are looked for): every class needs at least one"
            )
        files += found
        labels += [k] * len(found)
    return files, np.array(labels, np.int64)


def _walk(root: Path, below: str, ignored: list[str]) -> list[str]:
    """Paths, relative to `root`, of the images at any depth in the folder `root/below`."""
    found, todo = [], [below]
    while todo:
        folder = todo.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}"
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    todo.append(path)
                # Hidden ones too: some systems leave a `._cat.jpg` with settings beside every cat.jpg.
                elif entry.name.startswith(".") or entry.is_dir() or Path(path).suffix.lower() not in EXTENSIONS:
                    ignored.append(path)
                else:
                    found.append(path)
    return found
