"""Packing a listing: the bytes, going on after a kill, bad files, bounded memory; and download from end to end."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from stages import download, paths, subsample
from tailcal import errors, files, images, pack
from tailcal.errors import UserError
from tailcal.sources import Listing

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["ant", "bee"]


def draw(path, seed, shape=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)


def listing(root, train=20, test=6, **keys):
    """A listing of small images, drawn unless they are there, labels 0, 1, 0, 1, ..."""
    names = {split: [f"{split}/{i:03}.png" for i in range(n)] for split, n in (("train", train), ("test", test))}
    for seed, name in enumerate(name for split in names.values() for name in split):
        if not (root / name).exists():
            draw(root / name, seed)
    labels = {split: np.arange(len(some)) % 2 for split, some in names.items()}
    made = Listing(root, names["train"], labels["train"], names["test"], labels["test"], NAMES, 8, 3, workers=1)
    return replace(made, **keys)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(made, name="out"):
    return pack.write(made, Path(name), Path("scratch"))


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded in this process, in order."""
    seen, original = [], images.read_image

    def read(path, *arguments):
        seen.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(images, "read_image", read)
    return seen


def test_the_arrays_are_the_images_in_order(work, capsys):
    made = listing(work, channels=1)
    assert write(made) == {"skipped": {"train": 0, "test": 0}}
    for split, names, labels in (
        ("train", made.train_files, made.train_labels),
        ("test", made.test_files, made.test_labels),
    ):
        expected = np.stack([images.read_image(work / name, 8, 1) for name in names])
        np.save("expected.npy", expected)
        assert Path(f"out/{split}_images.npy").read_bytes() == Path("expected.npy").read_bytes()
        np.save("expected.npy", labels)
        assert Path(f"out/{split}_labels.npy").read_bytes() == Path("expected.npy").read_bytes()
    assert len(list(Path("out").iterdir())) == 4
    assert capsys.readouterr().err.startswith("scratch: 26 of 26 images, ")
    pack.clean(Path("scratch"))
    assert not Path("scratch").exists()


def test_any_number_of_processes_gives_the_same_bytes(work):
    made = listing(work, train=40, strict=False)
    Path("train/007.png").write_bytes(b"x")
    (work / "test/003.png").unlink()
    write(made, "one")
    pack.clean(Path("scratch"))
    write(replace(made, workers=2), "two")
    assert content("one") == content("two")
    assert "skipped.txt" in content("one")


def test_a_copy_where_the_disk_has_no_links(work, monkeypatch):
    made = listing(work)
    write(made, "linked")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write(made, "copied")
    assert content("linked") == content("copied")
    assert Path("copied/train_images.npy").stat().st_nlink == 1


def test_nothing_is_decoded_again_and_what_changed_is(work, decoded):
    made = listing(work)
    write(made)
    assert len(decoded) == 26
    decoded.clear()
    write(made)
    assert decoded == []
    # Before `clean` the work is there, so that of another listing only what differs is decoded, wherever it stood.
    draw(work / "train/004.png", 99)
    (work / "train/009.png").unlink()
    moved = [name for name in made.train_files if not name.endswith("009.png")]
    other = replace(
        made,
        train_files=[made.test_files[0], *moved],
        train_labels=np.arange(20) % 2,
        test_files=made.test_files[1:],
        test_labels=made.test_labels[1:],
    )
    write(other, "other")
    assert decoded == ["004.png"]
    assert len(list(Path("scratch").iterdir())) == 1
    pack.clean(Path("scratch"))
    write(other, "afresh")
    assert content("other") == content("afresh")
    # Another size or other channels have nothing in common.
    decoded.clear()
    write(replace(other, size=4), "small")
    write(replace(other, size=4, channels=1), "grey")
    assert len(decoded) == 2 * 25
    assert np.load("grey/train_images.npy").shape == (20, 4, 4, 1)


KILLED = """
import sys, time
from pathlib import Path
from tailcal import images, pack
from tests.test_pack import listing
original = images.read_image
def slow(*arguments):
    time.sleep(0.01)
    return original(*arguments)
images.read_image = slow
pack.FLUSH_SECONDS = 0.1
if __name__ == "__main__":
    print("begins", flush=True)
    pack.write(listing(Path(), 300, 20, workers=int(sys.argv[1])), Path("out"), Path("scratch"))
"""


def packed_rows():
    """How many rows the work folder says it has."""
    return sum(int((np.load(path) != 0).sum()) for path in Path("scratch").glob("*/*_keys.npy"))


