"""The stage evaluate, end to end on made-up predictions: formats, rules without a hold-out, and one-line errors."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import confusion_matrix

from stages import evaluate, paths
from tailcal import figures, files, params
from tailcal.errors import UserError
from tailcal.evaluation import per_class_table
from tailcal.metrics.calibration import ece
from tailcal.metrics.scores import softmax
from tailcal.predictions import Predictions
from tests.conftest import ROOT, STAGE1

CELL = {"dataset": "digits_lt", "representation": "ce", "classifier": "joint"}
ARGUMENTS = [part for axis, name in CELL.items() for part in (f"--{axis}", name)]
NAMES = ["zero", "one, a comma", "two", "three", "four", "five", "six"]
COUNTS = [400, 150, 100, 60, 20, 19, 3]
CUT = {
    "raw": {"train_images.npy": "c"},
    "source": {"kind": "digits", "test_per_class": 50, "seed": 0},
    "imbalance": {"profile": "exponential", "factor": 20.0, "seed": 0},
    "holdout_per_class": 20,
}
CHECKSUMS = {"train_labels.npy": "a", "test_labels.npy": "b"}
NAMED = {axis: {"name": CELL[axis]} for axis in ("representation", "classifier")}
IMAGES = {"skipped": {"train": 1, "test": 0}, "duplicates": {"train": 0, "holdout": 2, "test": 3, "test_holdout": 0}}
K = len(NAMES)
RULES = {
    "temperature": {},
    "vector_scaling": {},
    "class_temperature": {},
    "logit_adjustment": {"tau": 1.0},
    "pn_inductive": {"tau": 1.0},
    "pn_transductive": {"tau": "tuned"},
}
FITTED = {
    "temperature": {"temperature"},
    "vector_scaling": set(),
    "class_temperature": {"temperature_head", "temperature_tail"},
    "logit_adjustment": set(),
    "pn_inductive": set(),
    "pn_transductive": {"tau"},
}


def split(N: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Over-confident logits of N samples; the labels are the same for every seed."""
    labels = np.arange(N) % K
    logits = np.random.default_rng(seed).normal(size=(N, K)) * 3
    logits[np.arange(N), labels] += 2
    return logits.astype(np.float32), labels


def save(seed: int, holdout: int = 70, **changed: np.ndarray) -> None:
    test_logits, test_labels = split(350, seed)
    holdout_logits, holdout_labels = split(holdout, 100 + seed)
    arrays = {
        "test_logits": test_logits,
        "test_labels": test_labels,
        "holdout_logits": holdout_logits,
        "holdout_labels": holdout_labels,
    } | changed
    np.savez(paths.predictions(**CELL) / f"seed{seed}.npz", **arrays)
    seal()


def seal() -> None:
    """Take down the checksums of the predictions that are there, as the stage calibrate does."""
    folder = paths.predictions(**CELL)
    checksums = {path.name: files.sha256(path) for path in folder.glob("*.npz")}
    record(checksums=checksums)


def record(**changed: object) -> None:
    """The provenance of the predictions."""
    made = {
        "device": "none",
        "params": NAMED,
        "data": CHECKSUMS,
        "predicted": CHECKSUMS,
        "starts": {},
        "checksums": {},
    } | changed
    files.write_json(paths.predictions(**CELL) / "provenance.json", made)


def describe(**changed: object) -> None:
    """Write the meta.json of the data set, with some keys changed."""
    counts = {"class_names": NAMES, "train_counts": COUNTS, "test_counts": [50] * K, "checksums": CHECKSUMS}
    (paths.longtail("digits_lt") / "meta.json").write_text(json.dumps(counts | CUT | IMAGES | changed))


