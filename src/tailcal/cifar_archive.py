"""The official CIFAR archives: fetched once, verified, kept, and read anew by whoever needs them.

The batches inside are pickles, and unpickling can run code. So nothing is read before the archive's SHA-256 is the
official one, nor a batch before its MD5 is; and what reads it knows arrays, lists, dicts and texts, and can call
nothing else. Nothing is unpacked to the disk: there is no file that could be put elsewhere or be damaged later.
"""

import hashlib
import http.client
import io
import pickle
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from tailcal import files, lock
from tailcal.errors import UserError
from tailcal.sources import Raw, Source

TIMEOUT_SECONDS = 60
BLOCK = 1 << 20
MAX_MEMBER = 1 << 28  # bytes; the largest batch, CIFAR-100's training split, has 155 million
ARRAY = {  # what a pickled array names, as different versions of NumPy have written it
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
}


class ArchiveConfig(Source):
    """`url` names a mirror; the checksum stays the official one.

    A mirror gives the same bytes, so `url` is left out of what the artefacts record: changing it reruns no training.
    """

    url: Annotated[str | None, Field(pattern="^https?://", exclude=True)] = None


def load(dataset: type, sha256: str, config: ArchiveConfig, downloads: Path) -> Raw:
    """The whole data set of `dataset`, torchvision's CIFAR10 or CIFAR100; `sha256` is its archive's official checksum.

    Images are uint8 [N, 32, 32, 3] in the order of the archive's batches. Raises UserError when the archive cannot be
    had whole.
    """
    archive = downloads / dataset.filename
    ensure(config.url or dataset.url, archive, sha256)
    about = dataset.meta["filename"]
    md5 = {name: md5 for name, md5 in [*dataset.train_list, *dataset.test_list]} | {about: dataset.meta["md5"]}
    content = {name: _unpickle(batch, archive) for name, batch in _members(archive, dataset.base_folder, md5).items()}
    try:
        train, test = (
            _split([content[name] for name, _ in listed]) for listed in (dataset.train_list, dataset.test_list)
        )
        return Raw(*train, *test, content[about][dataset.meta["key"]])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{archive}: a batch inside is not one of CIFAR's ({error!r})") from None


def _members(archive: Path, folder: str, md5: dict[str, str]) -> dict[str, bytes]:
    """The archive's files `folder/<name>`, by name, for every name in `md5`; the others are passed over."""
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for entry in tar:
                name = entry.name.removeprefix(f"{folder}/")
                if entry.isfile() and name in md5:
                    found[name] = _read(tar, entry, md5[name])
    except UserError as error:
        raise UserError(f"{archive}: {error}") from None
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked although its checksum is right ({error})") from None
    if missing := sorted(md5.keys() - found):
        raise UserError(f"{archive}: has no file {folder}/{missing[0]}")
    return found


def _read(tar: tarfile.TarFile, entry: tarfile.TarInfo, md5: str) -> bytes:
    if entry.size > MAX_MEMBER:
        raise UserError(f"{entry.name!a} has {entry.size:,} bytes: no batch has more than {MAX_MEMBER:,}")
    content = tar.extractfile(entry).read()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UserError(
            "the batches inside do not have the official MD5 checksums although the archive is right: "
            "check the disk and run again"
        )
    return content


class _Batch(pickle.Unpickler):
    """Reads dicts, lists, texts, numbers and arrays, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _unpickle(content: bytes, archive: Path) -> Any:
    try:
        return _Batch(io.BytesIO(content), encoding="latin1").load()  # the batches were written by Python 2
    except Exception as error:  # unpickling raises a different type for each way in which a pickle can be wrong
        raise UserError(f"{archive}: a batch inside is not one of CIFAR's ({error!r})") from None


def _split(batches: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of batches that hold rows of 3072 bytes."""
    images = np.concatenate([batch["data"] for batch in batches])
    labels = np.array([label for batch in batches for label in batch.get("labels") or batch["fine_labels"]], np.int64)
    if images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"{len(labels)} labels of {images.dtype} {list(images.shape)}")
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def ensure(url: str, archive: Path, sha256: str) -> None:
    """See to it that `archive` exists with this SHA-256, from `url` when it is missing or damaged.

    A damaged archive stays until a right one takes its place. Raises UserError naming the URL when that cannot be
    fetched, the archive with both checksums when what comes is something else, and the process that is fetching it.
    """
    if archive.is_file():
        if files.sha256(archive) == sha256:
            return
        print(f"{archive} is damaged or cut short: fetching it again", file=sys.stderr)
    digest, size = hashlib.sha256(), 0
    # The lock lies beside the archive, which projects and the workspaces in them share; whoever only reads takes none.
    with lock.alone(archive.parent, archive), files.atomic(archive) as stream:
        print(f"fetching {url} to {archive}", file=sys.stderr)
        for block in _blocks(url, archive):
            stream.write(block)
            digest.update(block)
            size += len(block)
        if digest.hexdigest() != sha256:
            raise UserError(
                f"{archive}: what {url} sent ({size} bytes) has SHA-256 {digest.hexdigest()}, expected {sha256}; "
                "it was not kept: run again, or name a mirror as the source's url"
            )


def _blocks(url: str, archive: Path) -> Iterator[bytes]:
    from tqdm import tqdm

    try:
        request = urllib.request.Request(url, headers={"User-Agent": "tailcal"})
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response,
            # `disable=None` shows the bar on a terminal and keeps it out of logs.
            tqdm(total=response.length, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while block := response.read(BLOCK):
                bar.update(len(block))
                yield block
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(
            f"cannot fetch {url}: {reason}; check the network and run again, name a mirror as the source's url, or put "
            f"the archive at {archive}"
        ) from None
