"""Small made-up results of a grid, written as the stages represent, calibrate and evaluate write theirs."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from stages import paths
from tailcal import figures, files, settings
from tailcal.duplicates import TWICE
from tailcal.params import load
from tests.conftest import ROOT, STAGE1

REPRESENTATIONS = ("ce", "mixup", "balanced_softmax")
CLASSIFIERS = ("joint", "crt", "lws", "tau_norm", "mislas", "mislas_shifted_bn")
RULES = (
    "temperature",
    "vector_scaling",
    "class_temperature",
    "logit_adjustment",
    "pn_inductive",
    "pn_transductive",
)
TRANSDUCTIVE = ("pn_transductive",)
NUMBERS = (
    "top1",
    "top5",
    "confidence",
    "ece",
    "mce",
    "ace",
    "classwise_ece",
    "nll",
    "brier",
    "many",
    "medium",
    "few",
    "ece_many",
    "ece_medium",
    "ece_few",
)


def bins(generator: np.random.Generator, seeds: int = 3, number: int = 15, size: int = 500) -> pd.DataFrame:
    """A reliability.csv: overconfident predictions, empty bins at the low end."""
    frames = []
    for seed in range(seeds):
        confidence = 0.2 + 0.8 * generator.beta(3, 0.8, size)
        correct = generator.random(size) < confidence**1.5
        inside = np.clip(np.ceil(confidence * number).astype(int) - 1, 0, number - 1)
        grouped = pd.DataFrame({"bin": inside, "confidence": confidence, "accuracy": correct}).groupby("bin")
        frame = grouped.mean().assign(count=grouped.size()).reindex(range(number))
        lower = np.arange(number) / number
        frame = frame.assign(
            seed=seed,
            bin_lower=lower,
            bin_upper=lower + 1 / number,
            count=frame["count"].fillna(0).astype(int),
            gap=frame["accuracy"] - frame["confidence"],
        )
        frames.append(frame)
    return pd.concat(frames)[["seed", "bin_lower", "bin_upper", "confidence", "accuracy", "count", "gap"]].round(6)


def classes(generator: np.random.Generator, number: int = 10, largest: int = 150, factor: float = 20) -> pd.DataFrame:
    """A per_class.csv: an exponential profile, tail classes less accurate."""
    counts = np.floor(largest * factor ** -(np.arange(number) / (number - 1))).astype(int)
    accuracy = np.clip(0.95 - 0.6 * np.arange(number) / number + generator.normal(0, 0.08, number), 0, 1)
    return pd.DataFrame(
        {
            "class": np.arange(number),
            "name": ["NA", "a rather $long$ name of a class, past any axis", "null"][:number]
            + [f"class {k}" for k in range(3, number)],
            "train_count": counts,
            "group": np.select([counts > 100, counts >= 20], ["many", "medium"], "few"),
            "accuracy": accuracy.round(4),
            "accuracy_std": 0.01,
            "test_count": 50,
        }
    )


def history(generator: np.random.Generator, epochs: int = 30, seeds: int = 3) -> pd.DataFrame:
    """A history.csv."""
    return pd.DataFrame(
        [
            {
                "epoch": epoch,
                "seed": seed,
                "lr": 0.1,
                "loss": round(2.3 * np.exp(-epoch / 8) + 0.2 * generator.random(), 5),
                "train_accuracy": round(1 - 0.9 * np.exp(-epoch / 6) - 0.05 * generator.random(), 5),
            }
            for epoch in range(1, epochs + 1)
            for seed in range(seeds)
        ]
    )


def numbers(generator: np.random.Generator, seeds: int = 3) -> dict:
    """The flat numbers of one cell or one post-hoc rule."""
    values = {name: round(float(generator.uniform(0.05, 0.95)), 4) for name in NUMBERS}
    values["top1"] = round(float(generator.uniform(0.8, 0.9)), 4)
    values["ece"] = round(float(generator.uniform(0.03, 0.13)), 4)
    return {
        key: value
        for name in NUMBERS
        for key, value in ((name, values[name]), (f"{name}_std", 0.0123 if seeds > 1 else None))
    }


def write(
    root: Path, datasets=("digits_lt",), representations=REPRESENTATIONS, classifiers=CLASSIFIERS, number=10, seeds=3
) -> None:
    """Write params.yaml and every input of the report below `root`, which must be the working directory."""
    generator = np.random.default_rng(0)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["grid"] = {
        "datasets": list(datasets),
        "representations": list(representations),
        "classifiers": list(classifiers),
    }
    params["datasets"] = dict.fromkeys(datasets, params["datasets"]["digits_lt"])
    params["seeds"] = list(range(seeds))
    (root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for dataset, representation in product(datasets, representations):
        stage1 = root / paths.representation(dataset, representation)
        _csv(stage1 / "history.csv", history(generator, seeds=seeds))
        checksum = files.sha256(stage1 / "history.csv")
        (stage1 / "provenance.json").write_text(json.dumps(STAGE1 | {"history": checksum}))
        for classifier in classifiers:
            _write_cell(root, (dataset, representation, classifier), generator, number, seeds)


def change(path: Path, **values) -> None:
    """Overwrite some values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def measure(cell: tuple[str, ...], top1: float, ece: float, **values) -> None:
    """Change some of a cell's metrics, and its tables so that they have this accuracy and this calibration error."""
    tables = {name: paths.cell_plots(*cell) / f"{name}.csv" for name in ("per_class", "reliability")}
    of_classes = pd.read_csv(tables["per_class"], keep_default_na=False)
    _csv(tables["per_class"], of_classes.assign(accuracy=top1))
    of_bins = pd.read_csv(tables["reliability"])
    _csv(tables["reliability"], of_bins.assign(confidence=of_bins["accuracy"] + ece))
    change(paths.metrics(*cell), top1=top1, ece=ece, **values)


def _write_cell(root: Path, cell: tuple[str, ...], generator: np.random.Generator, number: int, seeds: int) -> None:
    dataset, representation, classifier = cell
    p = load(root / "params.yaml")
    table, of_classes, floor = bins(generator, seeds), classes(generator, number), {"ece_floor": 0.01}
    measured = {
        "top1": round(float(np.average(of_classes["accuracy"], weights=of_classes["test_count"])), 6),
        "ece": round(figures.calibration_error(table), 6),
    }
    metrics = (
        numbers(generator, seeds)
        | measured
        | floor
        | {
            "seeds": seeds,
            "posthoc": {
                rule: numbers(generator, seeds) | floor | {"transductive": rule in TRANSDUCTIVE} for rule in RULES
            },
            "posthoc_absent": {},
            "images": {"skipped": {}, "duplicates": dict.fromkeys(TWICE, 0)},
            "provenance": {
                "params": settings.of_cell(p, *cell),
                "evaluate": p.evaluate.model_dump(),
                "starts": STAGE1["weights"],
                "data": {"train_images.npy": "fedcba9876543210"},
                "predicted": {},
                "code": "aa4ca0a",
                "device": "cpu",
                "versions": {"numpy": "2.4.6"},
                "classifier": classifier,
                "seeds": list(range(seeds)),
            },
        }
    )
    where = root / paths.metrics(*cell)
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(metrics))
    plots = root / paths.cell_plots(*cell)
    _csv(plots / "reliability.csv", table)
    _csv(plots / "per_class.csv", of_classes)
    figures.reliability(table, 0.01, f"{representation}/{classifier} on {dataset}", plots / "reliability.png")


def _csv(path: Path, frame: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
