"""The source `folder`: which files it takes, their labels and order, and what it refuses."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from tailcal import params, sources
from tailcal.errors import UserError
from tailcal.sources import Listing, folder
from tests.test_sources import DIGITS


def make(root, *paths):
    """Empty files; a path that ends with / is a folder."""
    for path in paths:
        target = root / path
        if path.endswith("/"):
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()


def load(root, **keys):
    block = {"kind": "folder", "path": str(root), "size": 8, "channels": 3, **keys}
    config = sources.configure(DIGITS.model_copy(update={"source": block}))
    return sources.load(config, Path("downloads"))


KEY = f"{params.PARAMS}: datasets.digits_lt.source.path"
SPLIT = ("train/b/1.png", "train/a/2.png", "train/a/1.png", "test/a/9.png", "test/b/8.png")


def test_two_splits(tmp_path, capsys):
    make(tmp_path, *SPLIT)
    got = load(tmp_path, workers=2, strict=False)
    assert isinstance(got, Listing)
    assert got.class_names == ["a", "b"]
    assert got.train_files == ["train/a/1.png", "train/a/2.png", "train/b/1.png"]
    assert got.test_files == ["test/a/9.png", "test/b/8.png"]
    assert got.train_labels.tolist() == [0, 0, 1]
    assert got.test_labels.tolist() == [0, 1]
    assert got.train_labels.dtype == got.test_labels.dtype == np.int64
    assert (got.root, got.size, got.channels, got.strict, got.workers) == (tmp_path, 8, 3, False, 2)
    assert capsys.readouterr().err == ""


def test_one_tree_is_split_by_its_seed(tmp_path):
    make(tmp_path, *(f"{name}/{i:02}.jpg" for name, count in (("x", 12), ("y", 5)) for i in range(count)))
    got = load(tmp_path, test_per_class=3)
    assert np.bincount(got.test_labels).tolist() == [3, 3]
    assert np.bincount(got.train_labels).tolist() == [9, 2]
    assert len({*got.train_files, *got.test_files}) == 17
    for files, labels in ((got.train_files, got.train_labels), (got.test_files, got.test_labels)):
        assert files == sorted(files)
        assert [name[0] for name in files] == ["xy"[label] for label in labels]
    assert load(tmp_path, test_per_class=3).test_files == got.test_files
    assert load(tmp_path, test_per_class=3, seed=1).test_files != got.test_files
    assert load(tmp_path, test_per_class=4).class_names == ["x", "y"]
    with pytest.raises(
        UserError,
        match=rf"^{KEY}: {tmp_path}: source.test_per_class is 5: class 1 \(y\) has 5 images, so must be at most 4",
    ):
        load(tmp_path, test_per_class=5)


def test_names_of_every_kind(tmp_path, capsys):
    strange = ["a b/ü ñ.JPG", "a b/deep/er/x.PnG", "猫/1.jpeg", "猫/2.jpe", "猫/3.webp", "猫/4.bmp", "猫/5.gif"]
    strange += ["猫/6.tif", "猫/7.tiff", "猫/same.png", "猫/same.jpg", "猫/in/same.png"]
    make(tmp_path, *(f"{split}/{name}" for split in ("train", "test") for name in strange))
    got = load(tmp_path)
    assert got.class_names == ["a b", "猫"]
    assert sorted(got.train_files) == sorted(f"train/{name}" for name in strange)
    assert capsys.readouterr().err == ""


def test_what_is_not_taken_is_counted(tmp_path, capsys):
    make(tmp_path, *SPLIT, "README", "val/", "train/list.txt", "train/a/notes.txt", "train/a/noending", "test/b/x.svg")
    make(tmp_path, "train/.ipynb_checkpoints/1.png", "train/a/._1.png", "train/a/.hidden/1.png")
    (tmp_path / "train/a/circle.png").symlink_to(tmp_path / "train")
    got = load(tmp_path)
    assert got.train_files == ["train/a/1.png", "train/a/2.png", "train/b/1.png"]
    assert got.class_names == ["a", "b"]
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: 10 files or folders are not taken for images or classes, the first is README\n"
    )


def test_linked_classes_and_images_are_taken(tmp_path):
    make(tmp_path, *SPLIT, "elsewhere/5.png")
    (tmp_path / "train/c").symlink_to(tmp_path / "elsewhere")
    make(tmp_path, "test/c/")
    (tmp_path / "test/c/6.png").symlink_to(tmp_path / "elsewhere/5.png")
    got = load(tmp_path)
    assert got.train_files[-1] == "train/c/5.png"
    assert got.test_files[-1] == "test/c/6.png"


@pytest.mark.parametrize(
    ("paths", "keys", "message"),
    [
        (
            [],
            {},
            "{root}: has no folder train: must hold train/<class>/ and test/<class>/, or <class>/ with a sou",
        ),
        (["train/a/1.png", "train/b/1.png"], {}, "{root}: has no folder test: must"),
        ([*SPLIT, "train/c/notes.txt"], {}, "{root}/train/c: has no images, and test no such class: remove it"),
        ([*SPLIT, "train/c/1.png"], {}, "{root}: class c is in train and not in test: every class must be in both"),
        ([*SPLIT, "test/c/1.png", "test/d/1.png"], {}, "{root}: class c (and 1 more) is in test and not in train"),
        ([*SPLIT, "train/c/1.png", "test/c/"], {}, "{root}/test/c: has no images (.bmp .gif .jpe .jpeg .jpg "),
        ([*SPLIT, "train/c/", "test/c/1.png"], {}, "{root}/train/c: has no images"),
        ([*SPLIT, "train/c/1.txt", "test/c/1.png"], {}, "{root}/train/c: has no images"),
        (["train/a/1.png", "test/a/1.png"], {}, "{root}/train: has 1 class folders: must have at least 2"),
        (["a.png", "b.png"], {"test_per_class": 1}, "{root}: has 0 class folders: must have at least 2"),
        (["a/1.png", "b/"], {"test_per_class": 1}, "{root}/b: has no images"),
        (SPLIT, {"test_per_class": 1}, "{root}: is split into test and train already: source.test_per_class must"),
        (
            ["train/a/1.png", "Val/b/2.png", "train/b/3.png", "Val/a/4.png"],
            {"test_per_class": 1},
            "{root}: is split into Val and train already: source.test_per_class must be 0, and the splits must be "
            "called train and test",
        ),
        (
            ["train/a/1.png", "train/b/1.png", "val/a/2.png"],
            {},
            "{root}: has no folder test (rename val to it): must hold train/",
        ),
        (["train/a/1.png", "train/b/1.png", "val"], {}, "{root}: has no folder test: must"),
        (
            ["train/a/1.png", "train/b/1.png", *(f"{name}/a/1.png" for name in ("testing", "val", "Test", "dev"))],
            {},
            "{root}: has no folder test (rename Test or dev or testing or val to it): must",
        ),
        (["Test/a/1.png", "training/a/2.png"], {}, "{root}: has no folder train (rename training to it): must"),
        (["Train/a/1.png", "val/a/2.png"], {}, "{root}: has no folder train (rename Train to it): must hold train/"),
        ([*SPLIT, "train/n\nn/1.png"], {}, "{root}/train: the class folder 'n\\nn' must have a printable name"),
    ],
)
def test_faults(tmp_path, paths, keys, message):
    make(tmp_path, *paths)
    with pytest.raises(UserError, match=f"^{re.escape(f'{KEY}: {message}'.format(root=tmp_path))}") as caught:
        load(tmp_path, **keys)
    assert "\n" not in str(caught.value)


def test_classes_that_may_be_splits_are_warned_of(tmp_path, capsys):
    paths = [f"{split}/{name}/{i}.png" for split in ("seg_test", "seg_train") for name in ("a", "b") for i in range(2)]
    make(tmp_path, *paths)
    load(tmp_path, test_per_class=1)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: seg_test, seg_train are taken for classes, and all have the same folders (a, ...): if "
        "they are splits, call them train and test, with source.test_per_class 0\n"
    )
    make(tmp_path, "seg_train/c/1.png")  # other folders
    load(tmp_path, test_per_class=1)
    make(tmp_path, "seg_test/c/1.png", "seg_test/1.png")  # an image of its own
    load(tmp_path, test_per_class=1)
    assert capsys.readouterr().err == ""


def test_a_class_may_be_called_like_a_split(tmp_path, capsys):
    make(tmp_path, "train/1.png", "train/2.png", "bus/1.png", "bus/2.png")
    assert load(tmp_path, test_per_class=1).class_names == ["bus", "train"]
    assert capsys.readouterr().err == "", "images of the same names are no splits"


@pytest.mark.parametrize("keys", [{}, {"test_per_class": 1}])
def test_no_such_folder(tmp_path, keys):
    with pytest.raises(UserError, match=rf"^{KEY}: {tmp_path}/none: there is no such folder$"):
        load(tmp_path / "none", **keys)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^{KEY}: {tmp_path}/file: is not a folder$"):
        load(tmp_path / "file", **keys)


def test_in_the_copy_of_an_experiment_a_path_must_be_whole(tmp_path, monkeypatch):
    copy = tmp_path / ".dvc/tmp/exps/tmpabc"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(
        UserError, match=rf"^{KEY}: data/images: there is no such folder in this copy .* give its whole"
    ):
        load("data/images")
    with pytest.raises(UserError, match=rf"^{KEY}: {tmp_path}/none: there is no such folder$"):
        load(tmp_path / "none")


def test_two_folders_that_read_the_same(tmp_path):
    """An accent may be a character of its own, as file systems of other machines write it."""
    make(tmp_path, *SPLIT, "train/caf\u00e9/1.png", "train/cafe\u0301/1.png", "train/b  c/1.png", "train/b c/1.png")
    with pytest.raises(
        UserError, match=rf"^{KEY}: {tmp_path}/train: the class folders 'b  c' and 'b c' read the same: rename one, or"
    ):
        load(tmp_path)
    (tmp_path / "train/b  c").rename(tmp_path / "c")
    with pytest.raises(UserError, match=r"the class folders 'cafe\\u0301' and 'caf\\xe9' read the same"):
        load(tmp_path)


def test_a_class_name_outside_utf8(tmp_path):
    make(tmp_path, *SPLIT)
    (tmp_path / "train" / os.fsdecode(b"\xff")).mkdir()
    with pytest.raises(UserError, match=r"train: the class folder '\\udcff' must have a printable name"):
        load(tmp_path)


def test_path_relative_to_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "birds", *SPLIT)
    assert load("~/birds").root == tmp_path / "birds"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 0}, "source.size: .* greater than or equal to 1"),
        ({"channels": 2}, "source.channels: .*1 or 3"),
        ({"path": ""}, "source.path"),
        ({"strict": "yes"}, "source.strict"),
        ({"workers": 0}, "source.workers"),
        ({"test_per_class": -1}, "source.test_per_class"),
        ({"root": "x"}, "source.root: unknown key"),
    ],
)
def test_bad_keys(keys, message):
    block = {"kind": "folder", "path": "x", "size": 64, "channels": 3} | keys
    with pytest.raises(UserError, match=rf"^{params.PARAMS}: .*{message}"):
        sources.configure(DIGITS.model_copy(update={"source": block}))


def test_places_and_workers_are_not_recorded():
    config = folder.Config(kind="folder", path="/disk/x", size=64, channels=3, workers=4)
    assert sources.record(config) == {"kind": "folder", "size": 64, "channels": 3, "test_per_class": 0, "seed": 0}
    assert config.model_dump() == {**sources.record(config), "path": "/disk/x", "strict": True}
