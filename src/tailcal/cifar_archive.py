"""The official CIFAR archives: fetched once, verified, kept, and read anew by whoever needs them.

The batches inside are pickles, and unpickling can run code. So an archive is not even opened before its SHA-256 is the
official one. Then torchvision reads it, from a temporary folder: there is no unpacked file that could be damaged later.
"""

import hashlib
import http.client
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tailcal import files, lock
from tailcal.errors import UserError
from tailcal.sources import Raw, Source

TIMEOUT_SECONDS = 60
BLOCK = 1 << 20


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
    with tempfile.TemporaryDirectory(prefix="tailcal-") as folder:
        try:
            with tarfile.open(archive) as tar:
                # Versions of Python before 3.10.12 and 3.11.4 have no filter.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(folder)
            train, test = dataset(folder, train=True), dataset(folder, train=False)
        except RuntimeError:  # as torchvision says it
            raise UserError(
                f"{archive}: the batches inside do not have the official MD5 checksums although the archive is right: "
                "check the disk and run again"
            ) from None
        except Exception as error:  # tar, gzip, the disk and pickle each raise types of their own
            raise UserError(
                f"{archive}: cannot be unpacked to {folder} although its checksum is right ({error!r})"
            ) from None
    labels, test_labels = np.array(train.targets, np.int64), np.array(test.targets, np.int64)
    return Raw(train.data, labels, test.data, test_labels, train.classes)


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
