"""A folder below the project in which the stages run as in a project of their own, and leave its results alone.

What DVC does for the pipeline is done here by hand: nothing is made twice, and one process at a time makes a thing. Of
processes that train together (`tailcal.distributed`) all go through here, and the first prepares and writes for all.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch.distributed as dist

from stages import calibrate, official, paths, represent
from stages.download import download
from stages.subsample import subsample
from tailcal import costs, distributed, errors, files, lock, params, provenance, sources, splits
from tailcal.cell import CellName


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


def state_of(listed: sources.Listing) -> str:
    """A digest of which images a source of image files lists, of which classes, and of the files' sizes and times, so
    that a change of them is seen."""
    digest = hashlib.sha256("\0".join(listed.class_names).encode())
    for split in ((listed.train_files, listed.train_labels), (listed.test_files, listed.test_labels)):
        for file, label in zip(*split, strict=True):
            digest.update(f"\n{file}\0{label}\0{_state_of_file(listed.root / file)}".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def _state_of_file(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:  # a link to nothing, say: what decodes it says so in its own words
        return ""
    return f"{stat.st_size}\0{stat.st_mtime_ns}"


def prepare(p: params.Params, name: str, instead: str | None = None) -> None:
    """Download and subsample a data set, unless the same code has done so from the same block, and it is all there.

    `instead`: the official archive in whose place its images stand. Raises UserError, also as `official.require_files`
    and `official.require_pixels` do.
    """
    if distributed.is_first():
        _prepare(p, name, instead)
    wait()


def _prepare(p: params.Params, name: str, instead: str | None) -> None:
    dataset = params.dataset(p, name)
    config = sources.configure(dataset)
    listed = sources.load(config, paths.DOWNLOADS) if isinstance(config, sources.ImageFiles) else None
    made = {
        "code": provenance.code_version("stages.download", "stages.subsample", sources.module(config.kind)),
        "source": config.model_dump(mode="json"),
        "listing": listed and state_of(listed),
        "imbalance": dataset.imbalance.record(),
        "holdout_per_class": dataset.holdout_per_class,
        "instead": instead,
    }
    stamp = paths.SCRATCH / "prepared" / f"{name}.json"
    if stamp.exists() and files.read_json(stamp) == made and whole(paths.longtail(name)):
        return
    with lock.alone(paths.LOCKS, paths.raw(name), paths.longtail(name), paths.scratch("pack", name)):
        if instead:
            official.require_files(dataset, instead, listed)  # before thousands are decoded
        download(name, config)
        if instead:
            official.require_pixels(dataset, instead, paths.raw(name))
        subsample(name, dataset)
        files.write_json(stamp, made)


def whole(longtail: Path) -> bool:
    """Whether a data set's splits are all there with the checksums that they were written with."""
    try:
        for name, checksum in splits.read_meta(longtail).checksums.items():
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
def run_stage2(p: params.Params, cell: CellName, late_epochs: int = 0) -> Iterator[Path]:
    """Stage 2 of a cell, as `run_stage1` does stage 1, until the block ends.

    Yields what `calibrate` returns.
    """
    with lock.alone(paths.LOCKS, *calibrate.outputs(*cell)):
        yield calibrate.calibrate(p, cell, late_epochs)
    wait()


def seconds(cell: CellName, seed: int) -> float:
    """What training the network of a cell and seed took, both stages together."""
    stages = (("represent", *cell[:2]), ("calibrate", *cell))
    return sum(costs.read(paths.costs(*stage))[seed].seconds for stage in stages)
