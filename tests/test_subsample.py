"""The stages download and subsample, run in a folder of their own."""

import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml

from stages import download, paths, subsample
from tailcal import errors, files, rows
from tailcal.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
NAME = "digits_lt"
NATURAL = {"profile": "natural", "seed": 0}
RESIZED = {"kind": "resized_crop", "min_area": 0.1, "flip": True, "jitter": 0.4, "grey": 0.2, "blur": 0.5}


class Project:
    """A folder with a params.yaml of its own, and the stages to run in it."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch

    def run(self, stage, dataset=NAME):
        self._monkeypatch.setattr(sys, "argv", [stage.__name__, "--dataset", dataset])
        stage.main()

    def change(self, **keys):
        """Set keys of the data set's block, named with __ for a dot."""
        params = yaml.safe_load(Path("params.yaml").read_text())
        for key, value in keys.items():
            block = params["datasets"][NAME]
            *parents, last = key.split("__")
            for parent in parents:
                block = block[parent]
            block[last] = value
        Path("params.yaml").write_text(yaml.safe_dump(params))

    def cut(self, **keys):
        """Subsample with these keys changed: (meta, arrays by name)."""
        self.change(**keys)
        self.run(subsample)
        folder = paths.longtail(NAME)
        return files.read_json(folder / "meta.json"), {path.stem: np.load(path) for path in folder.glob("*.npy")}

    def put_raw(self, *, names=("ant", "bee", "cat"), **arrays):
        """Lay down a raw data set of 3 classes, 30 training and 4 test images each, with arrays replaced."""
        train, test = np.arange(90) % 3, np.arange(12) % 3
        made = {
            "train_images": np.repeat(np.arange(1, 91, dtype=np.uint8), 4).reshape(90, 2, 2, 1),  # no two the same
            "train_labels": train,
            "test_images": np.zeros((12, 2, 2, 1), np.uint8),
            "test_labels": test,
            **arrays,
        }
        folder = paths.raw(NAME)
        for part, array in made.items():
            files.write_array(folder / f"{part}.npy", array)
        files.write_json(
            folder / "meta.json",
            {
                "class_names": list(names),
                "source": {"kind": "digits", "test_per_class": 50, "seed": 0},
                "checksums": {f"{part}.npy": files.sha256(folder / f"{part}.npy") for part in made},
            },
        )
        return made


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    # The numbers below belong to this block, whatever the project's own says today.
    project = Project(monkeypatch)
    project.change(
        source={"kind": "digits", "test_per_class": 50, "seed": 0},
        holdout_per_class=20,
        imbalance={"profile": "exponential", "factor": 20.0, "seed": 0},
        augmentation={
            "kind": "pad_crop",
            "pad": 1,
            "flip": False,
            "cutout": 1,
            "fill": 128,
            "mean": [0.3],
            "std": [0.4],
        },
    )
    return project


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_download(project):
    project.run(download)
    folder = paths.raw(NAME)
    meta = files.read_json(folder / "meta.json")
    assert meta["class_names"] == list("0123456789")
    assert meta["source"] == {"kind": "digits", "test_per_class": 50, "seed": 0}
    assert sorted(meta["checksums"]) == sorted(path.name for path in folder.glob("*.npy"))
    assert all(files.sha256(folder / name) == checksum for name, checksum in meta["checksums"].items())
    assert np.load(folder / "train_images.npy").shape == (1297, 8, 8, 1)


