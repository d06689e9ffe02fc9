"""Stage 2: calibrate a classifier on a trained representation, once a seed; then predict the held-out and test splits.

The classifiers are trained and written before the test split is opened.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stages import paths
from stages.represent import HISTORY
from tailcal import (
    checkpoint,
    costs,
    distributed,
    errors,
    files,
    lock,
    method,
    models,
    params,
    predictions,
    provenance,
    seal,
    settings,
    splits,
    store,
    train,
    weights,
)

TRAINING_SPLIT = ("train_images.npy", "train_labels.npy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--representation", required=True)
    parser.add_argument("--classifier", required=True)
    args = parser.parse_args()

    p = params.load()
    distributed.launch("stages.calibrate", p.runtime.processes)
    cell = (args.dataset, args.representation, args.classifier)
    outputs = [paths.classifier(*cell), paths.predictions(*cell), paths.costs("calibrate", *cell)]
    with lock.alone(paths.LOCKS, *outputs, paths.scratch("calibrate", *cell)):
        calibrate(p, *cell)


def read_upstream(path: Path) -> dict[str, Any]:
    """What stage 1 has recorded of itself. Raises UserError naming the file when it is missing or damaged."""
    record = files.read_json(path)
    parts = {
        "code": str,
        "params": dict,
        "data": dict,
        "device": str,
        "versions": dict,
        "network": dict,
        "weights": dict,
    }
    for key, kind in parts.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise errors.UserError(f"{path} is damaged (no {key}): delete {path.parent} and run `dvc repro`")
    if not {"dataset", "representation"} <= record["params"].keys():
        raise errors.UserError(f"{path} is damaged (params lacks a part): delete {path.parent} and run `dvc repro`")
    return record


def calibrate(p: params.Params, dataset_name: str, representation: str, classifier: str, late_epochs: int = 0) -> Path:
    """Train every seed's classifier and write it, then predict; write the logits with their provenance.

    Returns the folder of its checkpoints; `late_epochs` is that of `represent`. Raises UserError.
    """
    dataset = params.dataset(p, dataset_name)
    training = settings.training(p, dataset_name, classifier, "classifiers")
    device = train.prepare(p.runtime, p.precision)
    longtail = paths.longtail(dataset_name)
    meta = splits.read_meta(longtail)
    counts = torch.tensor(meta["train_counts"])
    data = store.Images(*splits.read_split(longtail, "train"), dataset.augmentation, device, p.runtime.placement)
    stage1 = paths.representation(dataset_name, representation)
    upstream = read_upstream(stage1 / "provenance.json")
    if any(upstream["data"].get(name) != meta["checksums"].get(name) for name in TRAINING_SPLIT):
        raise errors.UserError(
            f"{stage1} was trained on another training split than {longtail} holds: delete it and run `dvc repro`"
        )

    record = {
        "code": provenance.code_version("stages.calibrate", method.module(training.method)),
        "params": {
            "dataset": upstream["params"]["dataset"],
            "representation": upstream["params"]["representation"],
            "classifier": training.record() | {"precision": p.precision},
        },
        "data": upstream["data"],
        "device": device.type,
        "versions": provenance.versions(),
        "stage1": {key: upstream[key] for key in ("code", "device", "versions")},
    }
    if late_epochs:
        record["diagnostics"] = {"late_epochs": late_epochs}
    depends = {**record, "starts": upstream["weights"]}
    scratch = paths.scratch("calibrate", dataset_name, representation, classifier) / checkpoint.fingerprint(depends)

    def make(start: Path) -> tuple[models.Network, method.Method]:
        network = models.build(**upstream["network"])
        weights.load_weights(network, start, upstream["weights"].get(start.stem))
        return network, method.load(training.method)(training.settings, counts)

    replicas = [
        train.Replica(
            f"calibrate {dataset_name}/{representation}/{classifier} seed {seed}",
            seed,
            partial(make, stage1 / f"seed{seed}.safetensors"),
            scratch / f"seed{seed}.pt",
            training.recipe_key,
            train.Late(scratch / f"late/seed{seed}", late_epochs) if late_epochs else None,
        )
        for seed in p.seeds
    ]
    with seal.training():
        networks = train.train(replicas, data, training.recipe, p.runtime, p.precision)
    trained = dict(zip(p.seeds, networks, strict=True))
    if not distributed.is_first():
        return scratch
    out = paths.classifier(dataset_name, representation, classifier)
    checksums = {}
    for seed, one in trained.items():
        name = f"seed{seed}.safetensors"
        checksums[name] = weights.save_weights(one.network, out / name)
    history = pd.DataFrame([epoch for one in trained.values() for epoch in one.history], columns=HISTORY)
    files.write_text(out / "history.csv", history.to_csv(index=False, float_format="%.6g"))

    placed = {
        split: store.Images(*splits.read_split(longtail, split), dataset.augmentation, device, p.runtime.placement)
        for split in ("holdout", "test")
    }
    logits = {
        split: train.predict([one.network for one in trained.values()], images, p.runtime)
        for split, images in placed.items()
    }
    labels = {split: images.labels.cpu().numpy() for split, images in placed.items()}
    folder = paths.predictions(dataset_name, representation, classifier)
    for i, seed in enumerate(trained):
        for split in logits:
            if not np.isfinite(logits[split][i]).all():
                raise errors.UserError(
                    f"{dataset_name}/{representation}/{classifier} seed {seed}: its {split} logits are not "
                    f"finite numbers: milder settings of {classifier} usually help"
                )
        made = predictions.Predictions(logits["test"][i], labels["test"], logits["holdout"][i], labels["holdout"])
        checksums[f"seed{seed}.npz"] = made.write(folder / f"seed{seed}.npz")
    files.write_json(
        folder / "provenance.json", record | distributed.record(p.runtime.sync_bn) | {"checksums": checksums}
    )
    costs.write(
        paths.costs("calibrate", dataset_name, representation, classifier),
        train.machine(device),
        data.placement,
        p.runtime.replicas,
        {seed: one.cost for seed, one in trained.items()},
    )
    checkpoint.keep_only(scratch)
    return scratch


if __name__ == "__main__":
    errors.run(main)
