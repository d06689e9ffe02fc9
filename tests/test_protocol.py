"""The honest protocol: training code cannot reach the test split. (For the rules, see test_posthoc.py.)"""

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tailcal import longtail, seal, train
from tailcal.errors import UserError
from tailcal.files import read_json, sha256, write_json
from tailcal.method import load
from tailcal.metrics.cell import measure
from tests.conftest import ROOT, edit

FORBIDDEN = [
    "data/lt/digits_lt/test_images.npy",
    "data/lt/digits_lt/test_labels.npy",
    "data/lt/digits_lt/holdout_images.npy",
    "data/raw/digits_lt/test_labels.npy",
    "data/raw/digits_lt/train_images.npy",  # of which the hold-out is a part
    "data/images/test/cat/1.png",
    "data/downloads/cifar-10-python.tar.gz",
    "data/predictions/digits_lt/ce/joint/seed0.npz",
]
OPEN = [
    "data/lt/digits_lt/train_images.npy",
    "data/lt/digits_lt/meta.json",
    "data/raw/digits_lt/meta.json",
    "data/representations/d/ce/seed0.safetensors",
]
READERS = {
    "open": lambda path: path.open("rb").close(),
    "numpy": lambda path: np.load(path),
    "memory map": lambda path: np.load(path, mmap_mode="r"),
    "absolute": lambda path: path.absolute().read_bytes(),
    "roundabout": lambda path: Path(f"data/../{path}").read_bytes(),
    "bytes": lambda path: open(str(path).encode(), "rb").close(),  # noqa: PTH123
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in FORBIDDEN + OPEN:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with Path(name).open("wb") as stream:
            np.save(stream, np.zeros(3))


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_training_cannot_open_what_it_must_not_see(name, how):
    with seal.training(), pytest.raises(seal.SealedError, match=f"{name}: must not be opened while a training runs"):
        READERS[how](Path(name))
    READERS[how](Path(name))  # and afterwards it can be opened


@pytest.mark.usefixtures("files")
def test_a_training_can_open_its_own(tmp_path):
    with seal.training():
        for name in OPEN:
            np.load(name)
        (tmp_path / "notes.txt").write_text("elsewhere")


def test_below_the_projects_data_neither_its_own_nor_the_projects_can_be_seen(files, tmp_path, monkeypatch):
    del files
    workspace = tmp_path / "data/published"
    for name in (FORBIDDEN[0], OPEN[0]):
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_bytes(Path(name).read_bytes())
    monkeypatch.setattr(seal, "PROJECT", tmp_path)
    monkeypatch.chdir(workspace)
    with seal.training():
        np.load(OPEN[0])
        np.load(tmp_path / OPEN[-1])
        for path in (FORBIDDEN[0], tmp_path / FORBIDDEN[0], Path("../../") / FORBIDDEN[0]):
            with pytest.raises(seal.SealedError, match=f"{FORBIDDEN[0]}: must not be opened"):
                np.load(path)


@pytest.mark.usefixtures("files")
def test_the_seal_holds_in_every_thread_and_after_an_inner_one_ends():
    caught = []

    def peek():
        try:
            np.load(FORBIDDEN[0])
        except seal.SealedError as error:
            caught.append(error)

    with seal.training():
        with seal.training():
            pass
        thread = threading.Thread(target=peek)
        thread.start()
        thread.join()
    assert len(caught) == 1


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("stage", "method", "step"), [("represent", "ce", "set_mode"), ("calibrate", "joint", "setup_head")]
)
def test_a_method_that_peeks_ends_its_stage(stage, method, step, project, monkeypatch):
    p = project(cut=True)
    cell = ["--dataset", "digits_lt", "--representation", "ce"]
    if stage == "calibrate":
        p.inside("represent", *cell)
        cell += ["--classifier", "joint"]
    peek = "data/lt/digits_lt/test_labels.npy"
    monkeypatch.setattr(load(method), step, lambda *_: Path(peek).read_bytes())
    with pytest.raises(seal.SealedError, match=f"{peek}: must not be opened while a training runs"):
        p.inside(stage, *cell)
    made = "data/representations/*/*/*.safetensors" if stage == "represent" else "data/predictions/*/*/*/*.npz"
    assert not list(p.root.glob(made))