def test_digits_end_to_end(project):
    project.run(download)
    meta, arrays = project.cut()
    assert meta["train_counts"] == [104, 74, 53, 38, 27, 19, 14, 10, 7, 5]
    assert meta["holdout_counts"] == [20] * 10
    assert meta["test_counts"] == [50] * 10
    assert meta["n_max"] == 104
    assert meta["imbalance"] == {"profile": "exponential", "factor": 20.0, "seed": 0}
    assert meta["measured_factor"] == 20.8
    assert meta["source"]["kind"] == "digits"
    assert sorted(meta["checksums"]) == sorted(f"{part}.npy" for part in arrays)
    for name, checksum in meta["checksums"].items():
        assert files.sha256(paths.longtail(NAME) / name) == checksum
    for split in ("train", "holdout", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert images.shape == (len(labels), 8, 8, 1)
        assert np.bincount(labels, minlength=10).tolist() == meta[f"{split}_counts"]
    raw = np.load(paths.raw(NAME) / "test_images.npy")
    assert (arrays["test_images"] == raw).all()


def test_same_bytes_again(project):
    project.run(download)
    project.cut()
    first = content(paths.raw(NAME)), content(paths.longtail(NAME))
    project.run(download)
    project.cut()
    assert first == (content(paths.raw(NAME)), content(paths.longtail(NAME)))


def test_images_keep_their_labels(project):
    generator = np.random.default_rng(0)
    made = project.put_raw(train_images=generator.integers(0, 256, (90, 8, 8, 1), dtype=np.uint8))
    label_of = {image.tobytes(): label for image, label in zip(made["train_images"], made["train_labels"], strict=True)}
    _, arrays = project.cut(holdout_per_class=5)
    seen = []
    for split in ("train", "holdout"):
        for image, label in zip(arrays[f"{split}_images"], arrays[f"{split}_labels"], strict=True):
            assert label_of[image.tobytes()] == label
            seen.append(image.tobytes())
    assert len(seen) == len(set(seen))


def test_holdout_is_the_same_for_every_factor(project):
    project.run(download)
    _, first = project.cut(imbalance__factor=5)
    _, second = project.cut(imbalance__factor=50)
    for part in ("holdout_images", "holdout_labels"):
        assert (first[part] == second[part]).all()
    assert {image.tobytes() for image in second["train_images"]} < {image.tobytes() for image in first["train_images"]}


def test_another_seed_keeps_other_images(project):
    project.put_raw()
    (_, first), (_, second) = (project.cut(holdout_per_class=5, imbalance__seed=seed) for seed in (0, 1))
    for part in ("train", "holdout"):
        assert (first[f"{part}_labels"] == second[f"{part}_labels"]).all()
        assert (first[f"{part}_images"] != second[f"{part}_images"]).any()


def test_without_holdout_the_published_subset(project):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(3), 30))
    made = project.put_raw(train_labels=labels)
    meta, arrays = project.cut(holdout_per_class=0, imbalance__factor=10, imbalance__seed=0)
    np.random.seed(0)
    expected = []
    for cls, kept in ((0, 30), (1, 9), (2, 3)):
        index = np.where(labels == cls)[0]
        np.random.shuffle(index)
        expected.extend(index[:kept])
    assert (arrays["train_images"] == made["train_images"][expected]).all()
    assert arrays["holdout_images"].shape == (0, 2, 2, 1)
    assert arrays["holdout_labels"].shape == (0,)
    assert arrays["holdout_labels"].dtype == np.int64
    assert meta["holdout_counts"] == [0, 0, 0]


def test_natural_profile_keeps_everything_else(project):
    labels = np.repeat(np.arange(3), [60, 20, 10])
    project.put_raw(train_labels=labels)
    meta, arrays = project.cut(holdout_per_class=2, imbalance=NATURAL)
    assert meta["train_counts"] == [58, 18, 8]
    assert meta["n_max"] == 58
    assert meta["measured_factor"] == 58 / 8
    assert len(arrays["train_labels"]) + len(arrays["holdout_labels"]) == 90


def test_natural_profile_in_any_order_of_the_classes(project):
    """No class order by frequency is needed, and the factor is the one that the data have."""
    labels = np.repeat(np.arange(3), [10, 60, 20])
    made = project.put_raw(train_labels=labels)
    meta, arrays = project.cut(holdout_per_class=0, imbalance=NATURAL)
    assert meta["train_counts"] == [10, 60, 20]
    assert (meta["n_max"], meta["measured_factor"]) == (60, 6.0)
    assert arrays["train_labels"].tolist() == labels.tolist()
    assert sorted(map(bytes, arrays["train_images"])) == sorted(map(bytes, made["train_images"]))


def test_chunks_make_the_bytes_of_numpy(project, monkeypatch):
    """Whatever the size of a chunk, below one image included."""
    generator = np.random.default_rng(2)
    images = generator.integers(0, 256, (90, 3, 5, 3), dtype=np.uint8)
    project.put_raw(train_images=images, test_images=images[:12])
    project.change(augmentation__mean=[0.5] * 3, augmentation__std=[0.5] * 3)
    made = set()
    for size in (1, 45, 100, 16 << 20):
        monkeypatch.setattr(rows, "CHUNK_BYTES", size)
        _, arrays = project.cut(holdout_per_class=5)
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.save(stream, array)
            assert (paths.longtail(NAME) / f"{name}.npy").read_bytes() == stream.getvalue()
        made.add(str(content(paths.longtail(NAME))))
    assert len(made) == 1
    assert (arrays["test_images"] == images[:12]).all()