@pytest.fixture(autouse=True)
def _project(tmp_path, monkeypatch):
    """A project folder in which one cell has been predicted with three seeds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    posthoc(RULES)
    paths.longtail("digits_lt").mkdir(parents=True)
    describe()
    paths.predictions(**CELL).mkdir(parents=True)
    for seed in (0, 1, 2):
        save(seed)


def edit_params(old: str, new: str) -> None:
    text = Path("params.yaml").read_text()
    assert old in text
    Path("params.yaml").write_text(text.replace(old, new))


def posthoc(rules: dict) -> None:
    """Put other post-hoc rules into params.yaml."""
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["evaluate"]["posthoc"] = rules
    Path("params.yaml").write_text(yaml.safe_dump(content))


def one_seed() -> None:
    edit_params("- 0\n- 1\n- 2\n", "- 0\n")


def measured() -> dict:
    evaluate.main(ARGUMENTS)
    return json.loads(paths.metrics(**CELL).read_text(), parse_constant=pytest.fail)


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(paths.cell_plots(**CELL) / name)


def written() -> dict[str, bytes]:
    """Every file under metrics/ and plots/, by name."""
    found = [path for top in ("metrics", "plots") for path in Path(top).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in found}


def test_metrics_json():
    numbers = measured()
    assert (numbers["seeds"], numbers["provenance"]["device"], numbers["posthoc_absent"]) == (3, "none", {})
    assert numbers["provenance"]["evaluate"] == params.load().evaluate.model_dump()
    eces = [ece(softmax(split(350, seed)[0]), split(350, seed)[1]) for seed in (0, 1, 2)]
    assert numbers["ece"] == round(np.mean(eces), 6)
    assert numbers["ece_std"] == round(np.std(eces, ddof=1), 6)
    confidences = [softmax(split(350, seed)[0]).max(axis=1).mean() for seed in (0, 1, 2)]
    assert numbers["confidence"] == round(np.mean(confidences), 6)
    metrics = ["top1", "top5", "confidence", "ece", "ece_floor", "mce", "ace", "classwise_ece", "nll", "brier"]
    for group in ("many", "medium", "few"):
        metrics += [group, *(f"{score}_{group}" for score in ("ece", "mce", "ace", "classwise_ece", "nll", "brier"))]
    expected = {key for name in metrics for key in (name, f"{name}_std")}
    assert set(numbers) == expected | {"seeds", "posthoc", "posthoc_absent", "images", "provenance"}
    assert numbers["images"] == IMAGES
    assert set(numbers["provenance"]) == {"device", "params", "data", "predicted", "starts", "evaluate", "seeds"}
    assert set(numbers["posthoc"]) == set(FITTED)
    for rule, names in FITTED.items():
        fitted = {key for name in names for key in (name, f"{name}_std")}
        assert set(numbers["posthoc"][rule]) == expected | fitted | {"transductive"}
        assert numbers["posthoc"][rule]["transductive"] is (rule == "pn_transductive")
    assert numbers["posthoc"]["temperature"]["temperature"] > 1
    assert numbers["posthoc"]["temperature"]["nll"] < numbers["nll"]
    headline = json.loads(paths.headline(**CELL).read_text())
    assert headline == {name: numbers[name] for name in ("top1", "few", "ece", "nll")}
    assert numbers["posthoc"]["temperature"]["top1"] == numbers["top1"]
    assert numbers["posthoc"]["logit_adjustment"]["few"] > numbers["few"]


def test_reliability_csv_is_what_the_ece_is_made_of():
    numbers = measured()
    bins = table("reliability.csv")
    assert list(bins) == ["seed", "bin_lower", "bin_upper", "confidence", "accuracy", "count", "gap"]
    assert bins.groupby("seed").size().to_dict() == {0: 15, 1: 15, 2: 15}
    by_seed = (bins["count"] * bins["gap"].abs()).groupby(bins["seed"]).sum() / 350
    assert by_seed.mean() == pytest.approx(numbers["ece"], abs=2e-6)
    empty = bins["count"] == 0
    assert empty.any()
    np.testing.assert_array_equal(bins["confidence"].isna(), empty)
    with (paths.cell_plots(**CELL) / "reliability.csv").open(newline="") as stream:
        first = next(csv.DictReader(stream))
    assert (first["bin_upper"], first["confidence"], first["accuracy"], first["count"], first["gap"]) == (
        "0.066667",
        "",
        "",
        "0",
        "",
    )
    assert (paths.cell_plots(**CELL) / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_the_number_of_bins_is_that_of_the_parameters():
    edit_params("bins: 15", "bins: 5")
    numbers, bins = measured(), table("reliability.csv")
    assert bins["bin_lower"].nunique() == 5
    by_seed = (bins["count"] * bins["gap"].abs()).groupby(bins["seed"]).sum() / 350
    assert by_seed.mean() == pytest.approx(numbers["ece"], abs=2e-6)


def test_the_diagram_says_what_chance_alone_gives(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "reliability", lambda _, floor, *__: drawn.append(floor))
    assert drawn == [measured()["ece_floor"]] * len(drawn)
    assert drawn


def test_per_class_and_confusion_csv():
    numbers = measured()
    per_class = table("per_class.csv")
    assert list(per_class) == ["class", "name", "train_count", "group", "accuracy", "accuracy_std", "test_count"]
    assert per_class["name"].tolist() == NAMES
    assert per_class["group"].tolist() == ["many"] * 2 + ["medium"] * 3 + ["few"] * 2
    assert per_class["test_count"].tolist() == [50] * K
    assert per_class.groupby("group")["accuracy"].mean()["few"] == pytest.approx(numbers["few"], abs=1e-6)
    confusion = table("confusion.csv")
    assert (len(confusion), confusion["count"].sum()) == (K * K, 3 * 350)
    logits, labels = zip(*(split(350, seed) for seed in (0, 1, 2)), strict=True)
    expected = confusion_matrix(np.concatenate(labels), np.concatenate(logits).argmax(1))
    assert confusion["count"].tolist() == expected.ravel().tolist()
    right = confusion[confusion["actual"] == confusion["predicted"]]
    assert right["count"].sum() / (3 * 350) == pytest.approx(numbers["top1"], abs=1e-6)


def test_confusion_csv_has_the_pairs_that_occur():
    labels = split(350, 0)[1]
    for seed in (0, 1, 2):
        predicted = np.where((labels == 6) & (np.arange(350) < 7 * seed), 1, labels)
        save(seed, test_logits=np.eye(K, dtype=np.float32)[predicted])
    measured()
    right = [(name, name, 150) for name in NAMES[:-1]]
    rows = list(table("confusion.csv").itertuples(index=False, name=None))
    assert rows == [*right, ("six", NAMES[1], 3), ("six", "six", 147)]


def test_two_runs_write_the_same_bytes():
    measured()
    first = written()
    measured()
    assert len(first) == 6
    assert written() == first


def test_what_a_killed_one_left_is_removed():
    places = [paths.cell_plots(**CELL) / "per_class.csv", paths.metrics(**CELL), paths.headline(**CELL)]
    left = [place.with_name(f".{place.name}.x1.part") for place in places]
    for path in left:
        path.parent.mkdir(parents=True)
        path.touch()
    measured()
    assert not [path for path in left if path.exists()]


def test_one_seed_has_no_standard_deviation():
    one_seed()
    numbers = measured()
    assert numbers["seeds"] == 1
    assert numbers["top1_std"] is numbers["posthoc"]["temperature"]["temperature_std"] is None
    assert table("per_class.csv")["accuracy_std"].isna().all()


def test_a_rule_may_be_tuned_or_not():
    posthoc({"logit_adjustment": {"tau": "tuned"}})
    tuned = measured()["posthoc"]["logit_adjustment"]
    posthoc({"logit_adjustment": {"tau": 1.0}})
    assert set(tuned) - set(measured()["posthoc"]["logit_adjustment"]) == {"tau", "tau_std"}


@pytest.mark.parametrize(
    ("tau", "applied"),
    [
        ({}, ["logit_adjustment"]),
        ({"logit_adjustment": {"tau": "tuned"}}, []),
        ({"pn_transductive": {"tau": 1.0}}, ["logit_adjustment", "pn_transductive"]),
    ],
)
def test_without_a_holdout_fitted_rules_are_absent_and_say_why(tau, applied):
    posthoc(RULES | tau)
    for seed in (0, 1, 2):
        save(seed, holdout=0)
    numbers = measured()
    assert list(numbers["posthoc"]) == applied
    reason = "fitted on held-out data, and this data set holds none out"
    assert numbers["posthoc_absent"] == {rule: reason for rule in RULES if rule not in applied}


def test_a_rule_is_fitted_without_the_test_labels():
    numbers = measured()["posthoc"]
    for seed in (0, 1, 2):
        save(seed, test_labels=np.roll(split(350, seed)[1], 1))
    shuffled = measured()["posthoc"]
    for rule, names in FITTED.items():
        assert numbers[rule]["nll"] != shuffled[rule]["nll"]
        assert all(numbers[rule][name] == shuffled[rule][name] for name in names)


def test_two_seeds_have_a_deviation_and_one_has_none():
    labels = np.array([0, 0, 1, 1])
    right, half = np.eye(2)[labels], np.eye(2)[[0, 1, 1, 1]]
    cell = [Predictions(scores, labels, scores[:0], labels[:0]) for scores in (right, half)]
    two = per_class_table(cell, ["a", "b"], np.array([9, 3]))
    np.testing.assert_allclose(two["accuracy_std"], [0.5 / np.sqrt(2), 0])
    assert per_class_table(cell[:1], ["a", "b"], np.array([9, 3]))["accuracy_std"].isna().all()


def test_an_empty_group_is_null():
    describe(train_counts=[500] * K)
    numbers = measured()
    assert numbers["many"] is not None
    for name in ("few", "few_std", "ece_few", "nll_few", "brier_few", "medium"):
        assert numbers[name] is None


def test_it_imports_no_torch():
    code = f"import sys; from stages.evaluate import main; main({ARGUMENTS!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def damage(content: bytes) -> None:
    (paths.predictions(**CELL) / "seed1.npz").write_bytes(content)
    seal()


def flip_a_bit() -> None:
    path = paths.predictions(**CELL) / "seed1.npz"
    content = bytearray(path.read_bytes())
    content[5000] ^= 4
    path.write_bytes(content)


def array(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays) if arrays else np.save(stream, np.zeros(3))
    return stream.getvalue()


def nan_logits() -> np.ndarray:
    logits, _ = split(350, 1)
    logits[7, 3] = np.nan
    return logits


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: (paths.predictions(**CELL) / "seed1.npz").unlink(), "seed1.npz is missing"),
        (lambda: damage((paths.predictions(**CELL) / "seed1.npz").read_bytes()[:3000]), "seed1.npz is damaged"),
        (lambda: damage(b""), "seed1.npz is damaged"),
        (lambda: damage(b"something else"), "seed1.npz is damaged"),
        (lambda: damage(array()), "seed1.npz is damaged"),
        (
            lambda: damage(array(test_logits=np.zeros((2, K)))),
            "seed1.npz is damaged (test_labels is not a file in the archive)",
        ),
        (flip_a_bit, "seed1.npz is damaged: its SHA-256 is"),
        (lambda: save(1, test_labels=np.array([{}] * 350)), "seed1.npz is damaged"),
        (
            lambda: save(1, test_logits=np.zeros((350, 3), np.float32)),
            "seed1.npz: test_logits has shape [350, 3]: the data set has 7 classes",
        ),
        (lambda: save(1, test_logits=nan_logits()), "seed1.npz: test: scores must be finite"),
        (lambda: save(1, test_labels=np.full(350, 7)), "seed1.npz: test: labels must lie in 0..6"),
        (lambda: save(1, holdout_labels=np.zeros(3, int)), "seed1.npz: holdout: labels must have shape [70]"),
        (lambda: save(1, test_labels=np.zeros(350, int)), "seed1.npz: its test labels differ from seed 0's"),
        (lambda: save(1, holdout=0), "seed1.npz: one of it and seed 0's has a hold-out"),
        (lambda: (paths.predictions(**CELL) / "provenance.json").unlink(), "provenance.json is missing"),
        (lambda: (paths.predictions(**CELL) / "provenance.json").write_text("{"), "provenance.json is damaged"),
        (
            lambda: (paths.predictions(**CELL) / "provenance.json").write_text("{}"),
            "json: params: this key is missing; ",
        ),
        (
            lambda: record(data={"train_labels.npy": "b"}),
            "is of networks that were trained on another training split than data/lt/digits_lt holds: run `dvc repro`, "
            "or without DVC or off the grid `python -m stages.represent --dataset digits_lt --representation "
            "ce` and `python -m "
            "stages.calibrate --dataset digits_lt --representation ce --classifier joint`",
        ),
        (
            lambda: record(predicted=CHECKSUMS | {"test_labels.npy": "c"}),
            "is of other held-out or test images than data/lt/digits_lt holds: run `dvc repro`, or without DVC "
            "or off the grid `python "
            "-m stages.calibrate --dataset digits_lt --representation ce --classifier joint`",
        ),
        (lambda: record(predicted={}), "is of other held-out or test images than data/lt/digits_lt holds"),
        (lambda: record(predicted=None), "provenance.json: predicted: must be a mapping of keys to values"),
        (
            lambda: record(params={}),
            "provenance.json: params.representation: this key is missing; params.classifier: this key is missing; it "
            "is damaged, or of another version: delete it and run `dvc repro`",
        ),
        (
            lambda: record(params=NAMED | {"classifier": {"name": "crt"}}),
            "data/predictions/digits_lt/ce/joint is of the classifier crt: run `dvc repro`",
        ),
        (
            lambda: edit_params("\n- 2\n", "\n- 7\n"),
            "data/predictions/digits_lt/ce/joint has no seed 7, and the parameters say seeds 0, 1, 7: run `dvc repro`, "
            "or without DVC or off the grid `python -m stages.calibrate --dataset digits_lt --representation ce "
            "--classifier joint`",
        ),
        (
            lambda: files.write_json(
                paths.representation("digits_lt", "ce") / "provenance.json", STAGE1 | {"weights": {"a": "b"}}
            ),
            "data/predictions/digits_lt/ce/joint is not of the networks that data/representations/digits_lt/ce holds: "
            "run `dvc repro`, or without DVC or off the grid `python -m stages.calibrate --dataset digits_lt "
            "--representation ce "
            "--classifier joint`",
        ),
        (
            lambda: files.write_json(
                paths.raw("digits_lt") / "meta.json", CUT | {"class_names": NAMES, "checksums": {"a": "b"}}
            ),
            "data/lt/digits_lt was cut from other images than data/raw/digits_lt holds: run `dvc repro`, or without "
            "DVC or off the grid `python -m stages.subsample --dataset digits_lt`",
        ),
        (lambda: (paths.longtail("digits_lt") / "meta.json").unlink(), "meta.json is missing"),
        (
            lambda: (paths.longtail("digits_lt") / "meta.json").write_text("{}"),
            "meta.json: class_names: this key is missing; train_counts: this key is missing",
        ),
        (lambda: describe(train_counts=COUNTS[1:]), "meta.json: 7 class_names, but 6 train_counts"),
        (lambda: describe(test_counts=[50]), "meta.json: 7 class_names, but 1 test_counts"),
        (
            lambda: describe(duplicates={"train": 0, "holdout": 2}),
            "meta.json: duplicates: lacks test, test_holdout",
        ),
        (lambda: posthoc({"platt": {}}), "evaluate.posthoc.platt: unknown rule"),
        (
            lambda: posthoc({"pn_transductive": {"tau": "best"}}),
            "params.yaml: evaluate.posthoc.pn_transductive.tau: must be a number from 0 to 100, or the word tuned",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_file_and_nothing_is_written(spoil, message):
    spoil()
    with pytest.raises(UserError) as error:
        evaluate.main(ARGUMENTS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert written() == {}


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("dataset", "params.yaml: there is no data set nonsense: "),
        ("representation", "params.yaml: representations has no block nonsense: there are "),
        ("classifier", "params.yaml: classifiers has no block nonsense: there are "),
    ],
)
def test_a_name_that_params_yaml_lacks_is_refused(axis, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([*ARGUMENTS, f"--{axis}", "nonsense"])


def test_from_the_command_line_an_error_is_one_line():
    (paths.predictions(**CELL) / "seed2.npz").unlink()
    command = [sys.executable, "-m", "stages.evaluate", *ARGUMENTS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (1, "")
    missing = "data/predictions/digits_lt/ce/joint/seed2.npz"
    assert done.stderr == f"error: {missing} is missing: {files.REPRO}\n"


def test_training_counts_are_those_of_the_labels_where_these_are_there():
    path, meta = paths.longtail("digits_lt") / "train_labels.npy", paths.longtail("digits_lt") / "meta.json"
    np.save(path, np.repeat(np.arange(K), COUNTS))
    checksums = CHECKSUMS | {path.name: files.sha256(path)}
    content = json.loads(meta.read_text())
    made = paths.predictions(**CELL) / "provenance.json"
    made.write_text(json.dumps(json.loads(made.read_text()) | {"data": checksums, "predicted": checksums}))
    meta.write_text(json.dumps(content | {"checksums": checksums}))
    evaluate.main(ARGUMENTS)
    meta.write_text(json.dumps(content | {"checksums": checksums, "train_counts": [COUNTS[0] + 60, *COUNTS[1:]]}))
    says = (
        r"meta\.json: train_counts are not those of train_labels\.npy: delete it and run .*stages\.subsample --dataset"
    )
    with pytest.raises(UserError, match=says):
        evaluate.main(ARGUMENTS)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"train_labels\.npy is damaged: its SHA-256 is"):
        evaluate.main(ARGUMENTS)
