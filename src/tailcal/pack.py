"""Packing: decode every image of a listing once, into the arrays of a raw data set.

Several processes decode and write straight into `<split>_images.npy` in a work folder; the parent counts. Every
`FLUSH_SECONDS` it writes the pixels through to the disk and then notes in `<split>_keys.npy` whose pixels each row now
holds, so a packing that is killed goes on where it was. A key is a digest of the file's path, size and times, of the
target size and of the code that decodes. The work folder is named by all keys together: other files are another
folder, which takes over the rows it has in common with the unfinished one. So removing one bad image out of a million
decodes none of the others again.

Memory: about 500 bytes an image for names and keys, one chunk of `tailcal.rows` for copies, and in each process the
image being decoded (up to 24 bytes a pixel, so 1.6 GB for the largest allowed). The arrays are only ever on disk:
N * size * size * channels bytes, twice that while images are being left out.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import stat
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tailcal import duplicates, files, images, longtail, provenance, rows
from tailcal.errors import UserError
from tailcal.progress import Progress
from tailcal.sources import Listing

SPLITS = ("train", "test")
FLUSH_SECONDS = 3.0
TASK = 8  # images handed to a process at a time: few, so that large ones too come back within seconds
NAMED = 3  # bad files that an error line names
SKIPPED = "skipped.txt"
DUPLICATES = "duplicates.txt"

Bad = dict[int, str]  # row: what is wrong with its file
Sums = dict[int, int]  # row: the CRC-32 of its pixels


class Task(NamedTuple):
    """Some files of one split to decode into rows of the array that begins at byte `offset` of `target`."""

    target: Path
    offset: int
    root: Path
    split: str
    files: list[tuple[int, str]]  # row, path relative to root
    size: int
    channels: int


class Done(NamedTuple):
    """What came of a task: the rows that were written, and the bad ones."""

    split: str
    written: Sums
    bad: Bad


def write(listing: Listing, folder: Path, scratch: Path) -> dict[str, Any]:
    """Write {train,test}_{images,labels}.npy to `folder`: images uint8 [N, size, size, channels], labels int64 [N].

    The work goes on in `scratch`, and stays there until the caller, who now has everything, calls `clean`. Returns
    {"skipped": {"train": n, "test": n}}: how many images could not be read. With `listing.strict` there are none;
    otherwise they are left out of images and labels, and `skipped.txt` in `folder` says which and why. Images that have
    the pixels of an earlier one are kept, and listed in `duplicates.txt`.

    Raises UserError (one line with the count, the first files and the name of a complete list) when images are bad
    and `strict`, before anything is decoded when files are missing; when a class loses all its images; when the disk
    has not room for all; when a process is killed. Raises OSError when the disk fails.
    """
    keys, bad = {}, {}
    for split in SPLITS:
        keys[split], bad[split] = _keys(listing, getattr(listing, f"{split}_files"))
    if any(bad.values()):
        _report(listing, bad, scratch, "; the others have not been looked at")
    digest = hashlib.sha256(b"".join(keys[split].tobytes() + b"/" for split in SPLITS)).hexdigest()[:20]
    work = scratch / digest
    shape = (listing.size, listing.size, listing.channels)
    stores = {split: _Store(work, split, keys[split], shape) for split in SPLITS}
    _adopt(stores, scratch, work)
    _decode_missing(listing, stores, bad, scratch.name)
    if any(bad.values()):
        _report(listing, bad, scratch)

    kept = {split: np.setdiff1d(np.arange(len(keys[split])), list(bad[split])) for split in SPLITS}
    for split in SPLITS:
        counts = np.bincount(getattr(listing, f"{split}_labels")[kept[split]], minlength=len(listing.class_names))
        if not counts.all():
            title = longtail.class_title(int(counts.argmin()), listing.class_names)
            raise UserError(f"{listing.root}: {title} has no image in the {split} split that can be read")
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        stores[split].publish(folder / f"{split}_images.npy", kept[split])
        files.write_array(folder / f"{split}_labels.npy", getattr(listing, f"{split}_labels")[kept[split]])
    (folder / SKIPPED).unlink(missing_ok=True)
    if any(bad.values()):
        _write_list(folder / SKIPPED, listing, bad)
        print(f"warning: {_count(bad)} images left out, listed in {folder / SKIPPED}", file=sys.stderr)
    _list_duplicates(listing, folder, kept)
    return {"skipped": {split: len(bad[split]) for split in SPLITS}}


def clean(scratch: Path) -> None:
    """Remove the work of a packing whose result is complete."""
    shutil.rmtree(scratch, ignore_errors=True)


def _keys(listing: Listing, names: list[str]) -> tuple[np.ndarray, Bad]:
    """A key for each file, uint64 [N], never 0; and the rows whose file is missing or none."""
    from PIL import __version__

    code = provenance.code_version(images.__name__)
    common = [os.path.realpath(listing.root), listing.size, listing.channels, code, __version__]
    start = hashlib.blake2b(json.dumps(common).encode(), digest_size=8)
    keys, bad = np.empty(len(names), np.uint64), {}
    for row, name in enumerate(names):
        try:
            found = (listing.root / name).stat()
            if not stat.S_ISREG(found.st_mode):
                bad[row] = "is not a file"
            about = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            bad[row] = about = "is missing" if missing else f"cannot be read ({error.strerror})"
        key = start.copy()
        key.update(os.fsencode(name) + b"\0" + about.encode())
        keys[row] = int.from_bytes(key.digest(), "little") or 1
    return keys, bad


class _Store:
    """The rows of one split in the work folder. `expected` are the files' keys, `held` those whose pixels are there,
    `sums` the CRC-32 of these pixels: a bit that flips between a kill and the next run is found, and decoded again."""

    def __init__(self, work: Path, split: str, expected: np.ndarray, shape: tuple[int, ...]):
        self.images, keys, sums = (work / f"{split}_{part}.npy" for part in ("images", "keys", "sums"))
        self.expected, self.shape = expected, (len(expected), *shape)
        if not self._whole(keys, sums):
            work.mkdir(parents=True, exist_ok=True)
            with self.images.open("wb") as stream:
                files.write_header(stream, self.shape, np.dtype(np.uint8))
                stream.truncate(stream.tell() + int(np.prod(self.shape)))
            files.write_array(sums, np.zeros(len(expected), np.uint32))
            files.write_array(keys, np.zeros(len(expected), np.uint64))
        self.offset = files.read_array(self.images, mmap=True).offset
        self.held, self.sums = (np.load(path, mmap_mode="r+", allow_pickle=False) for path in (keys, sums))
        self._forget_changed()

    def _whole(self, keys: Path, sums: Path) -> bool:
        """Whether an earlier run has left all three arrays."""
        try:
            found = [files.read_array(path, mmap=True) for path in (self.images, keys, sums)]
        except UserError:
            return False
        made = [(np.uint8, self.shape), (np.uint64, self.shape[:1]), (np.uint32, self.shape[:1])]
        return [(array.dtype, array.shape) for array in found] == made

    def _forget_changed(self) -> None:
        """Count the rows whose pixels are no longer those that were written as missing."""
        pixels = files.read_array(self.images, mmap=True)
        changed = [row for row in np.flatnonzero(self.held) if zlib.crc32(pixels[row]) != self.sums[row]]
        if changed:
            self.held[changed] = 0
            print(f"warning: {self.images}: {len(changed):,} images are damaged; decoding them again", file=sys.stderr)

    def missing(self) -> np.ndarray:
        """Rows that are still to be decoded, int64."""
        return np.flatnonzero(self.held != self.expected)

    def flush(self, written: Sums) -> None:
        """Write pixels through to the disk, and only then say that these rows hold theirs."""
        with self.images.open("rb+") as stream:
            os.fsync(stream.fileno())
        taken = list(written)
        self.sums[taken] = list(written.values())
        self.sums.flush()
        self.held[taken] = self.expected[taken]
        self.held.flush()

    def publish(self, path: Path, kept: np.ndarray) -> None:
        """Put the rows `kept` (int64, ascending) at `path`; when they are all, without a copy where the disk can."""
        if len(kept) == len(self.expected):
            path.unlink(missing_ok=True)
            # Linked, not moved: the work stays whole until everything has been written. Some disks have no links.
            with contextlib.suppress(OSError):
                path.hardlink_to(self.images)
                return
        rows.write_rows(path, files.read_array(self.images, mmap=True), kept)


def _adopt(stores: dict[str, _Store], scratch: Path, work: Path) -> None:
    """Take over the rows that earlier packings left unfinished have in common with this one, and remove those."""
    for other in sorted(path for path in scratch.iterdir() if path.is_dir() and path != work):
        for split in SPLITS:
            try:
                held, sums = (files.read_array(other / f"{split}_{part}.npy") for part in ("keys", "sums"))
                pixels = files.read_array(other / f"{split}_images.npy", mmap=True)
            except UserError:  # it was killed before it had begun
                continue
            for store in stores.values():
                missing = store.missing()
                # No key of a file is 0, so a row of `held` without pixels is in common with nothing.
                _, ours, theirs = np.intersect1d(store.expected[missing], held, return_indices=True)
                step = rows.chunk(store.shape, pixels.dtype)
                for start in range(0, len(ours), step):
                    taken: Sums = {}
                    with store.images.open("rb+") as stream:
                        for row, source in zip(missing[ours[start : start + step]], theirs[start:], strict=False):
                            if zlib.crc32(pixels[source]) == sums[source]:
                                taken[int(row)] = _put(stream, store.offset, int(row), pixels[source])
                    store.flush(taken)
        shutil.rmtree(other, ignore_errors=True)


def _put(stream: Any, offset: int, row: int, pixels: np.ndarray) -> int:
    """Write the pixels of one row; returns their CRC-32."""
    content = np.ascontiguousarray(pixels).data
    stream.seek(offset + row * pixels.nbytes)
    stream.write(content)
    return zlib.crc32(content)


def _decode(task: Task) -> Done:
    """Decode a task's files and write their pixels; runs in any process."""
    written: Sums = {}
    bad: Bad = {}
    with task.target.open("rb+") as stream:
        for row, name in task.files:
            path = task.root / name
            try:
                pixels = images.read_image(path, task.size, task.channels)
            except UserError as error:
                bad[row] = str(error).removeprefix(f"{images.shown(path)}: ")
                continue
            written[row] = _put(stream, task.offset, row, pixels)
    return Done(task.split, written, bad)


