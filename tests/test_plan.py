"""The published tables from one end to the other, on a folder of a few images; and what a wrong plan is told."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from stages import official, paths, tables
from stages import published as stage
from tailcal import lineage, measured, params, plan, references, seal, splits
from tailcal.errors import UserError
from tailcal.methods import mixup
from tests.conftest import ROOT
from tests.pretended_gpu import pretended_gpu

CLASSES, LARGEST, TEST = 10, 20, 6
SHORT = {"epochs": 2, "batch_size": 16, "schedule": {"shape": "cosine", "warmup": 0, "warmup_lr": 0.0}}
PLAN = {
    "seeds": [0, 1],
    "tables": {
        "mislas": {
            "late_epochs": 1,
            "grids": [
                {"datasets": ["small"], "representations": ["ce"], "classifiers": ["joint", "mislas", "tau_norm"]}
            ],
        },
        "later": {
            "late_epochs": 2,
            "grids": [{"datasets": ["small"], "representations": ["mixup"], "classifiers": ["joint"]}],
        },
    },
    "datasets": {
        "small": {
            "preset": "cifar10_lt_10",
            "backbone": "resnet8",
            "recipes": {"mislas": SHORT, "mislas_stage2": SHORT},
        }
    },
    "footing": {
        "small": {
            "title": "A few images",
            "table": "mislas",
            "dataset": "small",
            "rows": [{"representation": "ce", "classifier": name} for name in ("joint", "mislas")],
        }
    },
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The project's parameters with a small plan, and a folder of images: random ones, brighter with the class."""
    for name in ("params.yaml", "presets"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "references").mkdir()
    printed = "mislas,CE,small,ce,joint,,ResNet-32,200,50.0,5.0,somewhere,"
    (tmp_path / references.REFERENCES).write_text(f"{','.join(references.COLUMNS)}\n{printed}\n")
    (tmp_path / "published").mkdir()
    (tmp_path / plan.PLAN).write_text(yaml.safe_dump(PLAN, sort_keys=False))
    rng = np.random.default_rng(0)
    counts = {"train": [round(LARGEST * 0.1 ** (k / 9)) + 1 for k in range(CLASSES)], "test": [TEST] * CLASSES}
    shown = {split: [] for split in counts}
    for split, numbers in counts.items():
        for k, number in enumerate(numbers):
            folder = tmp_path / f"images/cifar10/{split}/class{k}"
            folder.mkdir(parents=True)
            for i in range(number):
                image = rng.integers(0, 60 + 19 * k, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{i}.png")
                shown[split].append((image, k))
    monkeypatch.chdir(tmp_path)
    images, labels = (np.stack(part) for part in zip(*shown["test"], strict=True))
    archive = official.Archive(CLASSES, LARGEST, TEST, official.digest(images, labels))
    monkeypatch.setattr(official, "OFFICIAL", {"cifar10": archive})
    return tmp_path


@pytest.fixture
def run(project, monkeypatch):
    """Run the stage with some options; returns the cells' files by name."""

    def published(*options):
        monkeypatch.setattr(sys, "argv", ["published", *options])
        try:
            stage.main()
        finally:
            monkeypatch.chdir(project)
        return {str(path.relative_to(paths.PUBLISHED)): path for path in sorted(paths.PUBLISHED.rglob("*.json"))}

    return published


def change(edit):
    """Change the plan that lies in the project."""
    content = json.loads(json.dumps(PLAN))
    edit(content)
    plan.PLAN.write_text(yaml.safe_dump(content, sort_keys=False))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def late(numbers: dict) -> dict:
    """What best on test says where there is one late epoch, that of these numbers."""
    return {key: numbers[key] for key in ("top1", "ece")} | {key: numbers["ece"] for key in ("ece_least", "ece_most")}


@pytest.mark.pipeline
def test_a_table_from_images_to_its_page(run):
    found = run("--table", "mislas", "--images", "images")
    names = ("joint", "mislas", "tau_norm")
    assert list(found) == [f"small/ce/{name}/seed{seed}.json" for name in names for seed in (0, 1)]
    cells = {(path.parent.name, path.stem): read(path) for path in found.values()}
    for (name, _), one in cells.items():
        assert (one["epochs"], one["backbone"], one["test_images"]) == (2, "resnet8", 60)
        data = {key: one["data"][key] for key in ("train_images", "official")}
        assert data == {"train_images": sum([20, 15, 11, 9, 7, 5, 4, 3, 2, 2]), "official": False}
        assert one["cost"]["at_once"] == params.load().runtime.replicas == 2
        assert one["provenance"]["diagnostics"] == {"late_epochs": 1}
        assert one["provenance"]["data"].keys() == set(lineage.TRAINED_ON)
        assert one["provenance"]["stage1"].keys() == {"code", "device", "versions"}
        assert one["provenance"]["evaluate"]["posthoc"]["logit_adjustment"] == {"tau": 1.0}
        for numbers in (one, *one["posthoc"].values()):
            assert measured.unpack(numbers["correct"], 60).mean() == pytest.approx(numbers["top1"], abs=1e-6)
        if name == "tau_norm":  # it takes no step, so it has no epochs
            assert one["best_on_test"] is None
        else:  # the best of the last epoch alone is the last epoch
            said = {rule: late(numbers) for rule, numbers in one["posthoc"].items()}
            assert set(said) == {"logit_adjustment", "pn_transductive"}  # nothing is held out, to fit the others on
            assert one["best_on_test"] == {"epochs": 1, "posthoc": said} | late(one)
    assert {path.name for path in Path("data").iterdir()} == {"downloads", "published"}
    assert not Path("metrics/cells").exists()

    tables.main()
    page = paths.OVERVIEW.read_text()
    assert "A few images" in page
    assert "taken from a folder and not from the official archive" in page
    assert "1 of the 1 published numbers" in page
    assert "- epochs 2 (published 200), backbone resnet8 (published resnet32): small, CE" in page
    assert "ce/mislas" in tables.TEXT.read_text()
    both = [cells["joint", f"seed{seed}"]["top1"] for seed in (0, 1)]
    assert read(tables.SUMMARY)["small/ce/joint"]["top1"] == pytest.approx(np.mean(both), abs=1e-6)

    before = {name: path.read_bytes() for name, path in found.items()}
    times = {name: path.stat().st_mtime_ns for name, path in found.items()}
    run("--table", "mislas", "--images", "images", "--missing")
    assert {name: path.stat().st_mtime_ns for name, path in found.items()} == times
    run("--table", "mislas", "--images", "images")  # everything again, from the last checkpoints
    assert {name: path.read_bytes() for name, path in found.items()} == before


@pytest.mark.pipeline
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_a_table_on_a_pretended_gpu(run, monkeypatch):
    """All stages, and the best of the late epochs, on the branches for GPUs."""
    with pretended_gpu(monkeypatch) as gpu:
        found = run("--table", "mislas", "--images", "images")
    assert gpu.operations > 1000
    for path in found.values():
        one = read(path)
        assert (one["provenance"]["device"], one["cost"]["machine"]) == ("cuda", "pretended")
    assert read(found["small/ce/mislas/seed1.json"])["best_on_test"]["epochs"] == 1


@pytest.mark.pipeline
def test_seeds_trained_one_after_the_other_are_those_trained_together(run):
    """Whichever is first; and best on test, where it is missing, is made for that seed alone."""
    short = ("--table", "mislas", "--images", "images", "--missing")
    found = run(*short, "--seed", "1")
    assert list(found) == [f"small/ce/{name}/seed1.json" for name in ("joint", "mislas", "tau_norm")]
    tables.main()
    assert "Behind these rows stands one network of stage 1." in paths.OVERVIEW.read_text()
    found["small/ce/mislas/seed1.json"].write_text(
        json.dumps(read(found["small/ce/mislas/seed1.json"]) | {"best_on_test": None})
    )
    apart = {name: read(path) | {"cost": None} for name, path in run(*short).items()}
    assert apart["small/ce/mislas/seed1.json"]["best_on_test"]
    tables.main()
    assert "Behind these rows stand 2 networks of stage 1." in paths.OVERVIEW.read_text()
    shutil.rmtree(stage.WORKSPACE)
    shutil.rmtree(paths.PUBLISHED)
    together = {name: read(path) | {"cost": None} for name, path in run(*short).items()}
    assert len(together) == 6
    assert apart == together


@pytest.mark.pipeline
def test_what_is_there_stays_as_it_is_when_more_is_trained(run):
    """Seconds tell: a network that was trained again has others."""
    short = ("--table", "mislas", "--images", "images")
    first = {path: path.read_bytes() for path in run(*short, "--seed", "1").values()}
    found = run(*short, "--seed", "0")
    run(*short)  # from the checkpoints of both
    assert {path: path.read_bytes() for path in first} == first
    kept = {name: found[name] for name in ("small/ce/joint/seed1.json", "small/ce/mislas/seed0.json")}
    times = {name: path.stat().st_mtime_ns for name, path in kept.items()}
    for name in ("small/ce/joint/seed0.json", "small/ce/mislas/seed1.json"):
        found[name].unlink()
    assert run(*short, "--missing") == found
    assert {name: path.stat().st_mtime_ns for name, path in kept.items()} == times


@pytest.mark.pipeline
def test_a_cell_is_in_one_precision(run):

    def only_joint(content):
        content["tables"]["mislas"]["grids"][0].update(classifiers=["joint"])
        content["footing"]["small"]["rows"].pop()

    change(only_joint)
    short = ("--table", "mislas", "--images", "images")
    path = run(*short, "--seed", "1", "--precision", "bf16")["small/ce/joint/seed1.json"]
    said = path.read_bytes()
    assert read(path)["precision"] == "bf16"
    tables.main()
    assert "- epochs 2 (published 200), backbone resnet8 (published resnet32), in bf16: small, CE" in (
        paths.OVERVIEW.read_text()
    )
    run(*short, "--missing", "--seed", "1", "--precision", "bf16")
    assert path.read_bytes() == said
    with pytest.raises(
        UserError, match=r"joint/seed1\.json is in bf16, and the seeds of a cell must be in one .*--preci"
    ):
        run(*short, "--seed", "0")
    with pytest.raises(
        UserError, match=r"seed1\.json is in bf16, .*: give .* --classifier joint --precision bf16, or move it"
    ):
        run(*short, "--missing")  # which replaces nothing
    assert path.read_bytes() == said
    run(*short, "--missing", "--seed", "1")  # nothing is missing
    assert path.read_bytes() == said
    found = run(*short)  # all seeds: nothing is left in another precision
    assert [read(path)["precision"] for path in found.values()] == ["float32", "float32"]
    with pytest.raises(UserError, match=r"joint/seed0\.json is in float32, .* --precision float32, or move it"):
        run(*short, "--seed", "1", "--precision", "bf16")
    found = run(*short, "--precision", "bf16")
    assert [read(path)["precision"] for path in found.values()] == ["bf16", "bf16"]


@pytest.mark.pipeline
def test_a_seed_of_other_images_is_refused_before_it_is_trained(run):
    short = ("--table", "later", "--images", "images")
    path = run(*short, "--seed", "0")["small/mixup/joint/seed0.json"]
    content = read(path)
    plain = plan.load(params.load())[1].datasets["small"]
    content["data"]["official"] = True
    content["provenance"]["params"]["dataset"] = splits.record(plain)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"seed0\.json is of images from an official archive, .*: leave --images out"):
        run(*short, "--missing")
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"joint/seed0\.json is damaged"):
        run(*short, "--missing")


