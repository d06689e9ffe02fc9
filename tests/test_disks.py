"""Full, broken and read-only disks: every write may fail, every file may be cut short or have a bit flipped.

With --long: every write of every stage with every error, every byte of a checkpoint and of a file of predictions.
"""

import errno
import hashlib
import importlib
import io
import itertools
import os
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from stages import paths, subsample
from tailcal import checkpoint, errors, files, rows, splits, train, weights
from tailcal.duplicates import TWICE
from tailcal.errors import UserError
from tests.conftest import ROOT, TINY, edit
from tests.test_contract import run as train_tiny

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
CPU = torch.device("cpu")
STATE = {
    "network": {"weight": torch.arange(12.0).reshape(3, 4), "steps": torch.tensor(7)},
    "optimiser": [[torch.linspace(-1, 1, 12).reshape(3, 4)]],
    "epoch": 2,
    "history": [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}],
}


def replace(patch: pytest.MonkeyPatch, module: ModuleType, name: str, function: Callable) -> None:
    """Have the standard library call `function` in place of a function of `os` or `io`."""
    patch.setattr(module, name, function)
    earlier = getattr(pathlib, "_normal_accessor", None)  # where Python 3.10 has looked them up by now
    if hasattr(earlier, name):
        patch.setattr(earlier, name, function)


class Disk:
    """Counts the calls that write to disk, and fails those from number `first` on with `error`.

    Every call through which Python writes is among them: making folders, opening, writing, truncating, syncing,
    permissions, renaming and linking. Removing is not: it frees a disk, and is how a failed write cleans up.
    """

    CALLS = ("mkdir", "fsync", "chmod", "replace", "rename", "link")

    def __init__(self, patch: pytest.MonkeyPatch):
        self.count, self.first, self.error = 0, sys.maxsize, 0
        for name in self.CALLS:
            replace(patch, os, name, self.counted(getattr(os, name)))
        for module, name in ((os, "fdopen"), (io, "open")):
            replace(patch, module, name, self.writers(getattr(module, name)))

    def tick(self, path: object = None) -> None:
        """One more call; `path` is what the system would name in the error, if anything."""
        self.count += 1
        if self.count >= self.first:
            named = () if path is None else (os.fspath(path),)
            raise OSError(self.error, os.strerror(self.error), *named)

    def counted(self, call: Callable) -> Callable:
        def tried(*arguments, **options):
            self.tick(arguments[0] if arguments and isinstance(arguments[0], str | Path) else None)
            return call(*arguments, **options)

        return tried

    def writers(self, opening: Callable) -> Callable:
        """Streams that are opened for writing count their own calls."""

        def opened(file, mode="r", *arguments, **options):
            if not set(mode) & set("wax+"):
                return opening(file, mode, *arguments, **options)
            self.tick(file if isinstance(file, str | Path) else None)
            stream = opening(file, mode, *arguments, **options)
            for name in ("write", "truncate"):
                stream = Counting(stream, name, self)
            return stream

        return opened

    def fail(self, first: int, error: int) -> None:
        """Fail from the `first`-th call on, counted from now."""
        self.count, self.first, self.error = 0, first, error

    def mend(self) -> int:
        """Fail no more; returns how many calls there were."""
        self.first = sys.maxsize
        return self.count


class Counting:
    """A stream one of whose methods is counted by a disk."""

    def __init__(self, stream, name: str, disk: Disk):
        self.stream, self.name, self.disk = stream, name, disk

    def __getattr__(self, name: str):
        found = getattr(self.stream, name)
        if name != self.name:
            return found

        def tried(*arguments):
            self.disk.tick()
            return found(*arguments)

        return tried

    def __enter__(self):
        self.stream.__enter__()
        return self

    def __exit__(self, *error):
        return self.stream.__exit__(*error)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(main: Callable[[], object]) -> str | None:
    """What a stage with this `main` says as it ends, one printable line; None when it ends well."""
    try:
        errors.run(main)
    except SystemExit as ended:
        assert ended.code.startswith("error: ")
        assert ended.code.isprintable()
        return ended.code
    return None


def save_predictions(path: Path, value: int) -> None:
    with files.atomic(path) as stream:
        np.savez(stream, **predictions(value))


