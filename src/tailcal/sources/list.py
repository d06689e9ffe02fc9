"""Images named by list files, a `relative/path.jpg label` a line: the format of OLTR, classifier-balancing and MiSLAS.

A line is split at its last blank or tab, so paths may contain blanks. A byte-order mark, CRLF, empty lines and lines
that begin with # are passed over (a path that does begin with # is written ./#...).
"""

import posixpath
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from tailcal import longtail
from tailcal.errors import UserError
from tailcal.images import shown
from tailcal.sources import ImageFiles, Listing, same_name

LINE = re.compile(r"(.*[^ \t])[ \t]+([0-9]{1,9})[ \t]*")


class Config(ImageFiles):
    """`train` and `test` are list files, `class_names` is a file with a name a line.

    These three and the paths in the lists are relative to `root`; the three may lie elsewhere, as absolute paths.
    """

    kind: Literal["list"]
    root: Annotated[str, Field(min_length=1)]
    train: Annotated[str, Field(min_length=1)]
    test: Annotated[str, Field(min_length=1)]
    class_names: Annotated[str, Field(min_length=1)] | None = None
    UNRECORDED: ClassVar[frozenset[str]] = ImageFiles.UNRECORDED | {"root", "train", "test", "class_names"}


def load(config: Config, downloads: Path) -> Listing:  # noqa: ARG001 (every source has this signature)
    """Read the lists, in their own order; no image is opened. Without `class_names`, classes are called 0..K-1.

    Raises UserError naming the key and the file, and the line where there is one: for a line that is not a path below
    `root` and a label, a label without a training image below the largest one, a label outside 0..K-1, a class without
    a test image, a path that comes twice in a list or in both, a class name that comes twice, a number of class names
    other than K, and fewer than two classes.
    """
    root = config.folder("root")
    files = {key: config.place(key, root) for key in ("train", "test")}
    lines = {}
    for key, path in files.items():
        with config.naming(key):
            lines[key] = _read(path)
    names = None
    if config.class_names:
        path = config.place("class_names", root)
        with config.naming("class_names"):
            names = _read_names(path)
    K = len(names) if names else max(label for _, label, _ in lines["train"]) + 1
    known = f"{config.class_names} has {K} names" if names else f"the labels of {files['train']} end at {K - 1}"
    first: dict[str, tuple[Path, int]] = {}
    for key, path in files.items():
        with config.naming(key):
            _check_distinct(path, lines[key], first)
            _check_labels(path, lines[key], K, known, names)
    if K < 2:
        raise UserError(f"{config.key('train')}: {files['train']}: names images of one class: there must be 2 or more")
    train, test = (
        ([path for path, _, _ in lines[key]], np.array([label for _, label, _ in lines[key]], np.int64))
        for key in files
    )
    return config.listing(root, train, test, names or [str(k) for k in range(K)])


Line = tuple[str, int, int]  # path, label, number of the line


def _lines(path: Path) -> list[str]:
    try:
        if path.exists() and not path.is_file():  # a device would be read for ever
            raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no file'}: must be a text file")
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: there is no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: must be text in UTF-8") from None
    except ValueError:
        raise UserError(f"{shown(path)}: no file can have this name") from None
    # Not `splitlines`, which also splits at characters that a name may contain.
    return [line.removesuffix("\r") for line in text.split("\n")]


def _read(path: Path) -> list[Line]:
    """The lines of a list. Raises UserError for the first wrong one, with its number, and for a list without lines."""
    read, wrong = [], []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        name = posixpath.normpath(match[1]) if match else ""
        if not match:
            wrong.append((number, "must be a path, a blank and a label (a whole number from 0)", line))
        elif name.startswith(("/", "../")) or name in ("..", ".") or "\0" in name:
            wrong.append((number, "must be a path below root", line))
        else:
            read.append((name, int(match[2]), number))
    if wrong:
        number, reason, line = wrong[0]
        more = f" (and {len(wrong) - 1} lines more)" if len(wrong) > 1 else ""
        raise UserError(f"{path} line {number}: {reason}, got {line[:100]!r}{more}")
    if not read:
        raise UserError(f"{path}: names no image")
    return read


def _check_distinct(path: Path, lines: list[Line], first: dict[str, tuple[Path, int]]) -> None:
    """Raise UserError with the first image that comes a second time, and how many do.

    `first` says where each image came first, in this list and those before it, and is filled here.
    """
    again = []
    for name, _, number in lines:
        if name in first:
            again.append((number, name))
        first.setdefault(name, (path, number))
    if again:
        number, name = again[0]
        more = f" (and {len(again) - 1} paths more come again)" if len(again) > 1 else ""
        where, before = first[name]
        raise UserError(f"{path} line {number}: {shown(name)} is in {where} line {before} already{more}")


def _check_labels(path: Path, lines: list[Line], K: int, known: str, names: list[str] | None) -> None:
    """Raise UserError unless every label lies in 0..K-1 and each has a line; `known` says where K is from."""
    if outside := [(label, number) for _, label, number in lines if label >= K]:
        label, number = outside[0]
        more = f" (and {len(outside) - 1} lines more)" if len(outside) > 1 else ""
        raise UserError(f"{path} line {number}: the label {label} must lie in 0..{K - 1}, since {known}{more}")
    present = {label for _, label, _ in lines}
    if len(present) < K:
        absent = next(k for k in range(K) if k not in present)
        raise UserError(
            f"{path}: {K - len(present)} of the {K} labels have no line, the first is "
            f"{longtail.class_title(absent, names)}: every class needs at least one image"
        )


def _read_names(path: Path) -> list[str]:
    names = [line.strip() for line in _lines(path)]
    while names and not names[-1]:
        names.pop()
    for number, name in enumerate(names, 1):
        if not name or not name.isprintable():
            raise UserError(f"{path} line {number}: must be the name of class {number - 1}, got {name!r}")
    if not names:
        raise UserError(f"{path}: holds no names")
    if same := same_name(names):
        one, other = same
        raise UserError(
            f"{path} line {other + 1}: {shown(names[other])} is the name of class {one} already (line {one + 1}): "
            "every class must have a name of its own"
        )
    return names
