"""A folder below the project in which the stages run as in a project of their own, and leave its results alone.

What DVC does for the pipeline is done here by hand: nothing is made twice, and one process at a time makes a thing. Of
processes that train together (`tailcal.distributed`) all go through here, and the first prepares and writes for all.
"""

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch.distributed as dist

from stages import calibrate, paths, represent
from stages.download import download
from stages.subsample import read_raw, subsample
from tailcal import (
    distributed,
    duplicates,
    errors,
    files,
    lock,
    longtail,
    measured,
    params,
    provenance,
    settings,
    sources,
    splits,
)
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


def wait() -> None:
    """Of processes that train together: go on when all are here, however long the first one takes."""
    if distributed.size() > 1:
        dist.barrier(_waiting_group())


@cache
def _waiting_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))  # by default half an hour


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, made if need be, while the block runs. It shares the project's downloads and nothing else."""
    if distributed.is_first():
        _make(folder)
    wait()
    project = Path.cwd()
    os.chdir(folder)
    try:
        yield
    except errors.UserError as error:
        if str(error).startswith("--"):  # an option, whose path is that of the caller
            raise
        raise errors.UserError(f"{error} (in {folder}, where this works)") from None
    finally:
        os.chdir(project)


def _make(folder: Path) -> None:
    paths.DOWNLOADS.mkdir(parents=True, exist_ok=True)
    downloads = folder / paths.DOWNLOADS
    downloads.parent.mkdir(parents=True, exist_ok=True)
    shared = Path(os.path.relpath(paths.DOWNLOADS.resolve(), downloads.parent.resolve()))  # moves with the project
    if not (downloads.is_symlink() and downloads.readlink() == shared):
        downloads.unlink(missing_ok=True)
        downloads.symlink_to(shared)


def require_one_process(runtime: params.Runtime) -> None:
    """Raise UserError when several processes are asked for: what calls this starts none."""
    if runtime.processes > 1:
        raise errors.UserError(
            f"{params.PARAMS}: runtime.processes: is {runtime.processes}, and this trains in one process: must be 1 "
            "here; runtime.replicas says how many networks it trains side by side"
        )


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
    p, cell = p.model_copy(update={"precision": run.precision}), file.parts[-4:-1]
    if not run.data.official and sources.configure(params.dataset(p, cell[0])).kind in OFFICIAL:
        p, _ = with_images(p, cell[:1], Path("images"))  # which folder, no record says
    return measured.unplanned(file, run, settings.of_cell(p, *cell), p.evaluate.model_dump())


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


def listing(config: sources.Source) -> str | None:
    """A digest of the names, sizes and times of the files of one's own images, so that a change of them is seen; None
    of other sources."""
    folder = {"folder": "path", "list": "root"}.get(config.kind)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(config.folder(folder).rglob("*")):
        try:
            stat = path.stat()
        except OSError:  # a link to nothing: the source says so in its own words
            stat = path.lstat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def prepare(p: params.Params, name: str, instead: str | None = None) -> None:
    """Download and subsample a data set, unless the same code has done so from the same block, and it is all there.

    `instead`: the official archive in whose place its images stand. Raises UserError, also as `require_files` and
    `require_pixels` do.
    """
    if distributed.is_first():
        _prepare(p, name, instead)
    wait()


def _prepare(p: params.Params, name: str, instead: str | None) -> None:
    dataset = params.dataset(p, name)
    config = sources.configure(dataset)
    made = {
        "code": provenance.code_version("stages.download", "stages.subsample", sources.module(config.kind)),
        "source": config.model_dump(mode="json"),
        "listing": listing(config),
        "imbalance": dataset.imbalance.record(),
        "holdout_per_class": dataset.holdout_per_class,
        "instead": instead,
    }
    stamp = paths.SCRATCH / "prepared" / f"{name}.json"
    if stamp.exists() and files.read_json(stamp) == made and whole(paths.longtail(name)):
        return
    with lock.alone(paths.LOCKS, paths.raw(name), paths.longtail(name), paths.scratch("pack", name)):
        if instead:
            require_files(dataset, instead, sources.load(config, paths.DOWNLOADS))  # before thousands are decoded
        download(name, config)
        if instead:
            require_pixels(dataset, instead, paths.raw(name))
        subsample(name, dataset)
        files.write_json(stamp, made)


def whole(longtail: Path) -> bool:
    """Whether a data set's splits are all there with the checksums that they were written with."""
    try:
        for name, checksum in splits.read_meta(longtail)["checksums"].items():
            files.verify(longtail / name, checksum)
    except errors.UserError:
        return False
    return True


def run_stage1(p: params.Params, dataset: str, representation: str, late_epochs: int = 0) -> Path:
    """Stage 1, by this process alone or with those that train with it; returns what `represent` does."""
    with lock.alone(paths.LOCKS, *represent.outputs(dataset, representation)):
        scratch = represent.represent(p, dataset, representation, late_epochs)
    wait()
    return scratch


@contextlib.contextmanager
def run_stage2(p: params.Params, where: dict[str, str], late_epochs: int = 0) -> Iterator[Path]:
    """Stage 2 of the cell `where`, {axis: name}, as `run_stage1` does stage 1, until the block ends.

    Yields what `calibrate` returns.
    """
    cell = tuple(where.values())
    with lock.alone(paths.LOCKS, *calibrate.outputs(*cell)):
        yield calibrate.calibrate(p, *cell, late_epochs)
    wait()


def seconds(where: dict[str, str], seed: int) -> float:
    """What training the network of a cell and seed took, both stages together."""
    stages = (("represent", where["dataset"], where["representation"]), ("calibrate", *where.values()))
    return sum(files.read_json(paths.costs(*stage))["seeds"][str(seed)]["seconds"] for stage in stages)