def predictions(value: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(value)
    return {
        f"{split}_{what}": rng.normal(size=(n, 3)).astype(np.float32) if what == "logits" else np.arange(n) % 3
        for split, n in (("test", 9), ("holdout", 6))
        for what in ("logits", "labels")
    }


def network(value: int) -> torch.nn.Module:
    torch.manual_seed(value)
    return torch.nn.Linear(5, 3)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "text": lambda path, value: files.write_text(path, str(value)),
    "json": lambda path, value: files.write_json(path, {"value": value}),
    "array": lambda path, value: files.write_array(path, np.full((40, 50), value)),
    "rows": lambda path, value: rows.write_rows(path, np.full((40, 50), value), np.arange(0, 40, 3)),
    "predictions": save_predictions,
    "weights": lambda path, value: weights.save_weights(network(value), path),
    "checkpoint": lambda path, value: checkpoint.save(path, STATE | {"epoch": value}),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("before", [True, False])
def test_each_call_of_a_write_that_fails_keeps_what_there_was(name, error, before, tmp_path, disk):
    for first in itertools.count(1):
        folder = tmp_path / str(first)
        path = folder / "deep" / "file"
        if before:
            WRITERS[name](path, 1)
            old = content(folder)
        disk.fail(first, error)
        said = one_line(lambda path=path: WRITERS[name](path, 2))
        disk.mend()
        if said is None:
            break
        assert said == f"error: {path}: cannot write: {os.strerror(error)}"
        left = content(folder)
        if before and name == "checkpoint":  # the old one may have its other name already
            left = {Path(file).name.removesuffix(".previous.pt"): data for file, data in left.items()}
            old = {"file": next(iter(old.values()))}
        assert left == (old if before else {})
        WRITERS[name](path, 2)  # the disk has room again
    assert first > (5 if before else 6)


FULL = """
import sys
sys.path.insert(0, "src")
from pathlib import Path
import numpy as np
from tailcal import errors, files
folder = Path(sys.argv[1])
path = folder / "array.npy"
files.write_array(path, np.zeros(1000))
try:
    (folder / "filler").write_bytes(bytes(1 << 20))
except OSError as error:
    print(error.strerror, flush=True)
errors.run(lambda: files.write_array(path, np.ones(1000)))
"""


def test_a_disk_that_is_really_full(tmp_path):
    """A tmpfs of 64 KiB: the kernel itself refuses, in the midst of a write."""
    done = subprocess.run(
        [
            *("unshare", "--map-root-user", "--mount", "sh", "-c"),
            'mount -t tmpfs -o size=64k tmpfs "$1" || exit; "$2" -c "$3" "$1"; md5sum < "$1/array.npy"; ls -A "$1"',
            *("sh", str(tmp_path), sys.executable, FULL),
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no tmpfs of one's own here: {done.stderr.strip()}")
    stream = io.BytesIO()
    np.save(stream, np.zeros(1000))
    kept = hashlib.md5(stream.getvalue()).hexdigest()
    assert done.stdout.split("\n") == ["No space left on device", f"{kept}  -", "array.npy", "filler", ""]
    assert done.stderr == f"error: {tmp_path}/array.npy: cannot write: No space left on device\n"


class Unreadable(io.RawIOBase):
    """A file that opens and cannot be read: a bad sector."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def readinto(self, _buffer) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()


@pytest.mark.parametrize(
    "read",
    [files.read_json, files.read_array, files.sha256, lambda path: files.read_arrays(path, ["x"])],
    ids=["json", "array", "sha256", "arrays"],
)
def test_a_file_with_a_bad_sector_is_named(read, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"content")

    def opened(file, mode="r", *_arguments, **options):
        stream = io.BufferedReader(Unreadable(file))
        return stream if "b" in mode else io.TextIOWrapper(stream, options.get("encoding"))

    replace(monkeypatch, io, "open", opened)
    said = one_line(lambda: read(path))
    assert said.startswith(f"error: {path}")
    assert "Input/output error" in said


# Checkpoints


def epochs_kept(path: Path) -> list[int]:
    """Save two generations at `path`; returns their epochs, the newest first."""
    checkpoint.save(path, STATE | {"epoch": 1})
    checkpoint.save(path, STATE | {"epoch": 2})
    return [2, 1]


def test_two_generations_are_kept_and_a_damaged_newest_gives_way_to_the_one_before(tmp_path, capsys):
    path = tmp_path / "seed0.pt"
    for epoch in (1, 2, 3):
        checkpoint.save(path, STATE | {"epoch": epoch})
    older = checkpoint.previous(path)
    assert sorted(content(tmp_path)) == ["seed0.previous.pt", "seed0.pt"]
    loaded = checkpoint.load(path, CPU)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["network"]["weight"], STATE["network"]["weight"])
    assert capsys.readouterr().err == ""

    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.load(path, CPU)["epoch"] == 2
    said = capsys.readouterr().err
    assert said.startswith(f"warning: the checkpoint {path} is damaged (its ")
    assert said.endswith(f"; going on from {older}\n")
    assert said.count("\n") == 1
    assert not path.exists()

    checkpoint.save(path, STATE | {"epoch": 3})  # the good older one is not pushed out by the damaged one
    assert torch.equal(checkpoint.load(older, CPU)["network"]["weight"], STATE["network"]["weight"])
    for generation in (path, older):
        generation.write_bytes(b"")
    assert checkpoint.load(path, CPU) is None
    assert [line.rsplit("; ", 1)[1] for line in capsys.readouterr().err.splitlines()] == [
        f"going on from {older}",
        "starting over",
    ]
    assert content(tmp_path) == {}


def test_a_save_that_was_cut_off_between_its_two_renames(tmp_path, capsys):
    path = tmp_path / "seed0.pt"
    epochs_kept(path)
    path.replace(checkpoint.previous(path))
    assert checkpoint.load(path, CPU)["epoch"] == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"the last good checkpoint is .*seed0\.previous\.pt\."):
        train.Replica("x", 0, None, path, "recipe").require_finite(False, "a weight is wrong", 3)


def test_a_checkpoint_cut_at_any_byte_or_with_any_bit_flipped_is_never_taken_up(tmp_path, long, capsys):
    path = tmp_path / "seed0.pt"
    epochs_kept(path)
    whole, older = path.read_bytes(), checkpoint.previous(path).read_bytes()
    rng = random.Random(0)
    every = range(len(whole))
    places = every if long else sorted({0, 31, 32, 33, len(whole) - 1, *rng.sample(every, 200)})
    harmed = [whole[:place] for place in places]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        harmed.append(bytes(flipped))
    for bytes_ in harmed:
        path.write_bytes(bytes_)
        assert checkpoint.load(path, CPU)["epoch"] == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert checkpoint.previous(path).read_bytes() == older
    if long:
        with capsys.disabled():
            print(f"\ncheckpoint of {len(whole)} bytes: {len(harmed)} damaged ones, none taken up")


def test_a_checkpoint_that_may_not_be_read_is_left_alone_and_one_that_cannot_be_is_given_up(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "seed0.pt"
    checkpoint.save(path, STATE)

    def refuse_with(code: int) -> None:
        def refuse(_: Path) -> bytes:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(Path, "read_bytes", refuse)

    refuse_with(errno.EACCES)
    with pytest.raises(OSError, match="cannot read"):
        checkpoint.load(path, CPU)
    assert path.exists()
    refuse_with(errno.EIO)
    assert checkpoint.load(path, CPU) is None
    assert "is damaged (the disk cannot read it)" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("other", [[1, 2], torch.zeros(3), "text", None])
def test_a_checkpoint_of_something_else_counts_as_damaged(other, tmp_path, capsys):
    stream = io.BytesIO()
    torch.save(other, stream)
    path = tmp_path / "seed0.pt"
    path.write_bytes(hashlib.sha256(stream.getvalue()).digest() + stream.getvalue())
    assert checkpoint.load(path, CPU) is None
    assert f"it holds a {type(other).__name__}" in capsys.readouterr().err


def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_with_the_same_bits(tmp_path, capsys):
    whole, history = train_tiny("ce", tmp_path / "whole", epochs=4)
    path, saves = tmp_path / "broken" / "ce" / "seed0.pt", itertools.count(1)
    save = checkpoint.save

    def third_is_the_last(path, state):
        save(path, state)
        if next(saves) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.checkpoint, "save", third_is_the_last)
        train_tiny("ce", tmp_path / "broken", epochs=4)
    harmed = bytearray(path.read_bytes())
    harmed[len(harmed) // 2] ^= 1
    path.write_bytes(harmed)
    resumed, resumed_history = train_tiny("ce", tmp_path / "broken", epochs=4)
    assert f"going on from {checkpoint.previous(path)}" in capsys.readouterr().err
    assert resumed_history == history
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


# Artefacts with a flipped bit


def test_a_flipped_bit_in_predictions_is_found(tmp_path, long, capsys):
    """Every bit that matters: a flip in what zip itself does not read (dates, flags) leaves the arrays as they are."""
    path = tmp_path / "seed0.npz"
    save_predictions(path, 0)
    whole, right = path.read_bytes(), predictions(0)
    rng = random.Random(0)
    every = [(place, bit) for place in range(len(whole)) for bit in range(8)]
    outcomes = {"named": 0, "harmless": 0}
    for place, bit in every if long else rng.sample(every, 600):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            found = files.read_arrays(path, right)
        except UserError as error:
            assert str(error).startswith(f"{path} is damaged")
            assert str(error).isprintable()
            outcomes["named"] += 1
            continue
        assert all(np.array_equal(found[name], array) for name, array in right.items()), (place, bit)
        outcomes["harmless"] += 1
    if long:
        with capsys.disabled():
            print(f"\npredictions of {len(whole)} bytes, every bit: {outcomes}")


DATASET = ("--dataset", "digits_lt")
STAGES = {
    "check": (),
    "download": DATASET,
    "subsample": DATASET,
    "represent": (*DATASET, "--representation", "ce"),
    "calibrate": (*DATASET, "--representation", "ce", "--classifier", "mislas"),
    "evaluate": (*DATASET, "--representation", "ce", "--classifier", "mislas"),
    "report": (),
}
ONE_CELL = [  # one seed, two epochs, and a checkpoint after each
    *TINY,
    ("  - joint\n", ""),
    ("- 0\n- 1\n", "- 0\n"),
    ("epochs: 8", "epochs: 2"),
    ("- 6\n", "- 1\n"),
    ("warmup: 5", "warmup: 1"),
    ("checkpoint_seconds: 5", "checkpoint_seconds: 0"),
]


def stage(name: str) -> str | None:
    """Run a stage in this process, in the current folder; returns its error line, if it ends with one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *STAGES[name]])
        return one_line(importlib.import_module(f"stages.{name}").main)


@dataclass(frozen=True)
class Made:
    """A project of one cell before and after a stage, and how many calls that write the stage makes."""

    before: dict[str, bytes]
    after: dict[str, bytes]
    calls: int


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Made]:
    """What an undisturbed run of every stage makes."""
    root, found = tmp_path_factory.mktemp("project"), {}
    shutil.copy(ROOT / "params.yaml", root)
    edit(root / "params.yaml", ONE_CELL)
    for name in STAGES:
        before = content(root)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            disk = Disk(patch)
            assert stage(name) is None
        found[name] = Made(before, content(root), disk.count)
    return found


