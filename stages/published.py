"""Train and measure the cells of the published tables, and write metrics/published/cells, one file per cell.

What is trained, published/params.yaml says. The stages are those of the pipeline, run here one after the other in a
folder of their own, data/published, so that the results of the grid are left alone. A run that is interrupted goes on
where it was. It stands outside the pipeline: see published/dvc.yaml.
"""

import argparse
from collections.abc import Callable
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from stages import paths, workspace
from stages.calibrate import read_upstream
from stages.evaluate import read_classes
from tailcal import (
    errors,
    files,
    params,
    plan,
    posthoc,
    predict,
    predictions,
    published,
    settings,
    splits,
    store,
    train,
    weights,
)
from tailcal.metrics.accuracy import top1
from tailcal.metrics.calibration import ece
from tailcal.metrics.cell import DIGITS, Numbers, over_seeds
from tailcal.metrics.scores import softmax
from tailcal.plan import AS_TRAINED

WORKSPACE = Path("data/published")


def late_of(folder: Path, seed: int) -> list[Path]:
    """A seed's late epochs below the folder of its checkpoints, the earliest first. Raises UserError without any."""
    late = list((folder / f"late/seed{seed}").glob("epoch*.safetensors"))
    if not late:
        raise errors.UserError(f"{folder}/late/seed{seed} has no late epochs any more: delete {folder} to train again")
    return sorted(late, key=lambda path: int(path.stem.removeprefix("epoch")))


def best_on_test(p: params.Params, where: dict[str, str], folder: Path) -> dict[str, Any]:
    """What the best of the late epochs would have been reported as: a mean over seeds, each at its own best epoch.

    folder: checkpoints of stage 1 or 2, with late/seed<k>/epoch<e>.safetensors below it. The epoch is chosen by top-1
    on the test split, the first of equals, as the published codes do it, so this says nothing about new images.
    `posthoc` has the same after each rule that needs no held-out data, at the epoch that is best after that rule.
    ece_least and ece_most are of any of those epochs and of any seed.
    Raises UserError when the late epochs are no longer there, or are damaged.
    """
    longtail = paths.longtail(where["dataset"])
    _, counts = read_classes(longtail)
    stage1 = read_upstream(paths.representation(where["dataset"], where["representation"]) / "provenance.json")
    training = settings.training(p, where["dataset"], where["classifier"], "classifiers")
    block = training.settings.model_dump()
    dataset = params.dataset(p, where["dataset"])
    images, labels = splits.read_split(longtail, "test")
    data = store.Images(
        images, labels, dataset.augmentation, train.prepare(p.runtime, p.precision), p.runtime.placement
    )
    rules = fitted(p, counts, np.empty((0, len(counts))), np.empty(0, dtype=np.int64))
    best: dict[str, list[Numbers]] = {rule: [] for rule in rules}
    every_ece: dict[str, list[float]] = {rule: [] for rule in rules}
    for seed in p.seeds:
        late = late_of(folder, seed)
        networks = []
        for path in late:
            networks.append(predict.build(stage1["network"], training.method, block, counts.tolist(), path))
            weights.read_weights(networks[-1], path, f"delete {folder} to train again")
        logits = train.predict(networks, data, p.runtime)
        for rule, apply in rules.items():
            epochs = [apply(one) for one in logits]
            numbers = [{"top1": top1(one, labels), "ece": ece(softmax(one), labels, p.evaluate.bins)} for one in epochs]
            best[rule].append(max(numbers, key=itemgetter("top1")))
            every_ece[rule] += [epoch["ece"] for epoch in numbers]
    summary = {
        rule: over_seeds(runs)
        | {"ece_least": round(min(every_ece[rule]), DIGITS), "ece_most": round(max(every_ece[rule]), DIGITS)}
        for rule, runs in best.items()
    }
    return {"epochs": len(late)} | summary.pop(AS_TRAINED) | {"posthoc": summary}


