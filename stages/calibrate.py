"""Stage 2: train a classifier on a representation, once per seed; then predict the held-out and test splits.

The classifiers are trained and written before the test split is opened.
"""

from pathlib import Path

import numpy as np

from stages import paths, processes
from stages.seeds import open_training, read_images, train_seeds, write_costs, write_seeds
from tailcal import (
    checkpoint,
    distributed,
    draws,
    errors,
    files,
    lineage,
    lock,
    method,
    models,
    params,
    predictions,
    provenance,
    seal,
    settings,
    store,
    train,
    weights,
)
from tailcal.cell import CellName


def main() -> None:
    parser = errors.CommandLine("stages.calibrate", __doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--representation", required=True)
    parser.add_argument("--classifier", required=True)
    args = parser.parse_args()

    p = params.load()
    processes.launch("stages.calibrate", p.runtime.processes)
    cell = CellName(**vars(args))
    with lock.alone(paths.LOCKS, *outputs(*cell)):
        calibrate(p, cell)


def outputs(*cell: str) -> list[Path]:
    """What a training of this cell writes, its unfinished work included."""
    made = [paths.classifier(*cell), paths.predictions(*cell)]
    return [*made, paths.costs("calibrate", *cell), paths.scratch("calibrate", *cell)]


def calibrate(p: params.Params, cell: CellName, late_epochs: int = 0) -> Path:
    """Train every seed's classifier and write it, then predict; write the logits with their provenance.

    Returns the folder of its checkpoints; `late_epochs` is that of `represent`. Raises UserError.
    """
    opened = open_training(p, cell.dataset, cell.classifier, "classifiers")
    training, longtail, meta, data = opened.training, opened.longtail, opened.meta, opened.data
    represented = settings.training(p, *cell[:2], "representations")
    stage1 = paths.representation(*cell[:2])
    upstream = lineage.read_represented(stage1)
    lineage.require_stage1(upstream, represented.record(p.precision), p.seeds, meta.checksums, stage1, longtail)

    record = {
        "code": provenance.code_version("stages.calibrate", method.module(training.method)),
        "params": {
            "dataset": upstream.params.dataset,
            "representation": upstream.params.representation,
            "classifier": training.record(p.precision),
        },
        "data": upstream.data,
        "device": train.described(opened.device),
        "versions": provenance.versions(),
        "stage1": upstream.model_dump(include={"code", "device", "versions"}),
    }
    if late_epochs:
        record["diagnostics"] = {"late_epochs": late_epochs}
    # Without the networks of stage 1: each seed's checkpoint says itself which it began with, and others may come.
    scratch = paths.scratch("calibrate", *cell) / checkpoint.fingerprint(record)
    record["starts"] = upstream.weights

    def make(seed: int) -> tuple[models.Network, method.Method]:
        network = models.rebuild(upstream.network, stage1 / "provenance.json")
        weights.load_weights(network, stage1 / f"seed{seed}.safetensors", upstream.weights.get(f"seed{seed}"))
        return network, method.load(training.method)(training.settings, opened.counts)

    with seal.training():
        title = f"calibrate {cell}"
        trained = train_seeds(p, training, title, make, data, scratch, late_epochs, own_streams, upstream.weights)
    if not distributed.is_first():
        return scratch
    write_costs("calibrate", cell, trained)
    written = write_seeds(trained, paths.classifier(*cell))
    checksums = {f"seed{seed}.safetensors": checksum for seed, checksum in written.items()}

    placed = {
        split: read_images(longtail, split, opened.dataset, opened.device, p.runtime.placement)
        for split in ("holdout", "test")
    }
    folder = paths.predictions(*cell)
    for seed, made in predict(p, trained, placed, cell).items():
        checksums[f"seed{seed}.npz"] = made.write(folder / f"seed{seed}.npz")
    record["predicted"] = {name: meta.checksums[name] for name in lineage.PREDICTED}
    files.write_json(folder / "provenance.json", record | distributed.record() | {"checksums": checksums})
    checkpoint.keep_only(scratch)
    return scratch


def own_streams(seed: int) -> int:
    """The seed of stage 2's random numbers: with that of stage 1 it would see the same images, augmented alike."""
    return draws.derive(seed, "stage 2")


def predict(
    p: params.Params, trained: dict[int, train.TrainedNetwork], placed: dict[str, store.Images], cell: CellName
) -> dict[int, predictions.Predictions]:
    """What each seed's network says of the held-out and the test split. Raises UserError for what is no number."""
    networks = [one.network for one in trained.values()]
    logits = {split: train.predict(networks, images, p.runtime) for split, images in placed.items()}
    labels = {split: images.labels.cpu().numpy() for split, images in placed.items()}
    for split, of_seeds in logits.items():
        for seed, found in zip(trained, of_seeds, strict=True):
            if not np.isfinite(found).all():
                raise errors.UserError(
                    f"{cell} seed {seed}: its {split} logits are not finite numbers: milder settings of "
                    f"{cell.classifier} usually help"
                )
    return {
        seed: predictions.Predictions(test, labels["test"], holdout, labels["holdout"])
        for seed, test, holdout in zip(trained, logits["test"], logits["holdout"], strict=True)
    }


if __name__ == "__main__":
    errors.run(main, goes_on=True)