def test_memory_is_bounded(project, monkeypatch):
    """48 MB of images are cut, and less than a tenth of that is ever held."""
    project.put_raw(
        train_images=np.zeros((90, 300, 300, 3), np.uint8), test_images=np.zeros((90, 300, 300, 3), np.uint8)
    ).clear()
    files.write_array(paths.raw(NAME) / "test_labels.npy", np.arange(90) % 3)
    meta = files.read_json(paths.raw(NAME) / "meta.json")
    meta["checksums"]["test_labels.npy"] = files.sha256(paths.raw(NAME) / "test_labels.npy")
    files.write_json(paths.raw(NAME) / "meta.json", meta)
    project.change(augmentation__mean=[0.5] * 3, augmentation__std=[0.5] * 3, imbalance=NATURAL)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        project.run(subsample)
        assert tracemalloc.get_traced_memory()[1] < 4.8e6
    finally:
        tracemalloc.stop()
    assert (paths.longtail(NAME) / "test_images.npy").stat().st_size > 24e6


def test_what_a_killed_one_left_is_removed(project):
    project.put_raw()
    left = paths.longtail(NAME) / ".train_images.npy.x1.part"
    left.parent.mkdir(parents=True)
    left.touch()
    project.cut(holdout_per_class=5)
    assert not left.exists()


def test_step_profile(project):
    project.put_raw()
    meta, _ = project.cut(holdout_per_class=0, imbalance__profile="step", imbalance__factor=10)
    assert meta["train_counts"] == [30, 3, 3]


def test_names_keep_their_letters(project):
    project.put_raw(names=("Ä", "猫", "b"))
    meta, _ = project.cut(holdout_per_class=0, imbalance__factor=2)
    assert meta["class_names"] == ["Ä", "猫", "b"]


@pytest.mark.parametrize("name", ["train_images", "train_labels", "test_images", "test_labels"])
@pytest.mark.parametrize("where", [8, 20, -1])
def test_flipped_bit_names_the_file(project, name, where):
    project.put_raw()
    path = paths.raw(NAME) / f"{name}.npy"
    damaged = bytearray(path.read_bytes())
    damaged[where] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"^{path} is damaged.*{re.escape(files.REPRO)}$"):
        project.cut()
    assert not paths.longtail(NAME).exists()


def test_missing_files(project):
    with pytest.raises(UserError, match=r"data/raw/digits_lt/meta\.json is missing"):
        project.cut()
    project.put_raw()
    (paths.raw(NAME) / "test_labels.npy").unlink()
    with pytest.raises(UserError, match=r"data/raw/digits_lt/test_labels\.npy is missing"):
        project.cut()


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"class_names": ["a"]}'])
def test_damaged_meta(project, text):
    project.put_raw()
    (paths.raw(NAME) / "meta.json").write_text(text)
    with pytest.raises(UserError, match=rf"^data/raw/digits_lt/meta\.json.* delete .* {re.escape(files.REPRO)}$"):
        project.cut()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("class_names", 5, "class_names: input should be a valid list, got 5"),
        ("class_names", ["ant", 5, "cat"], "class_names.1: input should be a valid string, got 5"),
        ("class_names", ["ant"], "class_names: must have 2 entries or more"),
        ("source", "folder", "source: must be a mapping of keys to values, got 'folder'"),
        ("checksums", 5, "checksums: must be a mapping of keys to values, got 5"),
        ("checksums", ["train_images.npy"], "checksums: must be a mapping of keys to values"),
    ],
)
def test_a_key_of_meta_that_is_damaged_is_one_line(project, key, value, says):
    project.put_raw()
    path = paths.raw(NAME) / "meta.json"
    files.write_json(path, files.read_json(path) | {key: value})
    with pytest.raises(UserError) as error:
        project.cut()
    advice = f"it is damaged, or of another version: delete {path.parent} and {files.REPRO}"
    assert str(error.value) == f"{path}: {says}; {advice}"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"train_images": np.zeros((90, 2, 2), np.uint8)},
            r"train_images\.npy holds uint8 \[90, 2, 2\]: must be uint8",
        ),
        ({"test_images": np.zeros((12, 2, 2, 1))}, r"test_images\.npy holds float64"),
        ({"train_labels": np.arange(89) % 3}, r"train_labels\.npy holds int64 \[89\]: must be int64 \[90\]"),
        ({"train_labels": (np.arange(90) % 3).astype(np.int32)}, r"train_labels\.npy holds int32"),
        ({"train_labels": np.arange(90) % 4}, r"labels 0\.\.3: must lie in 0\.\.2"),
        ({"test_labels": np.arange(12) % 3 - 1}, r"labels -1\.\.1: must lie in 0\.\.2"),
        ({"train_labels": np.arange(90) % 2}, r"class 2 \(cat\) has no images in the train split"),
        ({"test_labels": np.arange(12) % 2 * 2}, r"class 1 \(bee\) has no images in the test split"),
        (
            {"test_labels": np.zeros(0, np.int64), "test_images": np.zeros((0, 2, 2, 1), np.uint8)},
            "no images in the test",
        ),
    ],
)
def test_arrays_that_are_not_a_data_set(project, arrays, message):
    project.put_raw(**arrays)
    with pytest.raises(UserError, match=message):
        project.cut(holdout_per_class=0)