@pytest.mark.pipeline
def test_a_seed_of_other_parameters_is_refused_before_it_is_trained(run):
    short = ("--table", "later", "--images", "images")
    path = run(*short, "--seed", "0")["small/mixup/joint/seed0.json"]
    said = path.read_bytes()

    def longer(content):
        content["datasets"]["small"]["recipes"] = {"mislas": SHORT | {"epochs": 3}}

    change(longer)
    for attempt in (partial(run, *short, "--missing"), partial(run, *short, "--seed", "1"), tables.main):
        with pytest.raises(
            UserError,
            match=r"^metrics/published/cells/small/mixup/joint/seed0\.json was made with params\.representation\."
            r"recipe\.epochs 2, and the parameters say 3: set it back, or move the file away and run `python -m "
            r"stages\.published --missing --dataset small --representation mixup --classifier joint --seed 0`, with",
        ):
            attempt()
    plan.PLAN.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    Path("params.yaml").unlink()
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text().replace("bins: 15", "bins: 10"))
    with pytest.raises(UserError, match=r"seed0\.json was made with evaluate\.bins 15, and the parameters say 10: "):
        run(*short, "--missing")
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    del content["evaluate"]["posthoc"]["temperature"]  # a rule may come or go, but not change
    Path("params.yaml").write_text(yaml.safe_dump(content))
    run(*short, "--missing", "--seed", "0")
    tables.main()
    content["evaluate"]["posthoc"]["logit_adjustment"]["tau"] = 2.0
    Path("params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(
        UserError, match=r"was made with evaluate\.posthoc\.logit_adjustment\.tau 1\.0, and the parameters say 2\.0"
    ):
        tables.main()
    assert path.read_bytes() == said
    path.write_text(json.dumps(json.loads(said) | {"provenance": {}}))
    with pytest.raises(
        UserError, match=r"^metrics/published/cells/small/mixup/joint/seed0\.json does not say by which parameters"
    ):
        tables.main()


