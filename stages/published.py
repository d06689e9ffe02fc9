"""Train and measure the cells of the published tables, and write metrics/published/cells, one file a cell and seed.

What is trained, published/params.yaml says. The stages are those of the pipeline, run here one after the other in a
folder of their own, data/published, so that the results of the grid are left alone. A run that is interrupted goes on
where it was. It stands outside the pipeline: see published/dvc.yaml.
"""

from collections.abc import Iterable
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from stages import official, paths, processes, workspace
from stages.seeds import read_images
from tailcal import (
    costs,
    distributed,
    errors,
    files,
    lineage,
    measured,
    method,
    models,
    params,
    plan,
    posthoc,
    predictions,
    settings,
    sources,
    splits,
    train,
    weights,
)
from tailcal.cell import CellName
from tailcal.metrics.accuracy import top1
from tailcal.metrics.calibration import ece
from tailcal.metrics.cell import Numbers, measure, rounded
from tailcal.metrics.scores import softmax

WORKSPACE = Path("data/published")


def late_of(folder: Path, seed: int) -> list[Path]:
    """A seed's late epochs below the folder of its checkpoints, the earliest first. Raises UserError without any."""
    late = list((folder / f"late/seed{seed}").glob("epoch*.safetensors"))
    if not late:
        raise errors.UserError(f"{folder}/late/seed{seed} has no late epochs any more: delete {folder} to train again")
    return sorted(late, key=lambda path: int(path.stem.removeprefix("epoch")))


def best_on_test(p: params.Params, cell: CellName, folder: Path) -> dict[int, dict[str, Any]]:
    """What each seed would have been reported as at the best of its late epochs.

    folder: checkpoints of stage 1 or 2, with late/seed<k>/epoch<e>.safetensors below it. The epoch is chosen by top-1
    on the test split, the first of equals, as the published codes do it, so this says nothing about new images.
    `posthoc` has the same after each rule that needs no held-out data, at the epoch that is best after that rule.
    ece_least and ece_most are of any of the late epochs.
    Raises UserError when the late epochs are no longer there, or are damaged.
    """
    longtail = paths.longtail(cell.dataset)
    counts = np.array(splits.read_meta(longtail).train_counts)
    stage1 = paths.representation(*cell[:2])
    record = lineage.read_represented(stage1).network
    training = settings.training(p, cell.dataset, cell.classifier, "classifiers")
    block = training.settings.model_dump()
    dataset = params.dataset(p, cell.dataset)
    data = read_images(longtail, "test", dataset, train.prepare(p.runtime, p.precision), p.runtime.placement)
    labels = data.labels.cpu().numpy()
    nothing = posthoc.Holdout(counts, np.empty((0, len(counts))), np.empty(0, dtype=np.int64))
    rules = posthoc.fit(posthoc.configure(p.evaluate.posthoc), nothing)
    found = {}
    for seed in p.seeds:
        late = late_of(folder, seed)
        networks = []
        for path in late:
            network = models.rebuild(record, stage1 / "provenance.json")
            networks.append(method.set_up(network, training.method, block, counts.tolist(), path))
            weights.read_weights(networks[-1], path, f"delete {folder} to train again")
        logits = train.predict(networks, data, p.runtime)
        found[seed] = (
            {"epochs": len(late)}
            | best_epoch(logits, labels, p.evaluate.bins)
            | {
                "posthoc": {
                    name: best_epoch([rule(one) for one in logits], labels, p.evaluate.bins)
                    for name, rule in rules.items()
                }
            }
        )
    return found


def best_epoch(logits: Iterable[np.ndarray], labels: np.ndarray, bins: int) -> Numbers:
    """Top-1 and ECE at the epoch of the highest top-1, and the range of the ECE; `logits` has one [N, K] an epoch."""
    epochs = [{"top1": top1(one, labels), "ece": ece(softmax(one), labels, bins)} for one in logits]
    every = [epoch["ece"] for epoch in epochs]
    return rounded(max(epochs, key=itemgetter("top1")) | {"ece_least": min(every), "ece_most": max(every)})