@pytest.mark.pipeline
def test_stage_2_draws_its_own_random_numbers(project, monkeypatch):
    p = project(cut=True)
    cell, drawn = ["--dataset", "digits_lt", "--representation", "ldam_drw"], {}  # it has a head of its own
    train_, trained = train.train, []

    def noting(replicas, *args):
        drawn[replicas[0].title.split()[0]] = [replica.seed for replica in replicas]
        trained[:] = train_(replicas, *args)
        return trained

    monkeypatch.setattr(train, "train", noting)
    p.inside("represent", *cell)
    p.inside("calibrate", *cell, "--classifier", "marc")
    assert drawn["represent"] == [0, 1]
    assert len({*drawn["represent"], *drawn["calibrate"]}) == 4
    history = pd.read_csv(p.root / "data/classifiers/digits_lt/ldam_drw/marc/history.csv")
    assert list(history) == ["epoch", "seed", "lr", "loss", "train_accuracy"]
    assert history["seed"].unique().tolist() == [0, 1]
    losses = [epoch["loss"] for one in trained for epoch in one.history]
    assert history["loss"].tolist() == pytest.approx(losses, rel=1e-5)


@pytest.mark.pipeline
def test_methods_are_given_the_counts_of_the_training_split(project, monkeypatch):
    p, given = project(("placement: auto", "placement: disk"), cut=True), []

    def noting(replicas, data, *_):
        assert data.placement == "disk"
        given.extend(replica.make()[1].counts.tolist() for replica in replicas)
        raise UserError("that is enough")

    monkeypatch.setattr(train, "train", noting)
    p.inside("represent", "--dataset", "digits_lt", "--representation", "ce", ok=False)
    assert given == [np.bincount(np.load(p.root / "data/lt/digits_lt/train_labels.npy")).tolist()] * 2


@pytest.mark.pipeline
def test_stage_2_takes_no_stage_1_of_other_parameters_or_of_another_split(project):
    p = project(cut=True)
    cell = ("--dataset", "digits_lt", "--representation", "ce")
    stage1 = "data/representations/digits_lt/ce"
    advice = f"run `dvc repro`, or without DVC or off the grid `python -m stages.represent {' '.join(cell)}`"
    p.inside("represent", *cell)
    for before, after, what in (
        ("epochs: 8\n", "epochs: 9\n", "recipe.epochs 8, and the parameters say 9"),
        ("precision: float32", "precision: bf16", "precision float32, and the parameters say bf16"),
        ("factor: 20", "factor: 10", None),
    ):
        whole = (p.root / "params.yaml").read_text()
        edit(p.root / "params.yaml", [(before, after)])
        p.inside("subsample", "--dataset", "digits_lt")
        said = p.inside("calibrate", *cell, "--classifier", "joint", ok=False)
        what = f"was made with {what}" if what else "was trained on another training split than data/lt/digits_lt holds"
        assert said == f"error: {stage1} {what}: {advice}\n"
        (p.root / "params.yaml").write_text(whole)


@pytest.mark.pipeline
def test_stage_2_goes_on_from_no_checkpoint_on_another_stage_1(project):
    """Of the same parameters, as other code may have made it."""
    p = project(cut=True)
    cell = ("--dataset", "digits_lt", "--representation", "ce")
    stage1, stage2 = (
        p.root / "data" / name for name in ("representations/digits_lt/ce", "classifiers/digits_lt/ce/marc")
    )
    p.inside("represent", *cell)
    p.inside("calibrate", *cell, "--classifier", "marc")
    record = read_json(stage1 / "provenance.json")
    for name in record["weights"]:
        path = stage1 / f"{name}.safetensors"
        save_file({key: value * 2 for key, value in load_file(path).items()}, path)
        record["weights"][name] = sha256(path)
    write_json(stage1 / "provenance.json", record)
    p.inside("calibrate", *cell, "--classifier", "marc")
    assert len(list(p.root.glob(".scratch/calibrate/*/*"))) == 1  # those on the first are of no more use
    for name in record["weights"]:
        began, made = (load_file(folder / f"{name}.safetensors") for folder in (stage1, stage2))
        assert torch.equal(made["backbone.conv1.weight"], began["backbone.conv1.weight"])


def test_shot_groups_have_one_definition(monkeypatch):
    """Nobody else counts to 100: with other groups every number of a group follows."""
    rng = np.random.default_rng(0)
    logits, labels, counts = rng.normal(size=(90, 3)), np.arange(90) % 3, np.array([500, 50, 5])
    before = measure(logits, labels, counts)

    def reversed_groups(counts):
        groups = longtail_groups(counts)
        return {"many": groups["few"], "medium": groups["medium"], "few": groups["many"]}

    longtail_groups = longtail.shot_groups
    for module in ("tailcal.metrics.accuracy", "tailcal.metrics.cell"):
        monkeypatch.setattr(f"{module}.shot_groups", reversed_groups)
    after = measure(logits, labels, counts)
    for number in ("", "ece_", "nll_", "brier_"):
        assert after[f"{number}many"] == before[f"{number}few"]
        assert after[f"{number}few"] == before[f"{number}many"]
    defined = [f for f in [*ROOT.glob("src/**/*.py"), *ROOT.glob("stages/*.py")] if "def shot_groups" in f.read_text()]
    assert defined == [ROOT / "src/tailcal/longtail.py"]