@pytest.mark.pipeline
def test_a_cell_of_another_data_set_fills_no_row(run):
    """A copied folder, and `--missing` where nothing is missing."""

    def more(content):
        content["datasets"]["other"] = {**content["datasets"]["small"], "preset": "cifar10_lt_100"}
        content["tables"]["later"]["grids"][0]["datasets"].append("other")

    change(more)
    path = run("--table", "later", "--images", "images", "--dataset", "small")["small/mixup/joint/seed0.json"]
    shutil.copytree(paths.PUBLISHED / "small", paths.PUBLISHED / "other")
    message = r"joint/seed0\.json was made with params\.dataset\.imbalance\.factor 10\.0, and .* say 100\.0: "
    with pytest.raises(
        UserError, match=rf"^metrics/published/cells/other/mixup/{message}.*--images of the .* 2 such files\)$"
    ):
        tables.main()
    with pytest.raises(UserError, match=message):
        run("--table", "later", "--missing")
    shutil.rmtree(paths.PUBLISHED / "other")
    path.write_text(path.read_text().replace('"official": false', '"official": true'))
    path.with_name("seed1.json").unlink()
    with pytest.raises(
        UserError, match=r"seed0\.json was made with params\.dataset\.imbalance\.largest 20, and the parameters"
    ):
        tables.main()


