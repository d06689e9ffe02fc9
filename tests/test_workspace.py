"""Stages in a folder of their own: when a data set's splits are made anew there."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import paths, workspace
from tailcal import files, params, sources, splits
from tailcal.cell import CellName
from tailcal.errors import UserError
from tests.conftest import ROOT


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    """A folder of images beside an empty project: <split>/<class>/<i>.png, a training split of 2 x 4."""
    for split in ("train", "test"):
        for k in range(2):
            folder = tmp_path / f"images/{split}/class{k}"
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((8, 8), 9 * i + 40 * k + len(split), np.uint8)).save(folder / f"{i}.png")
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    return tmp_path / "images"


NATURAL = params.Natural(profile="natural", seed=0)


def prepared(imbalance=NATURAL, holdout_per_class=1, **source) -> splits.Meta:
    """What meta.json says of the splits of a data set of one's own, once the workspace has prepared it."""
    p = params.load(ROOT / "params.yaml")
    changes = {
        "source": {"size": 8, "channels": 1, "workers": 1} | source,
        "imbalance": imbalance,
        "holdout_per_class": holdout_per_class,
    }
    dataset = p.datasets["digits_lt"].model_copy(update=changes)
    workspace.prepare(p.model_copy(update={"datasets": {"own": dataset}}), "own")
    return splits.read_meta(paths.longtail("own"))


def write_list(path: Path, names: list[str]) -> None:
    path.write_text("".join(f"{name} {name.partition('class')[2][0]}\n" for name in names))


def test_splits_are_made_anew_when_a_list_outside_root_changes(images):
    """Any of the three files: none of them is part of what the parameters say."""
    lists = {key: str(images.parent / f"{key}.txt") for key in ("train", "test", "class_names")}
    for split in ("train", "test"):
        names = sorted(str(path.relative_to(images)) for path in images.glob(f"{split}/*/*"))
        write_list(Path(lists[split]), names)
    Path(lists["class_names"]).write_text("one\ntwo\n")
    source = {"kind": "list", "root": str(images)} | lists
    assert prepared(**source).train_counts == [3, 3]
    made = paths.longtail("own") / "meta.json"
    before = made.stat().st_mtime_ns
    prepared(**source)
    assert made.stat().st_mtime_ns == before  # nothing has changed
    lines = Path(lists["train"]).read_text().splitlines(keepends=True)
    Path(lists["train"]).write_text("".join(lines[:-1]))
    assert prepared(**source).train_counts == [3, 2]
    Path(lists["test"]).write_text("test/class0/0.png 0\ntest/class1/0.png 1\n")
    assert prepared(**source).test_counts == [1, 1]
    Path(lists["class_names"]).write_text("one\nother\n")
    assert prepared(**source).class_names == ["one", "other"]
    Path(lists["class_names"]).unlink()
    with pytest.raises(UserError, match=r"class_names: \S*class_names\.txt: there is no such file"):
        prepared(**source)


@pytest.mark.parametrize("linked", ["train", "train/class1"])
def test_splits_are_made_anew_when_an_image_in_a_linked_folder_changes(images, linked):
    (images / linked).rename(images.parent / "elsewhere")
    (images / linked).symlink_to(images.parent / "elsewhere")
    source = {"kind": "folder", "path": str(images)}
    before = prepared(**source)
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(next((images / "train/class1").iterdir()))
    assert prepared(**source).raw != before.raw


def test_splits_are_made_anew_when_the_parameters_change(images):
    block = {"kind": "folder", "path": str(images)}
    assert prepared(**block).train_counts == [3, 3]
    block["holdout_per_class"] = 2
    assert prepared(**block).train_counts == [2, 2]
    block["imbalance"] = NATURAL.model_copy(update={"seed": 1})
    assert prepared(**block).imbalance["seed"] == 1
    block["size"] = 16
    assert prepared(**block).source["size"] == 16


def test_what_is_no_image_makes_nothing_anew(images):
    source = {"kind": "folder", "path": str(images)}
    prepared(**source)
    made = paths.longtail("own") / "meta.json"
    before = made.stat().st_mtime_ns
    (images / "train/notes.txt").write_text("nothing to see")
    prepared(**source)
    assert made.stat().st_mtime_ns == before


def test_the_state_of_a_listing_tells_labels_and_splits_apart(tmp_path):
    def state(train, labels, test):
        zeros = np.zeros(len(test), np.int64)
        return workspace.state_of(
            sources.Listing(tmp_path, train, np.array(labels), test, zeros, ["a", "b"], size=8, channels=1)
        )

    states = [state(["x", "y"], [0, 0], ["z"]), state(["x", "y"], [0, 1], ["z"]), state(["x"], [0], ["y", "z"])]
    assert len(set(states)) == 3


def test_the_state_of_a_listing_tells_files_of_one_time_apart_by_their_size(tmp_path):
    states = set()
    for content in ("a", "ab"):
        (tmp_path / "x").write_text(content)
        os.utime(tmp_path / "x", (0, 0))
        labels = np.zeros(1, np.int64)
        states.add(workspace.state_of(sources.Listing(tmp_path, ["x"], labels, ["x"], labels, ["a"], 8, 1)))
    assert len(states) == 2


def test_what_trains_in_one_process_refuses_several():
    runtime = params.load(ROOT / "params.yaml").runtime
    workspace.require_one_process(runtime)
    with pytest.raises(UserError, match=r"runtime\.processes: is 2, and this trains in one process: must be 1 here"):
        workspace.require_one_process(runtime.model_copy(update={"processes": 2}))


def test_the_seconds_of_a_network_are_those_of_both_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = CellName("d", "ce", "crt")
    for stage, seconds in ((("represent", *cell[:2]), 2.0), (("calibrate", *cell), 0.5)):
        files.write_json(paths.costs(*stage), {"0": {"seconds": 9.0}, "1": {"seconds": seconds}})
    assert workspace.seconds(cell, 1) == 2.5