def test_a_long_tail_is_cut_from_a_source_that_has_one(project):
    """Of 40, 12 and 9 images a class: 36, 12 and 4 at factor 9, where the smallest class would allow 9, 3 and 1."""
    labels = np.repeat([0, 1, 2], [40, 12, 9])
    project.put_raw(train_images=np.zeros((61, 8, 8, 1), np.uint8), train_labels=labels)
    meta, arrays = project.cut(holdout_per_class=0, imbalance__factor=9, imbalance__largest=36)
    assert meta["train_counts"] == [36, 12, 4]
    assert np.bincount(arrays["train_labels"]).tolist() == [36, 12, 4]
    assert meta["imbalance"]["largest"] == 36
    with pytest.raises(
        UserError, match=r"imbalance\.largest is 40: class 1 .* would have 13 images, and there are 12: "
    ):
        project.cut(holdout_per_class=0, imbalance__factor=9, imbalance__largest=40)
    with pytest.raises(UserError, match=r"class 1 .* would have 12 images, and there are 10: "):
        project.cut(holdout_per_class=2, imbalance__factor=9, imbalance__largest=36)


def test_where_the_rarest_class_is_too_small_for_the_factor_the_key_that_says_more_is_named(project):
    labels = np.repeat([0, 1, 2], [40, 12, 5])
    project.put_raw(train_images=np.zeros((57, 8, 8, 1), np.uint8), train_labels=labels)
    said = r"imbalance: class 2 \(cat\) keeps no image: .* has 5 .*; the largest is cut to the 5 of the rarest unless"
    with pytest.raises(UserError, match=said):
        project.cut(holdout_per_class=0, imbalance__factor=9)
    meta, _ = project.cut(holdout_per_class=0, imbalance__factor=9, imbalance__largest=36)
    assert meta["train_counts"] == [36, 12, 4]