@pytest.mark.pipeline
def test_images_that_change_and_splits_that_are_damaged_are_made_anew(run, project):
    path = run("--table", "later", "--images", "images")["small/mixup/joint/seed0.json"]
    first = read(path)["provenance"]["data"]
    for file in (project / "images/cifar10/train/class0").iterdir():
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
    run("--table", "later", "--images", "images")
    second = read(path)["provenance"]["data"]
    assert first["train_images.npy"] != second["train_images.npy"]
    split = project / "data/published/data/lt/small/test_images.npy"
    content = split.read_bytes()
    split.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    run("--table", "later", "--images", "images")
    assert split.read_bytes() == content


@pytest.mark.pipeline
def test_one_classifier_alone_and_a_link_to_nothing_among_the_images(run):
    short = ("--table", "mislas", "--images", "images", "--classifier", "tau_norm")
    assert list(run(*short, "--seed", "0")) == ["small/ce/tau_norm/seed0.json"]
    Path("images/cifar10/train/class0/broken.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"train/class0/broken\.png.* is missing") as caught:
        run(*short)
    assert "\n" not in str(caught.value)


@pytest.mark.pipeline
@pytest.mark.parametrize("where", ["", "../../"])
def test_a_method_that_peeks_ends_the_run(run, project, monkeypatch, where):
    """At the workspace's own test split, and at one of the project around it."""
    if where:
        (project / "data/lt/small").mkdir(parents=True)
        (project / "data/lt/small/test_labels.npy").write_bytes(b"labels")
        monkeypatch.setattr(seal, "PROJECT", project)
    peek = f"{where}data/lt/small/test_labels.npy"
    monkeypatch.setattr(mixup.Method, "set_mode", lambda self, network: Path(peek).open("rb"))  # noqa: ARG005, SIM115
    with pytest.raises(seal.SealedError, match=r"data/lt/small/test_labels\.npy"):
        run("--table", "later", "--images", "images")
    assert not paths.PUBLISHED.exists()


def test_late_epochs_come_in_the_order_in_which_they_were_trained(tmp_path):
    (tmp_path / "late/seed3").mkdir(parents=True)
    for epoch in range(1, 12):
        (tmp_path / f"late/seed3/epoch{epoch}.safetensors").touch()
    assert [path.stem for path in stage.late_of(tmp_path, 3)] == [f"epoch{epoch}" for epoch in range(1, 12)]


@pytest.mark.pipeline
def test_late_epochs_change_nothing_but_the_diagnostic(run):
    change(lambda content: content["tables"]["later"].update(late_epochs=0))
    none = read(run("--table", "later", "--images", "images")["small/mixup/joint/seed1.json"])
    change(lambda _: None)  # afterwards: a training that kept no late epochs is not gone on from
    best = read(run("--table", "later", "--images", "images")["small/mixup/joint/seed1.json"])
    assert none["best_on_test"] is None
    assert "diagnostics" not in none["provenance"]
    assert best["best_on_test"]["epochs"] == 2
    assert best["best_on_test"]["top1"] >= best["top1"]
    for rule, numbers in best["best_on_test"]["posthoc"].items():
        assert numbers["top1"] >= best["posthoc"][rule]["top1"]
    different = {"best_on_test", "cost", "provenance"}
    assert {k: v for k, v in best.items() if k not in different} == {
        k: v for k, v in none.items() if k not in different
    }


@pytest.mark.pipeline
def test_a_damaged_late_epoch_is_one_line_and_what_is_advised_helps(run, project):
    short = ("--table", "later", "--images", "images")
    before = read(run(*short)["small/mixup/joint/seed1.json"])
    (late,) = (project / "data/published").glob(".scratch/represent/small-mixup/*/late/seed1/epoch1.safetensors")
    late.write_bytes(late.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"late/seed1/epoch1\.safetensors is damaged \(.*\): delete (\S*) to "
    ) as caught:
        run(*short)
    assert "\n" not in str(caught.value)
    folder = project / "data/published" / str(caught.value).partition("delete ")[2].partition(" to train")[0]
    assert folder == late.parents[2]
    shutil.rmtree(folder)
    again = read(run(*short)["small/mixup/joint/seed1.json"])
    assert again | {"cost": None} == before | {"cost": None}


def test_a_variant_is_its_preset_but_for_what_it_says():
    chosen, p = plan.load(params.load(ROOT / "params.yaml"), ROOT / plan.PLAN)
    plain, decay = p.datasets["cifar100_lt_50"], p.datasets["cifar100_lt_50_decay"]
    assert {key for key in plain.model_fields_set | {"recipes"} if getattr(plain, key) != getattr(decay, key)} == {
        "recipes"
    }
    for name in ("mislas", "mislas_stage2"):
        assert decay.recipes[name] == p.recipes[name].model_copy(update={"weight_decay": 5e-4})
    assert p.seeds == chosen.seeds
    assert p.datasets["footing_cpu"].key("backbone").endswith("published/params.yaml: datasets.footing_cpu.backbone")


def test_every_cell_of_the_plan_can_be_trained():
    """Its settings are right, and what a footing compares differs in nothing but the method."""
    chosen, p = plan.load(params.load(ROOT / "params.yaml"), ROOT / plan.PLAN)
    for table in chosen.tables.values():
        for dataset, representation, classifiers in table.cells():
            stage.settings.training(p, dataset, representation, "representations")
            for classifier in classifiers:
                stage.settings.training(p, dataset, classifier, "classifiers")
    for name in ("footing_standard", "footing_strong", "footing_cpu"):
        footing = chosen.footing[name]
        for kind, stage_name in (("representation", "representations"), ("classifier", "classifiers")):
            names = {getattr(row, kind) for row in footing.rows}
            trained = [stage.settings.training(p, footing.dataset, each, stage_name) for each in names]
            recipes = [t.recipe.model_copy(update={"sam_rho": 0.0}) for t in trained if t.recipe]
            assert all(recipe == recipes[0] for recipe in recipes), name
            assert len({t.backbone for t in trained}) == 1
            augmentations = {t.settings.augmentation for t in trained if t.recipe}
            assert augmentations == {"strong" if name == "footing_strong" else "standard"}, (name, kind)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["tables"]["later"].update(late=1), r"published/params.yaml: tables.later.late: unknown key"),
        (
            lambda c: c["tables"]["later"]["grids"][0].update(representations=["ce"]),
            r"tables.later.late_epochs is 2: must be 1 as in tables.mislas, which trains small/ce too",
        ),
        (lambda c: c["footing"]["small"].update(table="none"), "footing.small.table: there is no none: use one of mis"),
        (lambda c: c["footing"]["small"].update(dataset="big"), "tables.mislas does not train big/ce/joint"),
        (
            lambda c: c["datasets"]["small"].update(preset="cifar"),
            "datasets.small.preset: there is no presets/cifar.yaml",
        ),
        (
            lambda c: c["datasets"]["small"].update(backbon="x"),
            "published/params.yaml: datasets.small.backbon: unknown key",
        ),
        (
            lambda c: c["datasets"]["small"]["recipes"]["mislas"].update(lr=-1.0),
            "published/params.yaml: datasets.small.recipes.mislas.lr: ",
        ),
        (
            lambda c: c["datasets"]["small"].update(represent="fast"),
            "datasets.small.represent: there is no recipe 'fast'",
        ),
        (
            lambda c: c["datasets"]["small"].update(backbone="resnet7"),
            "published/params.yaml: datasets.small.backbone: must be one of",
        ),
        (
            lambda c: c["tables"]["later"]["grids"][0].update(datasets=["nowhere"]),
            "name the data set nowhere: there is",
        ),
    ],
)
def test_a_wrong_plan_is_named(run, edit, message):
    change(edit)
    with pytest.raises(UserError, match=message) as caught:
        run("--images", "images")
    assert "\n" not in str(caught.value)
    assert not Path("data/published").exists()


