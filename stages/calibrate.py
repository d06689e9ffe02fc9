"""Stage 2: calibrate a classifier on a trained representation, once a seed; then predict the held-out and test splits.

The classifiers are trained and written before the test split is opened.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stages import paths
from stages.represent import HISTORY
from tailcal import (
    checkpoint,
    distributed,
    errors,
    files,
    method,
    models,
    params,
    provenance,
    settings,
    splits,
    store,
    train,
    weights,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--representation", required=True)
    parser.add_argument("--classifier", required=True)
    args = parser.parse_args()

    p = params.load()
    distributed.launch("stages.calibrate", p.runtime.processes)
    dataset = params.dataset(p, args.dataset)
    training = settings.training(p, args.dataset, args.classifier, "classifiers")
    device = train.prepare(p.runtime)
    longtail = paths.longtail(args.dataset)
    counts = torch.tensor(splits.read_meta(longtail)["train_counts"])
    data = store.Images(*splits.read_split(longtail, "train"), dataset.augmentation, device, p.runtime.placement)
    stage1 = paths.representation(args.dataset, args.representation)
    upstream = files.read_json(stage1 / "provenance.json")

    record = {
        "code": provenance.code_version(Path(__file__), Path(method.__file__).parent / f"methods/{args.classifier}.py"),
        "params": {
            "dataset": upstream["params"]["dataset"],
            "representation": upstream["params"]["representation"],
            "classifier": training.record(),
        },
        "data": upstream["data"],
        "device": device.type,
        "versions": provenance.versions(),
        "stage1": {key: upstream[key] for key in ("code", "device", "versions")},
    }
    starts = {seed: stage1 / f"seed{seed}.safetensors" for seed in p.seeds}
    depends = {**record, "starts": upstream["weights"]}
    scratch = (
        paths.SCRATCH
        / "calibrate"
        / f"{args.dataset}-{args.representation}-{args.classifier}"
        / checkpoint.fingerprint(depends)
    )

    networks, histories = {}, []
    out = paths.classifier(args.dataset, args.representation, args.classifier)
    for seed, start in starts.items():

        def make(start: Path = start) -> tuple[models.Network, method.Method]:
            network = models.build(**upstream["network"])
            weights.load_weights(network, start, upstream["weights"].get(start.stem))
            return network, method.load(args.classifier)(training.settings, counts)

        replica = train.Replica(
            f"calibrate {args.dataset}/{args.representation}/{args.classifier} seed {seed}",
            seed,
            make,
            scratch / f"seed{seed}.pt",
            training.recipe_key,
        )
        networks[seed], history = train.train(replica, data, training.recipe, p.runtime)
        if distributed.is_first():
            weights.save_weights(networks[seed], out / f"seed{seed}.safetensors")
        histories += history
    if not distributed.is_first():
        return
    files.write_text(
        out / "history.csv", pd.DataFrame(histories, columns=HISTORY).to_csv(index=False, float_format="%.6g")
    )

    placed = {
        split: store.Images(*splits.read_split(longtail, split), dataset.augmentation, device, p.runtime.placement)
        for split in ("holdout", "test")
    }
    predictions = paths.predictions(args.dataset, args.representation, args.classifier)
    for seed, network in networks.items():
        arrays = {}
        for split, images in placed.items():
            arrays[f"{split}_logits"] = train.predict(network, images)
            if not np.isfinite(arrays[f"{split}_logits"]).all():
                raise errors.UserError(
                    f"{args.dataset}/{args.representation}/{args.classifier} seed {seed}: its {split} logits are not "
                    f"finite numbers: milder settings of {args.classifier} usually help"
                )
            arrays[f"{split}_labels"] = images.labels.cpu().numpy()
        with files.atomic(predictions / f"seed{seed}.npz") as stream:
            np.savez(stream, **arrays)
    files.write_json(predictions / "provenance.json", record | distributed.record(p.runtime.sync_bn))
    checkpoint.keep_only(scratch)


if __name__ == "__main__":
    errors.run(main)