def compose(p: params.Params, cell: CellName, seed: int, late: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that is kept of a cell's seed."""
    meta = splits.read_meta(paths.longtail(cell.dataset))
    counts = np.array(meta.train_counts)
    provenance = files.read_json(paths.predictions(*cell) / "provenance.json")
    name = f"seed{seed}.npz"
    run = predictions.read(paths.predictions(*cell) / name, provenance.pop("checksums")[name], len(counts))
    rules = posthoc.configure(p.evaluate.posthoc)
    holdout = posthoc.Holdout(counts, run.holdout_logits, run.holdout_labels)

    def numbers(logits: np.ndarray) -> dict[str, Any]:
        correct = measured.pack(logits.argmax(axis=1) == run.test_labels)
        return rounded(measure(logits, run.test_labels, counts, p.evaluate.bins)) | {"correct": correct}

    history = pd.read_csv(paths.representation(*cell[:2]) / "history.csv")
    cost = costs.read(paths.costs("represent", *cell[:2]))[seed]
    stage1 = files.read_json(paths.representation(*cell[:2]) / "provenance.json")
    provenance["starts"] = {f"seed{seed}": provenance["starts"][f"seed{seed}"]}
    provenance["stage1"] |= {"processes": stage1["processes"]} if "processes" in stage1 else {}
    training = settings.training(p, cell.dataset, cell.representation, "representations")
    return numbers(run.test_logits) | {
        "posthoc": {
            name: numbers(rule(run.test_logits))
            | rounded(rule.numbers)
            | {"transductive": posthoc.RULES[name].transductive}
            for name, rule in posthoc.fit(rules, holdout).items()
        },
        "best_on_test": late,
        "seed": seed,
        "data": {
            "train_images": sum(meta.train_counts),
            "official": sources.official(meta.source["kind"]),
            "trained_on": meta.duplicates["test"],
            "test_split": {name: meta.checksums[name] for name in ("test_images.npy", "test_labels.npy")},
        },
        "backbone": training.backbone,
        "precision": p.precision,
        "epochs": history["epoch"].nunique(),
        "test_images": sum(meta.test_counts),
        "cost": {
            "machine": cost.machine["name"],
            "seconds": round(workspace.seconds(cell, seed), 1),
            "at_once": cost.at_once,
        },
        "provenance": provenance | {"evaluate": p.evaluate.model_dump()},
    }


def has_epochs(classifier: settings.Training) -> bool:
    """Whether it has late epochs: of those that take no step only `joint` has, those of stage 1."""
    return bool(classifier.recipe) or classifier.method == "joint"


def cells(
    p: params.Params, late_epochs: int, dataset: str, representation: str, seeds_of: dict[str, list[int]], out: Path
) -> None:
    """Train a representation and classifiers of it, `seeds_of` each, measure them, and write a file for each seed of
    each below `out`."""
    together = [seed for seed in p.seeds if seed in chain.from_iterable(seeds_of.values())]
    stage1 = workspace.run_stage1(p.model_copy(update={"seeds": together}), dataset, representation, late_epochs)
    for classifier, seeds in seeds_of.items():
        own, cell = p.model_copy(update={"seeds": seeds}), CellName(dataset, representation, classifier)
        with workspace.run_stage2(own, cell, late_epochs) as stage2:
            if not distributed.is_first():
                continue
            chosen, late = settings.training(own, dataset, classifier, "classifiers"), {}
            if late_epochs and has_epochs(chosen):
                late = best_on_test(own, cell, stage2 if chosen.recipe else stage1)
            for seed in seeds:
                file = measured.run_file(out, cell, seed)
                files.remove_leftovers(file)  # those of a run that was killed
                files.write_json(file, compose(own, cell, seed, late.get(seed)))


def main() -> None:
    parser = errors.CommandLine("stages.published", __doc__)
    parser.add_argument("--table", action="append", help="only this table, or these (all)")
    parser.add_argument("--dataset", action="append", help="only this data set of them, or these (all)")
    parser.add_argument("--representation", action="append", help="only this representation of them, or these (all)")
    parser.add_argument("--classifier", action="append", help="only this classifier of them, or these (all)")
    parser.add_argument("--missing", action="store_true", help="leave out what is there already, complete")
    parser.add_argument("--seed", action="append", help="only this seed of the plan, or these (all)")
    parser.add_argument("--precision", choices=get_args(params.Precision), help="of training (that of params.yaml)")
    official.accept_images(parser)
    args = parser.parse_args()

    chosen, p = plan.load(params.load())
    p = plan.narrowed(p, args.seed, args.precision)
    processes.launch("stages.published", p.runtime.processes)
    # What this machine cannot do is refused before anything is downloaded.
    train.prepare(p.runtime, p.precision, *(["--precision"] if args.precision else []))
    asked = plan.select(chosen, args.table, args.dataset, args.representation, args.classifier)
    for (dataset, representation, _), classifiers in asked.items():
        settings.training(p, dataset, representation, "representations")
        for classifier in classifiers:
            settings.training(p, dataset, classifier, "classifiers")
    planned = p
    p, instead = official.with_images(p, (name for name, _, _ in asked), args.images)

    kept = [seed for seed in chosen.seeds if args.missing or seed not in p.seeds]

    def lacking(cell: CellName, late_epochs: int) -> list[int]:
        """The seeds of a cell that are to be trained. Raises UserError when those that are kept do not go with them."""
        runs = measured.read_runs(paths.PUBLISHED, cell, kept)
        official.require_planned(runs, planned)
        with_best = late_epochs and has_epochs(settings.training(p, cell.dataset, cell.classifier, "classifiers"))
        complete = {run.seed for run in runs.values() if run.best_on_test or not with_best}
        seeds = [seed for seed in p.seeds if seed not in complete]
        if seeds or args.precision:
            source = params.dataset(p, cell.dataset).source["kind"]
            measured.require_alike(cell, runs, p.precision, sources.official(source))
        return seeds

    todo = {
        (dataset, representation, late_epochs): {
            classifier: seeds
            for classifier in classifiers
            if (seeds := lacking(CellName(dataset, representation, classifier), late_epochs))
        }
        for (dataset, representation, late_epochs), classifiers in asked.items()
    }
    workspace.wait()  # all have read what is there, which the first will add to

    out, written = paths.PUBLISHED.resolve(), 0
    with workspace.inside(WORKSPACE):
        for (dataset, representation, late_epochs), seeds_of in todo.items():
            if seeds_of:
                workspace.prepare(p, dataset, instead.get(dataset))
                cells(p, late_epochs, dataset, representation, seeds_of, out)
            written += len(seeds_of)
    if distributed.is_first():
        print(f"{paths.PUBLISHED}: cells written: {written}; `python -m stages.tables` makes the tables")


if __name__ == "__main__":
    errors.run(main, goes_on=True)