def test_the_digest_is_of_the_images_of_each_class_in_whatever_order():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8), np.repeat(np.arange(3), 20)
    one, order = official.digest(images, labels), rng.permutation(60)
    assert official.digest(images[order], labels[order]) == one
    others = images.copy()
    others[7, 1, 2, 0] ^= 1
    assert official.digest(others, labels) != one
    assert official.digest(images, np.roll(labels, 1)) != one
    assert official.digest(images[:-1], labels[:-1]) != one


def one_pixel(images: Path):
    path = images / "test/class3/0.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def two_classes(images: Path):
    for folder in images.glob("*/class[2-9]"):
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (one_pixel, "of some images the pixels are others "),
        (
            two_classes,
            f"it has {2 * TEST} images of 2 classes, {TEST} of each, and must have {TEST} of each of {CLASSES} ",
        ),
        (
            lambda images: (images / "test/class4/1.png").unlink(),
            rf"of {CLASSES} classes, {TEST - 1} to {TEST} of each",
        ),
    ],
)
def test_other_images_than_the_official_ones_are_refused(run, project, edit, says):
    edit(project / "images/cifar10")
    start = r"^--images \S*images: source\.path: \S*/test is not the test split of cifar10: "
    with pytest.raises(UserError, match=f"{start}.*{says}") as caught:
        run("--table", "later", "--images", "images")
    assert "where this works" not in str(caught.value)
    assert not paths.PUBLISHED.exists()
    assert Path("data/published/data/raw/small").exists() == (edit == one_pixel)  # the others before any is decoded