def _decode_missing(listing: Listing, stores: dict[str, _Store], bad: dict[str, Bad], title: str) -> None:
    """Decode every row that is not there yet; add those that cannot be read to `bad`."""
    todo = {split: np.setdiff1d(store.missing(), list(bad[split])) for split, store in stores.items()}
    total = sum(len(store.expected) for store in stores.values()) - sum(map(len, bad.values()))
    left = sum(map(len, todo.values()))
    if not left:
        return
    first = stores["train"]
    needed, free = left * int(np.prod(first.shape[1:])), shutil.disk_usage(first.images.parent).free
    if needed > free:
        raise UserError(
            f"{first.images.parent}: {left:,} images take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
            "make room, or choose a smaller size"
        )

    def tasks() -> Iterator[Task]:
        for split, store in stores.items():
            names = getattr(listing, f"{split}_files")
            for start in range(0, len(todo[split]), TASK):
                some = [(int(row), names[row]) for row in todo[split][start : start + TASK]]
                yield Task(store.images, store.offset, listing.root, split, some, listing.size, listing.channels)

    workers = min(listing.workers or len(os.sched_getaffinity(0)), -(-left // TASK))
    pending: dict[str, Sums] = {split: {} for split in SPLITS}
    flushed = time.monotonic()
    progress = Progress(title, "image", total, total - left)
    with contextlib.closing(_run(tasks(), workers)) as results:
        try:
            for done in results:
                pending[done.split] |= done.written
                bad[done.split] |= done.bad
                progress.add(len(done.written) + len(done.bad))
                if time.monotonic() - flushed >= FLUSH_SECONDS:
                    _flush(stores, pending)
                    flushed = time.monotonic()
        finally:
            _flush(stores, pending)


def _flush(stores: dict[str, _Store], pending: dict[str, Sums]) -> None:
    for split, written in pending.items():
        if written:
            stores[split].flush(written)
            written.clear()


def _run(tasks: Iterator[Task], workers: int) -> Iterator[Done]:
    """Results of the tasks in whatever order they end; only twice as many as `workers` are under way at a time."""
    if workers == 1:
        for task in tasks:
            try:
                done = _decode(task)
            except MemoryError:
                raise _exhausted([task], workers) from None
            yield done
        return
    # Spawned, not forked: a fork would copy locks that the parent's threads may hold.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)
    waiting = {}
    try:
        with _interrupts_held():  # the processes start here, and keep it so
            for task in itertools.islice(tasks, 2 * workers):
                waiting[pool.submit(_decode, task)] = task
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield future.result()
                del waiting[future]
                for task in itertools.islice(tasks, 1):
                    waiting[pool.submit(_decode, task)] = task
    except (BrokenProcessPool, MemoryError):
        raise _exhausted(list(waiting.values()), workers) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _exhausted(tasks: list[Task], workers: int) -> UserError:
    """What to say when memory has run out, or a process was killed, at one of these tasks."""
    less = f"set workers of the source below {workers}" if workers > 1 else "free some memory"
    return UserError(
        f"{tasks[0].root}: a process that decodes images was killed or out of memory, at "
        f"{images.shown(tasks[0].files[0][1])} or one of the next {TASK * len(tasks)} images; {less}, and run again to "
        "go on"
    )


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold an interrupt back until the block ends; in processes that start in it for good, so also while they import
    their libraries, where it would be a traceback of each."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """Make a process leave interrupts to its parent, and end when the parent has been killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _count(bad: dict[str, Bad]) -> str:
    return f"{sum(map(len, bad.values())):,}"


def _named(listing: Listing, bad: dict[str, Bad]) -> Iterator[tuple[str, str]]:
    """Path and reason of every bad file, in the order of the listing."""
    for split in SPLITS:
        for row, reason in sorted(bad[split].items()):
            yield images.shown(getattr(listing, f"{split}_files")[row]), reason


def _write_list(path: Path, listing: Listing, bad: dict[str, Bad]) -> None:
    files.write_text(path, "".join(f"{name}\t{reason}\n" for name, reason in _named(listing, bad)))


def _list_duplicates(listing: Listing, folder: Path, kept: dict[str, np.ndarray]) -> None:
    """Write, and say, which of the images in `folder` have the pixels of an earlier one, and of which."""
    names = [images.shown(getattr(listing, f"{split}_files")[row]) for split in SPLITS for row in kept[split]]
    packed = (files.read_array(folder / f"{split}_images.npy", mmap=True) for split in SPLITS)
    first = duplicates.first_of_each(np.concatenate([duplicates.digests(each) for each in packed]))
    again = np.flatnonzero(first != np.arange(len(first)))
    (folder / DUPLICATES).unlink(missing_ok=True)
    if len(again):
        files.write_text(folder / DUPLICATES, "".join(f"{names[row]}\t{names[first[row]]}\n" for row in again))
        print(
            f"warning: images with the pixels of an earlier one: {len(again):,}, listed in {folder / DUPLICATES}",
            file=sys.stderr,
        )


def _report(listing: Listing, bad: dict[str, Bad], scratch: Path, others: str = "") -> None:
    """Raise the UserError for bad files when the listing is strict; `others` is what to say of the others."""
    if not listing.strict:
        return
    path = scratch / "bad_images.txt"
    _write_list(path, listing, bad)
    total = len(listing.train_files) + len(listing.test_files)
    some = [f"{name} {reason}" for name, reason in itertools.islice(_named(listing, bad), NAMED)]
    if sum(map(len, bad.values())) > NAMED:
        some.append("...")
    raise UserError(
        f"{listing.root}: {_count(bad)} of {total:,} images cannot be read: {'; '.join(some)}; all of them are in "
        f"{path}{others}: mend or remove them, or set the source's strict to false to leave them out"
    )