@pytest.fixture
def put(tmp_path, monkeypatch) -> Callable[[dict[str, bytes]], None]:
    """Makes the current folder hold these files and nothing else."""
    deterministic = torch.are_deterministic_algorithms_enabled()

    def put_(found: dict[str, bytes]) -> None:
        root = tmp_path / "project"
        shutil.rmtree(root, ignore_errors=True)
        for name, data in found.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        monkeypatch.chdir(root)

    yield put_
    torch.use_deterministic_algorithms(deterministic)


def test_a_flipped_bit_in_an_artefact_is_named_by_the_stage_that_reads_it(made, put):
    reads = {
        paths.raw("digits_lt"): "subsample",
        paths.longtail("digits_lt"): "calibrate",
        paths.representation("digits_lt", "ce"): "calibrate",
        paths.predictions("digits_lt", "ce", "mislas"): "evaluate",
    }
    put(made["report"].before)
    for folder, reader in reads.items():
        for path in sorted([*folder.glob("*.npy"), *folder.glob("*.safetensors"), *folder.glob("*.npz")]):
            whole = path.read_bytes()
            for place in (0, len(whole) // 2):
                harmed = bytearray(whole)
                harmed[place] ^= 4
                for data in (bytes(harmed), whole[:place]):
                    path.write_bytes(data)
                    said = stage(reader)
                    assert said is not None, f"{path} byte {place}"
                    assert str(path) in said
            path.write_bytes(whole)


def results(files_: dict[str, bytes]) -> dict[str, bytes]:
    """Without the work of unfinished stages, and without the times that they took."""
    apart = (".scratch/", "data/costs/", "plots/costs.html")
    return {name: data for name, data in files_.items() if not name.startswith(apart)}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_whose_disk_fails_ends_with_one_line_and_the_next_run_makes_it_whole(
    name, made, put, disk, long, capsys
):
    """The error comes at one of all its writes; whatever is left, running again gives what an undisturbed run gives."""
    before, after, calls = made[name].before, made[name].after, made[name].calls
    plan = list(itertools.product(range(1, calls + 1), ERRORS))
    hits = 0
    for first, error in plan if long else random.Random(0).sample(plan, 1 if name == "report" else 2):
        put(before)
        disk.fail(first, error)
        said = stage(name)
        if disk.mend() < first:  # the first run of all imports libraries, which may write caches of their own
            assert said is None
            continue
        hits += 1
        assert said is not None, f"call {first} of {calls}"
        assert os.strerror(error) in said
        assert said.removeprefix("error: ").split(": ")[0].startswith(("data/", "metrics/", "plots/", ".scratch/")), (
            said
        )
        left = content(Path())
        assert not [file for file in left if file.endswith(".part")]
        partial = {file for file, data in results(left).items() if data not in (before.get(file), after.get(file))}
        assert not partial, f"call {first} of {calls}"
        assert stage(name) is None
        assert results(content(Path())) == results(after)
    assert hits
    if long:
        with capsys.disabled():
            print(f"\n{name}: {calls} calls that write x {len(ERRORS)} errors: one line each, then whole again")


def test_splits_that_their_own_description_does_not_fit_are_refused(tmp_path):
    images, labels = np.zeros((6, 4, 4, 1), np.uint8), np.arange(6) % 3
    for wrong_images, wrong_labels in (
        (images[0], labels),
        (images.astype(np.float32), labels),
        (images, labels[:4]),
        (images, labels.astype(np.float64)),
        (images, labels + 1),
        (images, labels - 1),
    ):
        files.write_array(tmp_path / "train_images.npy", wrong_images)
        files.write_array(tmp_path / "train_labels.npy", wrong_labels)
        describe(tmp_path)
        with pytest.raises(UserError, match=r"train_(images|labels)\.npy"):
            splits.read_split(tmp_path, "train")
    files.write_array(tmp_path / "train_labels.npy", labels)
    describe(tmp_path)
    assert splits.read_split(tmp_path, "train")[1].tolist() == labels.tolist()


def describe(folder: Path) -> None:
    checksums = {path.name: files.sha256(path) for path in folder.glob("*.npy")}
    counts = {"class_names": list("abc"), "train_counts": [2, 2, 2], "test_counts": [2, 2, 2]}
    origin = {"source": {}, "raw": {}, "imbalance": {}, "holdout_per_class": 0, "checksums": checksums}
    files.write_json(folder / "meta.json", counts | origin | {"skipped": {}, "duplicates": dict.fromkeys(TWICE, 0)})


def test_the_raw_data_are_refused_when_a_checksum_is_wrong(tmp_path):
    for split, what in itertools.product(("train", "test"), ("images", "labels")):
        array = np.zeros((4, 2, 2, 1), np.uint8) if what == "images" else np.arange(4) % 2
        files.write_array(tmp_path / f"{split}_{what}.npy", array)
    checksums = {path.name: files.sha256(path) for path in tmp_path.glob("*.npy")}
    files.write_json(tmp_path / "meta.json", {"class_names": ["a", "b"], "source": {}, "checksums": checksums})
    subsample.read_raw(tmp_path)
    with (tmp_path / "test_labels.npy").open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"\x02")
    with pytest.raises(UserError, match=r"test_labels\.npy is damaged: its SHA-256"):
        subsample.read_raw(tmp_path)
