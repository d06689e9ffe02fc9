"""Checks that the artefacts a stage reads were made from the inputs that are there now.

DVC sees to that where it runs the stages; without it, a stage that was left out is noticed here.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tailcal.cell import CellName, options
from tailcal.errors import UserError
from tailcal.files import read_json
from tailcal.params import Recorded, recorded

TRAINED_ON = ("train_images.npy", "train_labels.npy")
PREDICTED = ("holdout_images.npy", "holdout_labels.npy", "test_images.npy", "test_labels.npy")


class RepresentationParams(Recorded):
    """The parameters of a representation."""

    dataset: dict[str, Any]
    representation: dict[str, Any]


class Represented(Recorded):
    """The provenance of stage 1. weights, history: checksums of its files, by seed, and of history.csv."""

    code: str
    params: RepresentationParams
    data: dict[str, str]
    device: str
    versions: dict[str, str]
    network: dict[str, Any]
    weights: dict[str, str]
    history: str


class Named(Recorded):
    """A part of the parameters that has a name."""

    name: str


class CellParams(Recorded):
    """The parameters of predictions."""

    representation: Named
    classifier: Named


class Origin(Recorded):
    """What predictions, and numbers measured of them, come from. data: checksums of the training split; predicted: of
    the images that were predicted; starts: of the networks of stage 1 that stage 2 began with."""

    params: CellParams
    data: dict[str, str]
    predicted: dict[str, str]
    starts: dict[str, str]


class Predicted(Origin):
    """The provenance of predictions."""

    checksums: dict[str, str]


def read_represented(stage1: Path) -> Represented:
    """What stage 1, in the folder `stage1`, has recorded of itself. Raises UserError naming the file when it is missing
    or damaged."""
    path = stage1 / "provenance.json"
    return recorded(Represented, read_json(path), path, remove=stage1)


def flat(tree: Any, prefix: str = "", empty: bool = False) -> dict[str, str]:
    """A nested value as {dotted key: text}; lists and tuples are joined. An empty mapping leaves no trace, or with
    `empty` is the text {}."""
    if isinstance(tree, dict) and (tree or not empty):
        return {
            name: text
            for key, value in tree.items()
            for name, text in flat(value, f"{prefix}.{key}" if prefix else str(key), empty).items()
        }
    return {prefix: ", ".join(map(str, tree)) if isinstance(tree, list | tuple) else str(tree)}


def differences(ours: Any, theirs: Any, empty: bool = False) -> Iterator[tuple[str, str | None, str | None]]:
    """The dotted keys of two nested values that are not the same of both, sorted, with the two as `flat` has them; None
    where there is none."""
    a, b = flat(ours, empty=empty), flat(theirs, empty=empty)
    return ((key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key))


def again(**stages: tuple[str, ...]) -> str:
    """How what these stages write is made anew: the end of an error line. {stage: data set, representation, ...}."""
    commands = (f"`python -m stages.{stage} {options(names)}" for stage, names in stages.items())
    return f"run `dvc repro`, or without DVC or off the grid {'` and '.join(commands)}`"


def same_files(record: dict[str, str], checksums: dict[str, str], names: tuple[str, ...]) -> bool:
    """Whether `record`, {file name: SHA-256}, says the same of these files of a data set as its `checksums`."""
    return all(record.get(name) == checksums.get(name) for name in names)


def outdated(
    record: dict[str, Any], params: dict[str, Any], evaluate: dict[str, Any]
) -> Iterator[tuple[str, str | None, str | None]]:
    """The `differences` between the provenance `record` of a cell's numbers and the parameters: `params` are those of
    its training, as `tailcal.settings.of_cell` has them."""
    then = {key: value for key, value in record.items() if key in ("params", "evaluate")}
    # Many a post-hoc rule has no settings, and is there or not.
    return differences(then, {"params": params, "evaluate": evaluate}, empty=True)


def unlike(what: Path | str, key: str, then: str | None, now: str | None) -> str:
    """How an error line says one of `differences`: what `what` was made with, and what the parameters say now."""
    made = f"{what} was made without {key}" if then is None else f"{what} was made with {key} {then}"
    return f"{made}, and the parameters {'have none' if now is None else f'say {now}'}"


def require_seeds(names: Iterable[str], seeds: list[int], what: Path, advice: str) -> None:
    """Raise UserError unless there is a file, or a key, seed<k> among `names` for each of the seeds."""
    found = {name.partition(".")[0] for name in names}
    if lacking := [seed for seed in seeds if f"seed{seed}" not in found]:
        raise UserError(
            f"{what} has no seed {lacking[0]}, and the parameters say seeds {', '.join(map(str, seeds))}: {advice}"
        )


def require_stage1(
    record: Represented, now: dict[str, Any], seeds: list[int], checksums: dict[str, str], stage1: Path, longtail: Path
) -> None:
    """Raise UserError unless stage 1 in the folder `stage1`, of the provenance `record`, was trained by the parameters
    `now` of a representation and with these seeds, on the training split in `longtail`, of these checksums."""
    advice = again(represent=stage1.parts[-2:])
    if not same_files(record.data, checksums, TRAINED_ON):
        raise UserError(f"{stage1} was trained on another training split than {longtail} holds: {advice}")
    for difference in differences(record.params.representation, now):
        raise UserError(f"{unlike(stage1, *difference)}: {advice}")
    require_seeds(record.weights, seeds, stage1, advice)


def require_cell(record: Origin, what: Path, cell: tuple[str, ...], stage1: Path, after: tuple[str, ...] = ()) -> None:
    """Raise UserError unless predictions or numbers, in the file or folder `what`, are of the cell (data set,
    representation, classifier), and of networks that begin with those of the folder `stage1`, where that is there.

    `after`: stages that are to run after calibrate, to make them anew.
    """
    advice = again(**dict.fromkeys(("calibrate", *after), cell))
    for axis, name in zip(CellName._fields[1:], cell[1:], strict=True):
        if (found := getattr(record.params, axis).name) != name:
            raise UserError(f"{what} is of the {axis} {found}: {advice}")
    if stage1.exists() and read_represented(stage1).weights != record.starts:
        raise UserError(f"{what} is not of the networks that {stage1} holds: {advice}")


def require_images(
    record: Origin,
    what: Path,
    cell: tuple[str, ...],
    checksums: dict[str, str],
    longtail: Path,
    after: tuple[str, ...] = (),
) -> None:
    """Raise UserError unless predictions or numbers, as `require_cell` takes them, are of the images in the folder
    `longtail`, of these checksums, and of networks that were trained on the training split there."""
    stages = dict.fromkeys(("calibrate", *after), cell)
    if not same_files(record.data, checksums, TRAINED_ON):
        raise UserError(
            f"{what} is of networks that were trained on another training split than {longtail} holds: "
            f"{again(represent=cell[:2], **stages)}"
        )
    if not same_files(record.predicted, checksums, PREDICTED):
        raise UserError(f"{what} is of other held-out or test images than {longtail} holds: {again(**stages)}")
