"""Stage 1: train a representation on the long-tailed training split, once per seed."""

from pathlib import Path

from stages import paths, processes
from stages.seeds import open_training, train_seeds, write_costs, write_seeds
from tailcal import (
    checkpoint,
    distributed,
    errors,
    files,
    lock,
    method,
    models,
    params,
    provenance,
    seal,
    splits,
    train,
    weights,
)
from tailcal.models.imagenet import load_pretrained


def main() -> None:
    parser = errors.CommandLine("stages.represent", __doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--representation", required=True)
    args = parser.parse_args()

    p = params.load()
    processes.launch("stages.represent", p.runtime.processes)
    cell = (args.dataset, args.representation)
    with lock.alone(paths.LOCKS, *outputs(*cell)):
        represent(p, *cell)


def outputs(*cell: str) -> list[Path]:
    """What a training of this data set and representation writes, its unfinished work included."""
    return [paths.representation(*cell), paths.costs("represent", *cell), paths.scratch("represent", *cell)]


@seal.training()
def represent(p: params.Params, dataset_name: str, representation: str, late_epochs: int = 0) -> Path:
    """Train every seed's network; write the weights, history.csv and provenance.json.

    Returns the folder of its checkpoints. With `late_epochs` (a diagnostic, named in the provenance) there is below it
    late/seed<k>/epoch<e>.safetensors, the network after each of the last so many epochs. Raises UserError.
    """
    opened = open_training(p, dataset_name, representation, "representations")
    training, meta, data = opened.training, opened.meta, opened.data

    network_record = {"backbone": training.backbone, "channels": data.channels, "num_classes": len(opened.counts)}
    begins = {}
    if training.pretrained:
        network_record["trains"] = training.pretrained.trains
        begins["pretrained"] = weights.pretrained_digest(opened.dataset)
    record = {
        "code": provenance.code_version("stages.represent", method.module(training.method)),
        "params": {
            "dataset": splits.record(opened.dataset),
            "representation": training.record(p.precision),
        },
        "data": {name: digest for name, digest in meta.checksums.items() if name.startswith("train")} | begins,
        "device": train.described(opened.device),
        "versions": provenance.versions(),
    }
    if late_epochs:
        record["diagnostics"] = {"late_epochs": late_epochs}
    scratch = paths.scratch("represent", dataset_name, representation) / checkpoint.fingerprint(record)

    Method = method.load(training.method)

    def make(_: int) -> tuple[models.Network, method.Method]:
        network = models.build(**network_record, head="linear")
        if training.pretrained:
            load_pretrained(network.backbone, Path(training.pretrained.file))
        return network, Method(training.settings, opened.counts)

    title = f"represent {dataset_name}/{representation}"
    trained = train_seeds(p, training, title, make, data, scratch, late_epochs)
    if not distributed.is_first():
        return scratch
    write_costs("represent", (dataset_name, representation), trained)
    out = paths.representation(dataset_name, representation)
    made = {
        "network": network_record | {"head": Method.head},
        "weights": {f"seed{seed}": checksum for seed, checksum in write_seeds(trained, out).items()},
        "history": files.sha256(out / "history.csv"),
    }
    files.write_json(out / "provenance.json", record | distributed.record() | made)
    checkpoint.keep_only(scratch)
    return scratch


if __name__ == "__main__":
    errors.run(main, goes_on=True)
