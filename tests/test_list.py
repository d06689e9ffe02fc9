"""The source `list`: what it reads in list files, and every fault it names with its line."""

import re

import numpy as np
import pytest

from tailcal import params, sources
from tailcal.errors import UserError
from tests.test_sources import DIGITS

TRAIN = b"train/n1/a.jpg 0\ntrain/n2/b c.jpg 1\ntrain/n1/d.jpg 0\n"
KEY = f"{params.PARAMS}: datasets.digits_lt.source"
TEST = b"val/a.jpg 1\nval/b.jpg 0\n"


def load(folder, lines=TRAIN, **keys):
    (folder / "train.txt").write_bytes(lines)
    (folder / "test.txt").write_bytes(TEST)
    block = {"kind": "list", "root": str(folder), "train": "train.txt", "test": "test.txt", "size": 8, "channels": 3}
    config = sources.configure(DIGITS.model_copy(update={"source": block | keys}))
    return sources.load(config, folder / "downloads")


def test_lists_keep_their_order(tmp_path):
    got = load(tmp_path)
    assert got.train_files == ["train/n1/a.jpg", "train/n2/b c.jpg", "train/n1/d.jpg"]
    assert got.train_labels.tolist() == [0, 1, 0]
    assert got.test_files == ["val/a.jpg", "val/b.jpg"]
    assert got.test_labels.tolist() == [1, 0]
    assert got.train_labels.dtype == got.test_labels.dtype == np.int64
    assert got.class_names == ["0", "1"]
    assert (got.root, got.size, got.channels, got.strict, got.workers) == (tmp_path, 8, 3, True, None)


@pytest.mark.parametrize(
    "train",
    [
        b"\xef\xbb\xbfa.jpg 0\nb.jpg 1\n",
        b"a.jpg 0\r\nb.jpg 1\r\n",
        b"a.jpg 0\nb.jpg 1",
        b"# paths and labels\n\na.jpg 0\n   \nb.jpg 1\n\n",
        b"a.jpg\t0\nb.jpg  \t 1 \n",
        b"./a.jpg 0\nx/..//b.jpg 01\n",
    ],
)
def test_lines_of_every_kind(tmp_path, train):
    got = load(tmp_path, train)
    assert got.train_files == ["a.jpg", "b.jpg"]
    assert got.train_labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "name", ["a b  c.jpg", " blank.jpg", "ü/猫.jpg", "1 2 3", "next\x0bline\u2028.jpg", "nb\xa0sp", "a#b", " #a", "..a"]
)
def test_paths_of_every_kind(tmp_path, name):
    assert load(tmp_path, f"{name} 0\nother 1\n".encode()).train_files == [name, "other"]


def test_a_path_that_begins_with_a_hash(tmp_path):
    assert load(tmp_path, b"#a.jpg 0\n./#b.jpg 0\nc.jpg 1\n").train_files == ["#b.jpg", "c.jpg"]


def test_class_names(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffcrane \r\n猫\r\n\r\n".encode())
    assert load(tmp_path, class_names="names.txt").class_names == ["crane", "猫"]
    (tmp_path / "names.txt").write_text("crane\nCrane\n")
    assert load(tmp_path, class_names=str(tmp_path / "names.txt")).class_names == ["crane", "Crane"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"a.jpg\n", "train.txt line 1: must be a path, a blank and a label (a whole number from 0), got 'a.jpg'"),
        (
            b"a 0\nb,1\nc\n",
            "train.txt line 2: must be a path, a blank and a label (a whole number from 0), got 'b,1' (and 1 ",
        ),
        (b"a 0\n\n# x\nb -1\n", "train.txt line 4: must be a path"),
        (b"a 0\nb 1.0\n", "train.txt line 2: must be a path"),
        (b"a 0\nb one\n", "train.txt line 2: must be a path"),
        (b"a 0\n 1\n", "train.txt line 2: must be a path"),
        (b"a 0\nb 99999999999999999999\n", "train.txt line 2: must be a path"),
        ("a 0\nb ١\n".encode(), "train.txt line 2: must be a path"),
        (b"a 0\n/etc/passwd 1\n", "train.txt line 2: must be a path below root, got '/etc/passwd 1'"),
        (b"a 0\nx/../../b 1\n", "train.txt line 2: must be a path below root"),
        (b"a 0\n.. 1\n", "train.txt line 2: must be a path below root"),
        (b"a 0\nx/.. 1\n", "train.txt line 2: must be a path below root"),
        (b"a 0\nb\0 1\n", "train.txt line 2: must be a path below root"),
        (b"", "train.txt: names no image"),
        (b"# nothing\n\n", "train.txt: names no image"),
        (b"a 0\n\xff 1\n", "train.txt: must be text in UTF-8"),
        (b"a 0\nb 3\nc 1\n", "train.txt: 1 of the 4 labels have no line, the first is class 2: every class needs"),
        (b"a 1\nb 2\n", "train.txt: 1 of the 3 labels have no line, the first is class 0"),
        (b"a 0\nb 999999999\n", "train.txt: 999999998 of the 1000000000 labels have no line, the first is class 1"),
        (b"a 0\nb 1\n./a 1\n", "train.txt line 3: a is in {root}/train.txt line 1 already"),
        (b"a 0\nb 1\na 0\nb 1\n", "train.txt line 3: a is in {root}/train.txt line 1 already (and 1 paths more"),
        (b"a 0\nb 1\nval/b.jpg 0\n", "test.txt line 2: val/b.jpg is in {root}/train.txt line 3 already"),
        (b"a 0\n", "test.txt line 1: the label 1 must lie in 0..0, since the labels of {root}/train.txt end at 0"),
        (b"a 0\nb 1\nc 2\n", "test.txt: 1 of the 3 labels have no line, the first is class 2"),
    ],
)
def test_faults(tmp_path, train, message):
    line = f"{KEY}.{message.split('.')[0]}: {tmp_path}/{message}".format(root=tmp_path)
    with pytest.raises(UserError, match=f"^{re.escape(line)}") as caught:
        load(tmp_path, train)
    assert "\n" not in str(caught.value)


