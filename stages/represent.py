"""Stage 1: train a representation on the long-tailed training split, once a seed."""

import argparse
from pathlib import Path

import pandas as pd
import torch

from stages import paths
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
    provenance,
    seal,
    settings,
    splits,
    store,
    train,
    weights,
)
from tailcal.models.imagenet import load_pretrained

HISTORY = ["epoch", "seed", "lr", "loss", "train_accuracy"]


def weights_digest(dataset: params.Dataset) -> str:
    """SHA-256 of the data set's file of pretrained weights. Raises UserError when there is no such file."""
    path = Path(dataset.pretrained.file)
    if not path.is_file():
        raise errors.UserError(f"{dataset.key('pretrained.file')}: {path} is missing: put a file of weights there")
    return files.sha256(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--representation", required=True)
    args = parser.parse_args()

    p = params.load()
    distributed.launch("stages.represent", p.runtime.processes)
    cell = (args.dataset, args.representation)
    with lock.alone(
        paths.LOCKS, paths.representation(*cell), paths.costs("represent", *cell), paths.scratch("represent", *cell)
    ):
        represent(p, *cell)


@seal.training()
def represent(p: params.Params, dataset_name: str, representation: str, late_epochs: int = 0) -> Path:
    """Train every seed's network; write the weights, history.csv and provenance.json.

    Returns the folder of its checkpoints. With `late_epochs` (a diagnostic, named in the provenance) there is below it
    late/seed<k>/epoch<e>.safetensors, the network after each of the last so many epochs. Raises UserError.
    """
    dataset = params.dataset(p, dataset_name)
    training = settings.training(p, dataset_name, representation, "representations")
    device = train.prepare(p.runtime, p.precision)
    meta = splits.read_meta(paths.longtail(dataset_name))
    counts = torch.tensor(meta["train_counts"])
    split = splits.read_split(paths.longtail(dataset_name), "train")
    data = store.Images(*split, dataset.augmentation, device, p.runtime.placement)

    network_record = {"backbone": training.backbone, "channels": data.channels, "num_classes": len(counts)}
    begins = {}
    if training.pretrained:
        network_record["trains"] = training.pretrained.trains
        begins["pretrained"] = weights_digest(dataset)
    record = {
        "code": provenance.code_version("stages.represent", method.module(training.method)),
        "params": {
            "dataset": {
                "source": meta["source"],
                "imbalance": dataset.imbalance.record(),
                "holdout_per_class": dataset.holdout_per_class,
            },
            "representation": training.record() | {"precision": p.precision},
        },
        "data": {name: digest for name, digest in meta["checksums"].items() if name.startswith("train")} | begins,
        "device": device.type,
        "versions": provenance.versions(),
    }
    if late_epochs:
        record["diagnostics"] = {"late_epochs": late_epochs}
    out = paths.representation(dataset_name, representation)
    scratch = paths.scratch("represent", dataset_name, representation) / checkpoint.fingerprint(record)

    Method = method.load(training.method)

    def make() -> tuple[models.Network, method.Method]:
        network = models.build(**network_record, head="linear")
        if training.pretrained:
            load_pretrained(network.backbone, Path(training.pretrained.file))
        return network, Method(training.settings, counts)

    replicas = [
        train.Replica(
            f"represent {dataset_name}/{representation} seed {seed}",
            seed,
            make,
            scratch / f"seed{seed}.pt",
            training.recipe_key,
            train.Late(scratch / f"late/seed{seed}", late_epochs) if late_epochs else None,
        )
        for seed in p.seeds
    ]
    trained = dict(zip(p.seeds, train.train(replicas, data, training.recipe, p.runtime, p.precision), strict=True))
    if not distributed.is_first():
        return scratch
    written = {f"seed{s}": weights.save_weights(t.network, out / f"seed{s}.safetensors") for s, t in trained.items()}
    history = pd.DataFrame([epoch for one in trained.values() for epoch in one.history], columns=HISTORY)
    files.write_text(out / "history.csv", history.to_csv(index=False, float_format="%.6g"))
    made = {"network": network_record | {"head": Method.head}, "weights": written}
    files.write_json(out / "provenance.json", record | distributed.record(p.runtime.sync_bn) | made)
    costs.write(
        paths.costs("represent", dataset_name, representation),
        train.machine(device),
        data.placement,
        p.runtime.replicas,
        {seed: one.cost for seed, one in trained.items()},
    )
    checkpoint.keep_only(scratch)
    return scratch


if __name__ == "__main__":
    errors.run(main)
