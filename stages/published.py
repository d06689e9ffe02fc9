"""Train and measure the cells of the published tables, and write metrics/published/cells, a file a cell.

What is trained, published/params.yaml says. The stages are those of the pipeline, run here one after the other in a
folder of their own, data/published, so that the results of the grid are left alone. A run that is interrupted goes on
where it was. It stands outside the pipeline: see published/dvc.yaml.
"""

import argparse
import base64
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from stages import paths, workspace
from stages.calibrate import calibrate, read_upstream
from stages.download import download
from stages.evaluate import evaluate, read_classes
from stages.represent import represent
from stages.subsample import subsample
from tailcal import (
    errors,
    files,
    lock,
    params,
    plan,
    predict,
    predictions,
    provenance,
    settings,
    sources,
    splits,
    store,
    train,
)
from tailcal.metrics.cell import measure, over_seeds

WORKSPACE = Path("data/published")
OFFICIAL = {"cifar10": 5000, "cifar100": 500}  # training images a class in the official archives


def from_folder(dataset: params.Dataset, images: Path) -> params.Dataset:
    """The same data set, with its images from a folder `images`/<kind> instead of the official archive.

    The training split there may hold less than all images: the long tail is cut as if the largest class were whole.
    Raises UserError for a data set that has no official archive.
    """
    kind = dataset.source["kind"]
    if kind not in OFFICIAL:
        raise errors.UserError(f"{dataset.key('source.kind')}: is {kind}, which --images cannot take the place of")
    place = {"kind": "folder", "path": str(images / kind), "size": 32, "channels": 3}
    largest = dataset.imbalance.largest or OFFICIAL[kind]
    changed = dataset.model_copy(
        update={"source": place, "imbalance": dataset.imbalance.model_copy(update={"largest": largest})}
    )
    changed._file, changed._block = Path(f"--images {images}"), ""  # where an error line says that the keys come from
    return changed


def listing(config: sources.Source) -> str | None:
    """A digest of the names, sizes and times of a folder's files, so that a change of them is seen; None elsewhere."""
    if config.kind != "folder":
        return None
    digest = hashlib.sha256()
    for path in sorted(config.folder("path").rglob("*")):
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def prepare(p: params.Params, name: str) -> None:
    """Download and subsample a data set, unless the same code has done so from the same block, and it is all there."""
    dataset = params.dataset(p, name)
    config = sources.configure(dataset)
    made = {
        "code": provenance.code_version("stages.download", "stages.subsample", sources.module(config.kind)),
        "source": config.model_dump(mode="json"),
        "listing": listing(config),
        "imbalance": dataset.imbalance.record(),
        "holdout_per_class": dataset.holdout_per_class,
    }
    stamp = paths.SCRATCH / "prepared" / f"{name}.json"
    if stamp.exists() and files.read_json(stamp) == made and whole(paths.longtail(name)):
        return
    with lock.alone(paths.LOCKS, paths.raw(name), paths.longtail(name), paths.scratch("pack", name)):
        download(name, config)
        subsample(name, dataset)
        files.write_json(stamp, made)


def whole(longtail: Path) -> bool:
    """Whether a data set's splits are all there with the checksums that they were written with."""
    try:
        for name, checksum in splits.read_meta(longtail)["checksums"].items():
            files.verify(longtail / name, checksum)
    except errors.UserError:
        return False
    return True


def best_on_test(p: params.Params, where: dict[str, str], folder: Path) -> dict[str, Any]:
    """What the best of the late epochs would have been reported as: a mean over seeds, each at its own best epoch.

    folder: checkpoints of stage 1 or 2, with late/seed<k>/epoch<e>.safetensors below it. The epoch is chosen by top-1
    on the test split, as the published codes do it, so this says nothing about new images. Raises UserError when the
    late epochs are no longer there.
    """
    longtail = paths.longtail(where["dataset"])
    _, counts = read_classes(longtail)
    network = read_upstream(paths.representation(where["dataset"], where["representation"]) / "provenance.json")[
        "network"
    ]
    training = settings.training(p, where["dataset"], where["classifier"], "classifiers")
    block = training.settings.model_dump()
    dataset = params.dataset(p, where["dataset"])
    images, labels = splits.read_split(longtail, "test")
    data = store.Images(
        images, labels, dataset.augmentation, train.prepare(p.runtime, p.precision), p.runtime.placement
    )
    best = []
    for seed in p.seeds:
        late = sorted((folder / f"late/seed{seed}").glob("epoch*.safetensors"))
        if not late:
            raise errors.UserError(
                f"{folder}/late/seed{seed} has no late epochs any more: delete {folder} to train again"
            )
        networks = []
        for path in late:
            networks.append(predict.build(network, training.method, block, counts.tolist(), path))
            networks[-1].load_state_dict(load_file(path))
        logits = train.predict(networks, data, p.runtime)
        best.append(
            max((measure(one, labels, counts, p.evaluate.bins) for one in logits), key=lambda numbers: numbers["top1"])
        )
    numbers = over_seeds(best)
    return {"epochs": len(late)} | {key: numbers[key] for key in ("top1", "top1_std", "ece", "ece_std")}


