"""Stage 1: train a representation on the long-tailed training split, once a seed."""

import argparse
from pathlib import Path

import pandas as pd
import torch

from stages import paths
from tailcal import checkpoint, errors, files, method, models, params, provenance, settings, splits, train, weights

HISTORY = ["epoch", "seed", "lr", "loss", "train_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--representation", required=True)
    args = parser.parse_args()

    p = params.load()
    dataset = params.dataset(p, args.dataset)
    training = settings.training(p, args.dataset, args.representation, "representations")
    device = train.prepare(p.runtime)
    meta = splits.read_meta(paths.longtail(args.dataset))
    counts = torch.tensor(meta["train_counts"])
    data = train.Images.place(*splits.read_split(paths.longtail(args.dataset), "train"), dataset.augmentation, device)

    record = {
        "code": provenance.code_version(
            Path(__file__), Path(method.__file__).parent / f"methods/{args.representation}.py"
        ),
        "params": {
            "dataset": dataset.model_dump(include={"source", "imbalance", "holdout_per_class"}),
            "representation": training.record(),
        },
        "data": {name: digest for name, digest in meta["checksums"].items() if name.startswith("train")},
        "device": device.type,
        "versions": provenance.versions(),
    }
    out = paths.representation(args.dataset, args.representation)
    scratch = paths.SCRATCH / "represent" / f"{args.dataset}-{args.representation}" / checkpoint.fingerprint(record)

    Method = method.load(args.representation)
    network_record = {"backbone": training.backbone, "channels": data.images.shape[1], "num_classes": len(counts)}

    def make() -> tuple[models.Network, method.Method]:
        return models.build(**network_record, head="linear"), Method(training.settings, counts)

    histories, written = [], {}
    for seed in p.seeds:
        replica = train.Replica(
            f"represent {args.dataset}/{args.representation} seed {seed}", seed, make, scratch / f"seed{seed}.pt"
        )
        network, history = train.train(replica, data, training.recipe, device, p.runtime.checkpoint_seconds)
        weights.save_weights(network, out / f"seed{seed}.safetensors")
        written[f"seed{seed}"] = files.sha256(out / f"seed{seed}.safetensors")
        histories += history
    files.write_text(
        out / "history.csv", pd.DataFrame(histories, columns=HISTORY).to_csv(index=False, float_format="%.6g")
    )
    files.write_json(
        out / "provenance.json", record | {"network": network_record | {"head": Method.head}, "weights": written}
    )
    checkpoint.keep_only(scratch)


if __name__ == "__main__":
    errors.run(main)