@pytest.mark.parametrize("key", ["factor", "largest"])
def test_what_cuts_a_tail_is_refused_where_none_is_cut(project, key):
    project.put_raw()
    with pytest.raises(UserError, match=rf"digits_lt\.imbalance: {key} must not be given with profile natural"):
        project.cut(holdout_per_class=0, imbalance=NATURAL | {key: 36})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"holdout_per_class": 30},
            r"datasets\.digits_lt\.holdout_per_class is 30: class 0 \(ant\) has 30 .* at most 29$",
        ),
        (
            {"imbalance__factor": 11.0, "holdout_per_class": 20},
            r"datasets\.digits_lt\.imbalance: class 2 \(cat\) keeps no image.*largest factor that works is 10$",
        ),
        ({"imbalance__factor": 0.5}, r"datasets\.digits_lt\.imbalance\.factor"),
        (
            {"augmentation__mean": [0.5] * 3, "augmentation__std": [0.5] * 3},
            r"datasets\.digits_lt\.augmentation\.mean has 3 values: the images have 1 channels",
        ),
        (
            {"augmentation__pad": 2},
            r"datasets\.digits_lt\.augmentation\.pad is 2: the images have 2x2 pixels, so must be at most 1$",
        ),
        (
            {"augmentation__cutout": 3},
            r"datasets\.digits_lt\.augmentation\.cutout is 3: the images have 2x2 pixels, so must be at most 2$",
        ),
        (
            {"augmentation": RESIZED | {"size": 8, "mean": [0.5], "std": [0.5]}},
            r"datasets\.digits_lt\.augmentation\.size is 8: the images have 2x2 pixels, so must lie in 1\.\.2$",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data(project, keys, message):
    project.put_raw()
    with pytest.raises(UserError, match=message) as caught:
        project.cut(**keys)
    assert "\n" not in str(caught.value)
    assert not paths.longtail(NAME).exists()


def test_a_holdout_of_half_a_rare_class_is_warned_of(project, capsys):
    labels = np.repeat([0, 1, 2], [60, 20, 10])
    project.put_raw(train_labels=labels)
    meta, _ = project.cut(holdout_per_class=4, imbalance=NATURAL)
    assert capsys.readouterr().err == ""
    meta, _ = project.cut(holdout_per_class=5)
    assert meta["train_counts"] == [55, 15, 5]
    assert capsys.readouterr().err == (
        "warning: params.yaml: datasets.digits_lt.holdout_per_class is 5: it takes 5 of the 10 images of class 2 "
        "(cat), the rarest, and leaves 5 to train on; fewer, or 0, would leave more\n"
    )


def test_images_that_are_there_twice_are_counted_and_told(project, capsys):
    raw = project.put_raw()
    train, test = raw["train_images"].copy(), raw["test_images"].copy()
    train[1] = train[0]  # of the classes 0 and 1
    train[5] = train[2]  # of class 2 both
    test[3:5] = train[7]
    project.put_raw(train_images=train, test_images=test)
    meta, _ = project.cut(holdout_per_class=0, imbalance=NATURAL)
    assert meta["duplicates"] == {"test": 2, "test_holdout": 0, "holdout": 0, "train": 2}
    assert capsys.readouterr().err == (
        "warning: digits_lt: 2 of the test images in the training split too, and so not new to the model\n"
        "warning: digits_lt: 2 of the training images in another class too\n"
    )
    train[:] = train[0]
    project.put_raw(train_images=train)
    meta, _ = project.cut(holdout_per_class=4)
    assert meta["duplicates"] == {"test": 0, "test_holdout": 0, "holdout": 12, "train": 78}
    assert "12 of the held-out images in the training split too, where the model is surer of" in capsys.readouterr().err


def test_images_that_could_not_be_read_stay_counted(project):
    project.put_raw()
    described = paths.raw(NAME) / "meta.json"
    files.write_json(described, files.read_json(described) | {"skipped": {"train": 2, "test": 1}})
    assert project.cut(holdout_per_class=0, imbalance=NATURAL)[0]["skipped"] == {"train": 2, "test": 1}


@pytest.mark.parametrize("stage", [download, subsample])
def test_unknown_data_set_lists_those_there_are(project, stage):
    with pytest.raises(UserError, match=r"no data set nosuch: .* use one of .*digits_lt"):
        project.run(stage, "nosuch")


@pytest.mark.usefixtures("project")
def test_command_line(tmp_path):
    """A script of its own process: it works from the project's root, and an error is one line and exit code 1."""

    def stage(name):
        return subprocess.run(
            [sys.executable, "-m", f"stages.{name}", "--dataset", NAME],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    before = stage("subsample")
    assert before.returncode == 1
    assert before.stderr == f"error: data/raw/{NAME}/meta.json is missing: {files.REPRO}\n"
    assert stage("download").returncode == 0
    assert stage("subsample").returncode == 0
    assert len(json.loads((paths.longtail(NAME) / "meta.json").read_text())["train_counts"]) == 10


def test_full_disk_is_one_line(project, monkeypatch):
    project.put_raw()
    project.change(holdout_per_class=0)
    monkeypatch.setattr(sys, "argv", ["subsample", "--dataset", NAME])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as caught:
        errors.run(subsample.main)
    assert caught.value.code == "error: data/lt/digits_lt/train_images.npy: cannot write: No space left on device"
    assert list(paths.longtail(NAME).iterdir()) == []