@pytest.mark.parametrize("workers", [1, 2])
def test_going_on_after_a_kill(work, decoded, workers, capsys):
    made = listing(work, 300, 20)
    (work / "killed.py").write_text(KILLED)
    command = [sys.executable, "killed.py", str(workers)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    # A group of its own: what the kill leaves behind would show as an open end of the pipe.
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == b"begins\n"
        deadline = time.monotonic() + 60
        while packed_rows() < 60:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.stdout.read() == b""  # ends only when the decoding processes have ended too
    held = packed_rows()
    assert 60 <= held < 320
    assert not Path("out").exists()
    write(made)
    assert len(decoded) == 320 - held
    assert f"scratch: goes on after {held} of 320 images\n" in capsys.readouterr().err
    pack.clean(Path("scratch"))
    write(made, "undisturbed")
    assert content("out") == content("undisturbed")


@pytest.mark.parametrize("harm", ["a pixel", "the keys", "the sums", "cut keys"])
def test_a_bit_that_flips_before_a_packing_goes_on_is_never_packed(work, decoded, capsys, harm):
    made = listing(work, 40, 8, strict=False)
    write(made, "undisturbed")
    pack.clean(Path("scratch"))
    write(made)  # and leaves its work behind, as one that was killed just before its end
    (folder,) = Path("scratch").iterdir()
    for path in Path("out").glob("*_images.npy"):  # linked to the work
        path.unlink()
    decoded.clear()
    names = {"a pixel": "train_images", "the sums": "train_sums"}
    path = folder / f"{names.get(harm, 'train_keys')}.npy"
    content_ = bytearray(path.read_bytes())
    content_[-100] ^= 8
    path.write_bytes(content_[:-5] if harm == "cut keys" else content_)
    write(made)
    assert content("out") == content("undisturbed")
    assert len(decoded) == (40 if harm == "cut keys" else 1)
    said = capsys.readouterr().err
    assert ("train_images.npy: 1 images are damaged; decoding them again" in said) == (harm in names)


def test_what_was_packed_is_noted_at_each_flush(work, monkeypatch):
    """An interrupt loses nothing; a kill at any moment loses what came after the last flush."""
    made, original, held = listing(work, 64, 8), images.read_image, []

    def read(path, *arguments):
        held.append(packed_rows())
        if len(held) == 50:
            raise KeyboardInterrupt
        return original(path, *arguments)

    monkeypatch.setattr(images, "read_image", read)
    monkeypatch.setattr(pack, "FLUSH_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        write(made)
    assert held == [i // pack.TASK * pack.TASK for i in range(50)]
    monkeypatch.setattr(pack, "FLUSH_SECONDS", 1000.0)
    pack.clean(Path("scratch"))
    held.clear()
    with pytest.raises(KeyboardInterrupt):
        write(made)
    assert held == [0] * 50
    assert packed_rows() == 48


def test_half_made_work_folder(work):
    made = listing(work)
    write(made)
    (folder,) = Path("scratch").iterdir()
    (folder / "train_keys.npy").unlink()  # killed before it could be written
    (folder / "train_images.npy").write_bytes(b"half")
    Path("scratch/other").mkdir()
    Path("scratch/other/train_images.npy").write_bytes(b"half")
    first = {name: bytes(data) for name, data in content("out").items() if not name.startswith("train_images")}
    write(made, "again")
    assert {name: data for name, data in content("again").items() if not name.startswith("train_images")} == first
    assert (np.load("again/train_images.npy")[3] == images.read_image(work / "train/003.png", 8, 3)).all()


def harm(work):
    """Six bad files of four kinds; 26 in all."""
    Path("train/001.png").write_bytes(b"")
    whole = Path("train/002.png").read_bytes()
    Path("train/002.png").write_bytes(whole[: len(whole) // 2])
    Path("train/003.png").write_text("no image")
    draw(work / "train/004.png", 0, (1, 50))
    Path("test/000.png").write_bytes(b"")
    Path("test/001.png").write_bytes(b"")


def test_strict_names_some_and_lists_all(work):
    made = listing(work)
    harm(work)
    with pytest.raises(UserError) as caught:
        write(made)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(
        f"{work}: 6 of 26 images cannot be read: train/001.png is empty (0 bytes); train/002.png is "
    )
    assert "; train/003.png is not an image" in text
    assert "004.png" not in text
    assert "; ...; all of them are in scratch/bad_images.txt: mend or remove them, or set the source's strict" in text
    listed = Path("scratch/bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [
        *(f"train/00{i}.png" for i in (1, 2, 3, 4)),
        "test/000.png",
        "test/001.png",
    ]
    assert not Path("out").exists()


def test_after_mending_only_the_mended_are_decoded(work, decoded):
    made = listing(work)
    harm(work)
    with pytest.raises(UserError):
        write(made)
    decoded.clear()
    for i, name in enumerate(["train/001", "train/002", "train/003", "train/004", "test/000", "test/001"]):
        draw(work / f"{name}.png", i)
    write(made)
    assert sorted(decoded) == ["000.png", "001.png", "001.png", "002.png", "003.png", "004.png"]


def test_not_strict_leaves_out_and_says_so(work, capsys):
    made = listing(work, strict=False)
    harm(work)
    Path("train/005.png").unlink()
    assert write(made) == {"skipped": {"train": 5, "test": 2}}
    assert "warning: 7 images left out, listed in out/skipped.txt\n" in capsys.readouterr().err
    lines = Path("out/skipped.txt").read_text().splitlines()
    assert len(lines) == 7
    assert lines[0] == "train/001.png\tis empty (0 bytes)"
    assert lines[4] == "train/005.png\tis missing"
    kept = [0, *range(6, 20)]
    assert np.load("out/train_labels.npy").tolist() == made.train_labels[kept].tolist()
    expected = [images.read_image(work / made.train_files[i], 8, 3) for i in kept]
    assert (np.load("out/train_images.npy") == expected).all()
    assert np.load("out/test_images.npy").shape == (4, 8, 8, 3)
    # The next time all is well, and no list says otherwise.
    pack.clean(Path("scratch"))
    for name in (*made.train_files, *made.test_files):
        draw(work / name, 1)
    write(made)
    assert not Path("out/skipped.txt").exists()


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_is_held_back_while_processes_start_and_never_reaches_them():
    ask = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"

    def held():
        return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout

    reached = False
    with pytest.raises(KeyboardInterrupt), pack._interrupts_held():
        signal.raise_signal(signal.SIGINT)
        reached = True
        assert held() == "True\n"
    assert reached
    assert held() == "False\n"


def test_images_that_are_there_twice_are_listed(work, capsys):
    made = listing(work, strict=False)
    Path("train/001.png").write_bytes(b"x")
    for copy, original in (("train/004", "train/002"), ("test/003", "train/002"), ("test/005", "test/000")):
        Path(f"{copy}.png").write_bytes(Path(f"{original}.png").read_bytes())
    write(made)
    assert Path("out/duplicates.txt").read_text().splitlines() == [
        "train/004.png\ttrain/002.png",
        "test/003.png\ttrain/002.png",
        "test/005.png\ttest/000.png",
    ]
    said = "warning: images with the pixels of an earlier one: 3, listed in out/duplicates.txt\n"
    assert capsys.readouterr().err.endswith(said)
    # The next time there are none, and no list says otherwise.
    for seed, name in enumerate(("train/004.png", "test/003.png", "test/005.png")):
        draw(work / name, 100 + seed)
    write(made)
    assert not Path("out/duplicates.txt").exists()


def test_missing_files_are_counted_before_anything_is_decoded(work, decoded):
    made = listing(work)
    for i in (3, 5, 6, 7):
        (work / f"train/00{i}.png").unlink()
    (work / "train/007.png").mkdir()
    with pytest.raises(
        UserError,
        match=r"4 of 26 images cannot be read: train/003\.png is missing; train/005\.png is missing; "
        r"train/006\.png is missing; \.\.\.; all of them are in scratch/bad_images\.txt; "
        r"the others have not been looked at: mend",
    ):
        write(made)
    assert decoded == []
    assert "train/007.png\tis not a file" in Path("scratch/bad_images.txt").read_text()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_that_loses_all_its_images(work, split):
    made = listing(work, 4, 4, strict=False)
    for i in (1, 3):
        Path(f"{split}/00{i}.png").write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{work}: class 1 \(bee\) has no image in the {split} split that can be read"):
        write(made)
    assert not Path("out").exists()


def test_names_of_every_kind(work):
    made = listing(work)
    names = ["train/ä b\u3000猫.PNG", "train/a\nb.png", os.fsdecode(b"train/\xff.png")]
    for i, name in enumerate(names):
        draw(work / name, i)
        made.train_files[i] = name
    write(made)
    (work / names[2]).write_bytes(b"")
    write(replace(made, strict=False), "out")
    assert Path("out/skipped.txt").read_text() == "'train/\\udcff.png'\tis empty (0 bytes)\n"


def test_too_little_room(work, monkeypatch, decoded):
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: SimpleNamespace(free=4000))
    with pytest.raises(UserError, match=r"scratch/\w+: 26 images take 0\.0 GB, and 0\.0 GB are free: make room"):
        write(listing(work))
    assert decoded == []


def die(_task):
    os.kill(os.getpid(), signal.SIGKILL)


def too_large(_task):
    raise MemoryError


def test_a_process_that_is_killed(work, monkeypatch):
    monkeypatch.setattr(pack, "_decode", die)
    with pytest.raises(
        UserError, match=r"a process that decodes images was killed.* set workers of the source below 2"
    ):
        write(listing(work, workers=2))


@pytest.mark.parametrize(("workers", "mend"), [(1, "free some memory"), (2, "set workers of the source below 2")])
def test_too_little_memory_is_one_line(work, monkeypatch, workers, mend):
    monkeypatch.setattr(pack, "_decode", too_large)
    with pytest.raises(UserError) as caught:
        write(listing(work, workers=workers))
    first, some = "train/000.png", pack.TASK * (1 if workers == 1 else 4)
    assert str(caught.value) == (
        f"{work}: a process that decodes images was killed or out of memory, at {first} or one of the next {some} "
        f"images; {mend}, and run again to go on"
    )


def test_a_disk_that_fills_up(work, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "scratch/x")

    monkeypatch.setattr(pack, "_put", full)
    with pytest.raises(SystemExit) as caught:
        errors.run(lambda: write(listing(work)))
    assert caught.value.code == "error: scratch/x: No space left on device"
    assert not Path("out").exists()


def test_memory_is_bounded(work, monkeypatch):
    """56 MB of pixels, packed, a fifth of them left out, and subsampled, in 8 MB."""
    names = [f"{i:03}.png" for i in range(300)]
    for i in range(5):
        draw(work / f"{i}.png", i, (64, 64))
    for i, name in enumerate(names):
        (work / name).symlink_to(f"{i % 5}.png")
    Path("4.png").write_bytes(b"x")
    made = listing(work, 2, 2, train_files=names, train_labels=np.arange(300) % 2, size=250, strict=False)
    monkeypatch.setattr(pack.rows, "CHUNK_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        write(made, paths.raw("x"))
        packed = tracemalloc.get_traced_memory()[1]
        assert Path(paths.raw("x") / "train_images.npy").stat().st_size > 45e6
        raw = np.load(paths.raw("x") / "train_images.npy", mmap_mode="r")
        tracemalloc.reset_peak()
        pack.rows.write_rows(Path("cut.npy"), raw, np.arange(len(raw))[::-1])
        cut = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert packed < 8e6
    assert cut < 4e6
    assert (np.load("cut.npy")[::-1] == raw).all()


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_download_and_subsample(work, kind, monkeypatch):
    """A data set of files from the block in params.yaml to the long-tailed splits."""
    p = yaml.safe_load((ROOT / "params.yaml").read_text())
    block = p["datasets"]["digits_lt"]
    counts = {"few": 5, "many": 30, "medium": 12}
    if kind == "folder":
        block["source"] = {"kind": "folder", "path": "birds", "size": 8, "channels": 1, "test_per_class": 2, "seed": 0}
    else:
        block["source"] = {"kind": "list", "root": "birds", "train": "a.txt", "test": "b.txt", "size": 8, "channels": 1}
    lines = {"a.txt": [], "b.txt": []}
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            draw(work / f"birds/{name}/{i}.png", 100 * k + i)
            lines["b.txt" if i < 2 else "a.txt"].append(f"{name}/{i}.png {k}\n")
    for name, some in lines.items():
        (work / "birds" / name).write_text("".join(some))
    block["holdout_per_class"] = 1
    block["imbalance"] = {"profile": "natural", "seed": 0}
    Path("params.yaml").write_text(yaml.safe_dump(p))
    for stage in (download, subsample):
        monkeypatch.setattr(sys, "argv", ["stage", "--dataset", "digits_lt"])
        stage.main()
    meta = files.read_json(paths.raw("digits_lt") / "meta.json")
    assert meta["class_names"] == (list(counts) if kind == "folder" else ["0", "1", "2"])
    assert meta["skipped"] == {"train": 0, "test": 0}
    assert meta["source"]["size"] == 8
    assert not {"path", "root", "strict", "workers"} & meta["source"].keys()
    for name, checksum in meta["checksums"].items():
        assert files.sha256(paths.raw("digits_lt") / name) == checksum
    assert not (paths.SCRATCH / "pack/digits_lt").exists()
    meta = files.read_json(paths.longtail("digits_lt") / "meta.json")
    assert meta["train_counts"] == [2, 27, 9]
    assert meta["test_counts"] == [2, 2, 2]
    assert (meta["n_max"], meta["measured_factor"]) == (27, 13.5)