def fitted(
    p: params.Params, counts: np.ndarray, holdout_logits: np.ndarray, holdout_labels: np.ndarray
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What makes test logits those after each post-hoc rule, by its name, and AS_TRAINED, which leaves them alone.

    The hold-out may be empty: rules that need one are left out then.
    """
    return {AS_TRAINED: lambda logits: logits} | {
        name: posthoc.RULES[name].fit(config, counts, holdout_logits, holdout_labels)
        for name, config in posthoc.configure(p.evaluate.posthoc).items()
        if len(holdout_labels) or not posthoc.RULES[name].needs_holdout(config)
    }


def compose(p: params.Params, where: dict[str, str], late: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that is kept of a cell."""
    numbers = files.read_json(paths.metrics(**where))
    meta = splits.read_meta(paths.longtail(where["dataset"]))
    checksums = files.read_json(paths.predictions(**where) / "provenance.json")["checksums"]
    counts = np.array(meta["train_counts"])
    correct: dict[str, dict[str, str]] = {}
    for seed in p.seeds:
        name = f"seed{seed}.npz"
        run = predictions.read(paths.predictions(**where) / name, checksums[name], len(counts))
        for rule, apply in fitted(p, counts, run.holdout_logits, run.holdout_labels).items():
            hits = apply(run.test_logits).argmax(axis=1) == run.test_labels
            correct.setdefault(rule, {})[str(seed)] = published.pack(hits)
    for rule, after in numbers["posthoc"].items():
        after["correct"] = correct[rule]
    history = pd.read_csv(paths.representation(where["dataset"], where["representation"]) / "history.csv")
    cost = files.read_json(paths.costs("represent", where["dataset"], where["representation"]))
    training = settings.training(p, where["dataset"], where["representation"], "representations")
    return numbers | {
        "data": {
            "train_images": sum(meta["train_counts"]),
            "official": meta["source"]["kind"] in workspace.OFFICIAL,
            "test_split": {name: meta["checksums"][name] for name in ("test_images.npy", "test_labels.npy")},
        },
        "backbone": training.backbone,
        "precision": p.precision,
        "epochs": history["epoch"].nunique(),
        "cost": {
            "machine": cost["machine"]["name"],
            "seconds": round(workspace.seconds(p, where), 1),
            "at_once": cost["at_once"],
        },
        "best_on_test": late,
        "test_images": sum(meta["test_counts"]),
        "correct": correct[AS_TRAINED],
    }


def has_epochs(classifier: settings.Training) -> bool:
    """Whether it has late epochs: of those that take no step only `joint` has, those of stage 1."""
    return bool(classifier.recipe) or classifier.method == "joint"


def cells(
    p: params.Params, late_epochs: int, dataset: str, representation: str, classifiers: list[str], out: Path
) -> None:
    """Train a representation and its classifiers, measure them, and write a file each below `out`."""
    workspace.prepare(p, dataset)
    stage1 = workspace.run_stage1(p, dataset, representation, late_epochs)
    for classifier in classifiers:
        where = {"dataset": dataset, "representation": representation, "classifier": classifier}
        with workspace.run_stage2(p, where, late_epochs) as stage2:
            chosen, late = settings.training(p, dataset, classifier, "classifiers"), None
            if late_epochs and has_epochs(chosen):
                late = best_on_test(p, where, stage2 if chosen.recipe else stage1)
            cell = out / dataset / representation / f"{classifier}.json"
            files.remove_leftovers(cell)  # those of a run that was killed
            files.write_json(cell, compose(p, where, late))


def select(
    chosen: plan.Plan, tables: list[str] | None, datasets: list[str] | None, representations: list[str] | None
) -> dict[tuple[str, str, int], list[str]]:
    """{(data set, representation, late epochs): classifiers} of what is asked for; None asks for all of its kind.

    Raises UserError for a table that is not there, and when nothing is left.
    """
    for name in tables or []:
        if name not in chosen.tables:
            raise errors.UserError(f"--table {name}: there is none of that name: there are {', '.join(chosen.tables)}")
    asked: dict[tuple[str, str, int], list[str]] = {}
    for name in tables or chosen.tables:
        table = chosen.tables[name]
        for dataset, representation, classifiers in table.cells():
            if dataset in (datasets or [dataset]) and representation in (representations or [representation]):
                asked.setdefault((dataset, representation, table.late_epochs), []).extend(classifiers)
    if not asked:
        cells_of = (chosen.tables[name].cells() for name in tables or chosen.tables)
        pairs = sorted({f"{dataset}/{representation}" for dataset, representation, _ in chain.from_iterable(cells_of)})
        raise errors.UserError(
            f"--dataset, --representation: none of these tables has such a pair: there are {', '.join(pairs)}"
        )
    return {training: list(dict.fromkeys(classifiers)) for training, classifiers in asked.items()}


def narrowed(p: params.Params, seeds: list[str] | None, precision: str | None) -> params.Params:
    """The parameters with a part of their seeds, and another precision; None leaves either as it is.

    Raises UserError for a seed that is not among them or is named twice.
    """
    known = {str(seed): seed for seed in p.seeds}
    for seed in seeds or []:
        if seed not in known or seeds.count(seed) > 1:
            raise errors.UserError(f"--seed {seed}: must be one of {', '.join(known)}, each named once at most")
    return p.model_copy(
        update={"seeds": [known[seed] for seed in seeds or known], "precision": precision or p.precision}
    )


def complete(path: Path, p: params.Params, with_best: bool) -> bool:
    """Whether a cell's file is there, of all seeds of `p`, in its precision, `with_best` on test or without."""
    if not path.exists():
        return False
    cell = published.read_cell(path)
    same = cell.precision == p.precision and set(map(str, p.seeds)) <= set(cell.correct or ())
    return same and (cell.best_on_test is not None or not with_best)


def require_no_loss(path: Path, p: params.Params) -> None:
    """Raise UserError when a part of the seeds, or another precision, would take the place of more."""
    if path.exists():
        cell = published.read_cell(path)
        if cell.precision != p.precision or not set(cell.correct or ()) <= set(map(str, p.seeds)):
            seeds = ", ".join(cell.correct or ())
            raise errors.UserError(
                f"{path} has seeds {seeds} in {cell.precision}, which --seed and --precision would replace: give them "
                "so that they cover these, or move it away"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.published", description=__doc__)
    parser.add_argument("--table", action="append", help="only this table, or these (all)")
    parser.add_argument("--dataset", action="append", help="only this data set of them, or these (all)")
    parser.add_argument("--representation", action="append", help="only this representation of them, or these (all)")
    parser.add_argument("--missing", action="store_true", help="leave out the cells that are there already, complete")
    parser.add_argument("--seed", action="append", help="only this seed of the plan, or these (all)")
    parser.add_argument("--precision", choices=get_args(params.Precision), help="of training (that of params.yaml)")
    workspace.accept_images(parser)
    args = parser.parse_args()

    chosen, p = plan.load(params.load())
    p = narrowed(p, args.seed, args.precision)
    workspace.require_one_process(p.runtime)
    train.prepare(p.runtime, p.precision)  # refuses what this machine cannot do before anything is downloaded
    asked = select(chosen, args.table, args.dataset, args.representation)
    for (dataset, representation, _), classifiers in asked.items():
        settings.training(p, dataset, representation, "representations")
        for classifier in classifiers:
            settings.training(p, dataset, classifier, "classifiers")
    p = workspace.with_images(p, (name for name, _, _ in asked), args.images)

    if args.missing:
        asked = {
            (dataset, representation, late): [
                name
                for name in classifiers
                if not complete(
                    paths.PUBLISHED / dataset / representation / f"{name}.json",
                    p,
                    bool(late) and has_epochs(settings.training(p, dataset, name, "classifiers")),
                )
            ]
            for (dataset, representation, late), classifiers in asked.items()
        }
    if args.seed or args.precision:
        for (dataset, representation, _), classifiers in asked.items():
            for name in classifiers:
                require_no_loss(paths.PUBLISHED / dataset / representation / f"{name}.json", p)

    out = paths.PUBLISHED.resolve()
    with workspace.inside(WORKSPACE):
        for (dataset, representation, late_epochs), classifiers in asked.items():
            if classifiers:
                cells(p, late_epochs, dataset, representation, classifiers, out)
    written = sum(map(len, asked.values()))
    print(f"{paths.PUBLISHED}: {written} cells written; `python -m stages.tables` makes the tables")


if __name__ == "__main__":
    errors.run(main, goes_on=True)