def test_one_class_is_too_few(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_list.TEST", b"val/a.jpg 0\n")
    with pytest.raises(
        UserError, match=rf"^{KEY}\.train: {tmp_path}/train\.txt: names images of one class: there must"
    ):
        load(tmp_path, b"a.jpg 0\nb.jpg 0\n")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"a\n", r"train\.txt line 2: the label 1 must lie in 0\.\.0, since names\.txt has 1 names"),
        # Two of ImageNet's classes are called crane. An accent may be a character of its own, and looks the same.
        (b"crane\ncrane\n", r"names\.txt line 2: crane is the name of class 0 already \(line 1\): every class must"),
        ("caf\u00e9\ncafe\u0301\n".encode(), r"names\.txt line 2: cafe\u0301 is the name of class 0 already"),
        (b"a  b\na b\n", r"names\.txt line 2: a b is the name of class 0 already"),
        (b"a\nb\nc\n", r"train\.txt: 1 of the 3 labels have no line, the first is class 2 \(c\)"),
        (b"a\n\nb\n", r"names\.txt line 2: must be the name of class 1, got ''"),
        (b"a\nb\tc\n", r"names\.txt line 2: must be the name of class 1, got 'b\\tc'"),
        (b"\n", r"names\.txt: holds no names"),
        (b"\xff\n", r"names\.txt: must be text in UTF-8"),
    ],
)
def test_faults_of_class_names(tmp_path, names, message):
    (tmp_path / "names.txt").write_bytes(names)
    key = "class_names" if message.startswith("names") else "train"
    with pytest.raises(UserError, match=rf"^{KEY}\.{key}: {tmp_path}/{message}"):
        load(tmp_path, class_names="names.txt")


@pytest.mark.parametrize("key", ["train", "test", "class_names"])
def test_missing_files(tmp_path, key):
    for name, wrong in (
        ("none.txt", "there is no such file"),
        ("train.txt/none.txt", "there is no such file"),
        (".", "is a folder: must be a text file"),
    ):
        with pytest.raises(UserError, match=rf"^{KEY}\.{key}: {tmp_path / name}: {wrong}$"):
            load(tmp_path, **{key: name})
    with pytest.raises(UserError, match=rf"^{KEY}\.{key}: ~nobody_here/x: there is no such home folder$"):
        load(tmp_path, **{key: "~nobody_here/x"})


def test_root_must_be_a_folder(tmp_path):
    for name, wrong in (("none", "there is no such folder"), ("train.txt", "is not a folder")):
        with pytest.raises(UserError, match=rf"^{KEY}\.root: {tmp_path}/{name}: {wrong}$"):
            load(tmp_path, root=str(tmp_path / name))


@pytest.mark.parametrize("key", ["root", "train", "test", "class_names"])
def test_a_place_that_the_system_refuses_is_named(tmp_path, key):
    with pytest.raises(UserError, match=rf"^{KEY}\.{key}: .*x: cannot be read \(File name too long\)$"):
        load(tmp_path, **{key: "x" * 300})


def test_a_missing_key_is_named():
    block = {"kind": "list", "root": "x", "train": "y", "size": 64, "channels": 3}
    with pytest.raises(UserError, match=rf"^{params.PARAMS}: datasets\.digits_lt\.source\.test: this key is missing"):
        sources.configure(DIGITS.model_copy(update={"source": block}))


def test_places_are_not_recorded():
    module = __import__("tailcal.sources.list", fromlist=["Config"])
    config = module.Config(kind="list", root="/disk", train="a", test="b", size=64, channels=3, workers=4)
    assert sources.record(config) == {"kind": "list", "size": 64, "channels": 3}
    assert config.model_dump().keys() == {*module.Config.model_fields} - {"workers"}