def compose(p: params.Params, where: dict[str, str], late: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that is kept of a cell."""
    numbers = files.read_json(paths.metrics(**where))
    meta = splits.read_meta(paths.longtail(where["dataset"]))
    made = paths.representation(where["dataset"], where["representation"])
    checksums = files.read_json(paths.predictions(**where) / "provenance.json")["checksums"]
    correct = {}
    for seed in p.seeds:
        name = f"seed{seed}.npz"
        run = predictions.read(paths.predictions(**where) / name, checksums[name], len(meta["class_names"]))
        hits = run.test_logits.argmax(axis=1) == run.test_labels
        correct[str(seed)] = base64.b64encode(np.packbits(hits).tobytes()).decode()
    stage1, stage2 = (
        files.read_json(paths.costs(*cell))
        for cell in (
            ("represent", where["dataset"], where["representation"]),
            ("calibrate", *where.values()),
        )
    )
    seconds = [sum(one["seeds"][str(seed)]["seconds"] for one in (stage1, stage2)) for seed in p.seeds]
    training = settings.training(p, where["dataset"], where["representation"], "representations")
    return numbers | {
        "data": {
            "train_images": sum(meta["train_counts"]),
            "official": meta["source"]["kind"] in OFFICIAL,
            "test_split": {name: meta["checksums"][name] for name in ("test_images.npy", "test_labels.npy")},
        },
        "backbone": training.backbone,
        "epochs": len(set(_epochs(made / "history.csv"))),
        "cost": {
            "machine": stage1["machine"]["name"],
            "seconds": round(sum(seconds) / len(seconds), 1),
            "at_once": stage1["at_once"],
        },
        "best_on_test": late,
        "test_images": len(run.test_labels),
        "correct": correct,
    }


def _epochs(history: Path) -> list[str]:
    return [line.split(",")[0] for line in history.read_text().splitlines()[1:]]


def cells(
    p: params.Params, late_epochs: int, dataset: str, representation: str, classifiers: list[str], out: Path
) -> None:
    """Train a representation and its classifiers, measure them, and write a file each below `out`."""
    prepare(p, dataset)
    pair = (dataset, representation)
    with lock.alone(paths.LOCKS, paths.representation(*pair), paths.scratch("represent", *pair)):
        stage1 = represent(p, *pair, late_epochs)
    for classifier in classifiers:
        cell = (*pair, classifier)
        where = dict(zip(("dataset", "representation", "classifier"), cell, strict=True))
        chosen = settings.training(p, dataset, classifier, "classifiers")
        outputs = [paths.classifier(*cell), paths.predictions(*cell), paths.metrics(*cell)]
        with lock.alone(paths.LOCKS, *outputs, paths.scratch("calibrate", *cell)):
            stage2 = calibrate(p, *cell, late_epochs)
            evaluate(p, where)
            late = None
            if late_epochs and (
                chosen.recipe or chosen.method == "joint"
            ):  # the others take no step, and have no epochs
                late = best_on_test(p, where, stage2 if chosen.recipe else stage1)
            files.write_json(out / dataset / representation / f"{classifier}.json", compose(p, where, late))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.published", description=__doc__)
    parser.add_argument("--table", action="append", help="only this table, or these (all)")
    parser.add_argument("--dataset", action="append", help="only this data set of them, or these (all)")
    parser.add_argument("--representation", action="append", help="only this representation of them, or these (all)")
    parser.add_argument("--missing", action="store_true", help="leave out the cells that are there already")
    parser.add_argument(
        "--images",
        type=Path,
        help="take the images from IMAGES/cifar10 and IMAGES/cifar100, each train/<class>/ and test/<class>/, instead "
        "of the official archives; the subset is then not the published image list, and the tables say so",
    )
    args = parser.parse_args()

    chosen, p = plan.load(params.load())
    for name in args.table or []:
        if name not in chosen.tables:
            raise errors.UserError(f"--table {name}: there is none of that name: there are {', '.join(chosen.tables)}")
    out = paths.PUBLISHED.resolve()
    asked: dict[tuple[str, str, int], list[str]] = {}  # (data set, representation, late epochs): classifiers
    for name in args.table or chosen.tables:
        table = chosen.tables[name]
        for dataset, representation, classifiers in table.cells():
            if dataset in (args.dataset or [dataset]) and representation in (args.representation or [representation]):
                asked.setdefault((dataset, representation, table.late_epochs), []).extend(classifiers)
    for (dataset, representation, _), classifiers in asked.items():
        settings.training(p, dataset, representation, "representations")
        for classifier in classifiers:
            settings.training(p, dataset, classifier, "classifiers")
    if not asked:
        known = sorted({name for table in chosen.tables.values() for name, _, _ in table.cells()})
        raise errors.UserError(f"no table has such a data set and representation: the data sets are {', '.join(known)}")
    if args.images:
        images = args.images.resolve()
        changed = {name: from_folder(params.dataset(p, name), images) for name, _, _ in asked}
        p = p.model_copy(update={"datasets": p.datasets | changed})

    written = 0
    with workspace.inside(WORKSPACE):
        for (dataset, representation, late_epochs), classifiers in asked.items():
            todo = [
                name
                for name in dict.fromkeys(classifiers)
                if not (args.missing and (out / dataset / representation / f"{name}.json").exists())
            ]
            if todo:
                try:
                    cells(p, late_epochs, dataset, representation, todo, out)
                except errors.UserError as error:
                    raise errors.UserError(f"{error} (in {WORKSPACE}, by `python -m stages.published`)") from None
            written += len(todo)
    print(f"{paths.PUBLISHED}: {written} cells written; `python -m stages.tables` makes the tables")


if __name__ == "__main__":
    errors.run(main)
