"""The official CIFAR archives: what they hold, and a folder of the same images in their place, which --images names."""

import argparse
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.subsample import read_raw
from tailcal import duplicates, errors, longtail, measured, params, settings, sources
from tailcal.tables import span


@dataclass(frozen=True)
class Archive:
    """What an official archive holds: images per class of its two splits, and the `digest` of its test split."""

    classes: int
    train: int
    test: int
    digest: str


OFFICIAL = {
    "cifar10": Archive(10, 5000, 1000, "653249b792bad0bf0649a67c39ad5ff2f441eae34f26417a8558c1bf102c7050"),
    "cifar100": Archive(100, 500, 100, "a940b1e5448eba1f42c4dfe2adeb6dc3db9ff012ee14d61fd71270a89643c78a"),
}


def accept_images(parser: argparse.ArgumentParser) -> None:
    """Give a stage the option --images, which `with_images` then goes by."""
    parser.add_argument(
        "--images",
        type=Path,
        help="take the images from IMAGES/cifar10 and IMAGES/cifar100, each train/<class>/ and test/<class>/, instead "
        "of the official archives; the subset is then not the published image list, and the tables say so",
    )


def with_images(p: params.Params, names: Iterable[str], images: Path | None) -> tuple[params.Params, dict[str, str]]:
    """The same parameters; where `images` is given, those data sets `names` that have an official archive take their
    images from there instead. And which archive that was, by data set. Raises UserError when none of them has one."""
    if not images:
        return p, {}
    chosen = {name: params.dataset(p, name) for name in names}
    kinds = {name: sources.configure(dataset).kind for name, dataset in chosen.items()}
    instead = {name: kind for name, kind in kinds.items() if kind in OFFICIAL}
    if not instead:
        raise errors.UserError(
            f"--images {images}: takes the place of the official archives of {' and '.join(OFFICIAL)}, and none of "
            f"{', '.join(chosen)} has one: leave it out"
        )
    changed = {name: _from_folder(p, chosen[name], images.resolve(), kind) for name, kind in instead.items()}
    return p.model_copy(update={"datasets": p.datasets | changed}), instead


def _from_folder(p: params.Params, dataset: params.Dataset, images: Path, kind: str) -> params.Dataset:
    """The same data set, with its images from a folder `images`/<kind> instead of the official archive.

    The training split there may hold less than all images: the long tail is cut as if the largest class were whole.
    """
    place = {"kind": "folder", "path": str(images / kind), "size": 32, "channels": 3}
    imbalance = dataset.imbalance
    if isinstance(imbalance, params.LongTail):
        imbalance = imbalance.model_copy(update={"largest": imbalance.largest or OFFICIAL[kind].train})
    changed = dataset.model_copy(update={"source": place, "imbalance": imbalance})
    return params.resolve(p, changed, Path(f"--images {images}"), "")  # which is where its keys come from


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of which images (uint8 [N, H, W, C]) each class has, in whatever order; `labels` int64 [N]."""
    of_images = duplicates.digests(images)
    order = np.lexsort((of_images, labels))
    pairs = np.stack([labels[order].astype("<u8"), of_images[order].astype("<u8")])
    return hashlib.sha256(pairs.tobytes()).hexdigest()


def require_files(dataset: params.Dataset, kind: str, listing: sources.Listing) -> None:
    """Raise UserError unless a folder lists the images that take the place of the official archive of a source `kind`:
    as many test images of as many classes, and of each class as many training images as the long tail takes."""
    archive, folder = OFFICIAL[kind], listing.root
    where, names = sources.configure(dataset).key("path"), listing.class_names
    tests = np.bincount(listing.test_labels, minlength=len(names))
    if tests.tolist() != [archive.test] * archive.classes:
        raise errors.UserError(
            f"{where}: {folder}/test is not the test split of {kind}: it has {tests.sum():,} images of {len(names)} "
            f"classes, {span(set(tests.tolist()))} of each, and must have {archive.test:,} of each of "
            f"{archive.classes} classes"
        )
    if isinstance(dataset.imbalance, params.LongTail):
        cut, found = dataset.imbalance, np.bincount(listing.train_labels, minlength=len(names))
        wanted = longtail.class_counts(cut.largest, archive.classes, cut.factor, cut.profile, names)
        wanted += dataset.holdout_per_class
        if (found < wanted).any():
            k = int(np.argmax(found < wanted))
            raise errors.UserError(
                f"{where}: {folder}/train: {longtail.class_title(k, names)} has {found[k]:,} images, and the long tail "
                f"and the hold-out take {wanted[k]:,} of it"
            )


def require_pixels(dataset: params.Dataset, kind: str, raw: Path) -> None:
    """Raise UserError unless the test images in `raw` are, pixel for pixel, those of the official archive of a source
    `kind`."""
    _, arrays = read_raw(raw)
    if digest(arrays["test_images"], arrays["test_labels"]) != OFFICIAL[kind].digest:
        raise errors.UserError(
            f"{sources.configure(dataset).key('path')}: {dataset.source['path']}/test is not the test split of {kind}: "
            "of some images the pixels are others (drawn from elsewhere, compressed with loss, or of another class)"
        )


def require_planned(runs: dict[Path, measured.Run], p: params.Params) -> None:
    """Raise UserError unless these seeds of published cells, by file, are of these parameters; it says the first that
    is not, and how many there are. Precision and source of the images, which options may change, are their own."""
    if said := list(filter(None, (_unplanned(file, run, p) for file, run in runs.items()))):
        raise errors.UserError(said[0] + (f" (there are {len(said)} such files)" if len(said) > 1 else ""))


def _unplanned(file: Path, run: measured.Run, p: params.Params) -> str | None:
    p, cell = p.model_copy(update={"precision": run.precision}), measured.cell_of(file)
    if not run.data.official and sources.configure(params.dataset(p, cell.dataset)).kind in OFFICIAL:
        p, _ = with_images(p, [cell.dataset], Path("images"))  # which folder, no record says
    return measured.unplanned(file, run, settings.of_cell(p, *cell), p.evaluate.model_dump())