def test_too_few_training_images_for_the_tail_are_named(run, project):
    for path in sorted((project / "images/cifar10/train/class0").iterdir())[5:]:
        path.unlink()
    message = (
        rf"cifar10/train: class 0 \(class0\) has 5 images, and the long tail and the hold-out take {LARGEST} of it$"
    )
    with pytest.raises(UserError, match=message):
        run("--table", "later", "--images", "images")


@pytest.mark.parametrize("recipes", ["", " 5", " [a]"])
def test_a_wrong_preset_of_a_variant_is_named(run, project, recipes):
    (project / "presets").unlink()
    shutil.copytree(ROOT / "presets", project / "presets")
    with (project / "presets/cifar10_lt_10.yaml").open("a") as preset:
        preset.write(f"\nrecipes:{recipes}\n")
    with pytest.raises(UserError, match=r"^presets/cifar10_lt_10\.yaml: recipes: must be a mapping of keys"):
        run("--images", "images")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--table", "marc"), "--table marc: there is none of that name: there are mislas, later"),
        (("--seed", "7"), "--seed 7: must be one of 0, 1, each named once at most"),
        (("--classifier", "crt"), "--classifier crt: there is none of that name: there are joint, mislas, tau_norm"),
        (
            ("--representation", "mixup", "--classifier", "mislas"),
            "--dataset, --representation, --classifier: these tables have no such cell: there are small/ce/joint, ",
        ),
        (("--seed", "-1"), "--seed -1: must be one of 0, 1"),
        (("--seed", "0", "--seed", "0"), "--seed 0: must be one of 0, 1, each named once at most"),
        (("--precision", "tf32"), "^--precision: is tf32, which exists only on a GPU; use float32 or bf16"),
        (("--dataset", "small", "--dataset", "big"), "--dataset big: there is none of that name: there are small"),
        (
            ("--representation", "ce", "--representation", "mixxup"),
            "--representation mixxup: there is none of that name",
        ),
        (("--table", "mislas", "--representation", "mixup"), "--representation mixup: there is none .*: there are ce"),
        (
            ("--images", "elsewhere"),
            r"--images \S*/elsewhere: source.path: \S*/elsewhere/cifar10: there is no such folder",
        ),
    ],
)
def test_a_wrong_option_is_named(run, options, message):
    with pytest.raises(UserError, match=message) as caught:
        run(*options)
    assert "\n" not in str(caught.value)
