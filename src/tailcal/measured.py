"""What was measured of the cells of the published tables: a file for each seed, and the seeds of a cell together.

Seeds may be trained on different days and machines, as hours of a GPU come; that they were trained and measured in the
same way is checked when they are joined. Fractions throughout. Imports no torch.
"""

import base64
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, model_validator

from tailcal import files, params
from tailcal.cell import CellName, options
from tailcal.errors import UserError
from tailcal.lineage import differences, flat, outdated, unlike
from tailcal.metrics.cell import over_seeds
from tailcal.plan import PLAIN, PLAN, Plan
from tailcal.tables import span

ROUNDING = 1e-5  # by which a stored accuracy may differ from that of the predictions beside it


Count = Annotated[int, Field(ge=1)]
Line = Annotated[str, Field(pattern=r"^[^|\n]+$")]  # what stands in a cell of a Markdown table


class RunNumbers(params.Recorded):
    """What one seed's network does on the test split, fractions; None where there is none. `correct` says which images
    it gets right, as `unpack` reads it."""

    top1: params.Fraction
    many: params.Fraction | None = None
    medium: params.Fraction | None = None
    few: params.Fraction | None = None
    ece: params.Fraction | None
    nll: Annotated[float, Field(ge=0)] | None
    transductive: bool = False
    correct: str | None = None


class Data(params.Recorded):
    """official: the images come as they were published, and so in the published order, and not from a folder.
    test_split: SHA-256 of the test split's files. trained_on: how many test images are in the training split too, None
    where that was not kept."""

    train_images: Count
    official: bool
    test_split: dict[str, str]
    trained_on: Annotated[int, Field(ge=0)] | None = None


class RunCost(params.Recorded):
    """seconds: training one network, stage 1 and 2, with `at_once` networks side by side."""

    machine: Line
    seconds: Annotated[float, Field(ge=0)]
    at_once: Count


class RunBestNumbers(params.Recorded):
    """At the late epoch that is best on the test split; and the least and the most ECE of any late epoch."""

    top1: params.Fraction
    ece: params.Fraction
    ece_least: params.Fraction | None = None  # one file is from before it was kept
    ece_most: params.Fraction | None = None

    @model_validator(mode="after")
    def _in_the_range_of_the_epochs(self) -> "RunBestNumbers":
        if self.ece_least is not None and self.ece_most is not None and not self.ece_least <= self.ece <= self.ece_most:
            raise ValueError(f"ece is {self.ece}: must lie from ece_least {self.ece_least} to ece_most {self.ece_most}")
        return self


class RunBest(RunBestNumbers):
    """The best of the last `epochs` epochs, as trained and after post-hoc rules: a diagnostic."""

    epochs: Count
    posthoc: dict[str, RunBestNumbers] = Field({})


class StageParams(params.Recorded):
    """What a stage trained by: its `recipe` has `epochs` or `iterations`; a method that takes no step has none."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    recipe: dict[str, Any] = Field({})


class RunParams(params.Recorded):
    """The parameters of a cell."""

    model_config = ConfigDict(extra="allow")

    representation: StageParams = StageParams()
    classifier: StageParams = StageParams()


class Provenance(params.Recorded):
    """data: SHA-256 of the training split's files; evaluate: how it was measured, as in params.yaml; code, device and
    versions, and how many processes trained together at the end where it was not one, are of stage 2, and `stage1` has
    these of stage 1."""

    params: RunParams = RunParams()
    data: dict[str, str] = Field({})
    evaluate: dict[str, Any] = Field({})
    code: str = ""
    device: str = ""
    versions: dict[str, str] = Field({})
    processes: int = 1
    stage1: dict[str, Any] = Field({})


class Run(RunNumbers):
    """One seed of a cell, as it was measured: a file of metrics/published/cells."""

    posthoc: dict[str, RunNumbers] = Field({})
    seed: Annotated[int, Field(ge=0)]
    data: Data
    cost: RunCost
    best_on_test: RunBest | None = None
    epochs: Count
    backbone: Line
    precision: Line  # of training
    test_images: Annotated[int, Field(ge=2)]
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _correct_is_of_these_numbers(self) -> "Run":
        for numbers in (self, *self.posthoc.values()):
            if numbers.correct is None:
                continue
            accuracy = unpack(numbers.correct, self.test_images).mean()
            if abs(accuracy - numbers.top1) > ROUNDING:
                raise ValueError(f"correct has an accuracy of {accuracy:.6f}, and top1 is {numbers.top1:.6f}")
        return self

    def shared(self) -> dict[str, Any]:
        """What all seeds of a cell must have in common."""
        return {
            "precision": self.precision,
            "backbone": self.backbone,
            "epochs": self.epochs,
            "data": self.data.model_dump(exclude={"trained_on"}),  # follows from the checksums
            "test_images": self.test_images,
            "rules": sorted(self.posthoc),
            "late epochs": self.best_on_test and self.best_on_test.epochs,
            "provenance": self.provenance.model_dump(include={"params", "data", "evaluate"}),
        }

    def differences(self, other: "Run", parts: tuple[str, ...] = ("",)) -> Iterator[tuple[str, str | None, str | None]]:
        """`lineage.differences` of what they `shared`, of the keys that begin with one of `parts`."""
        return (each for each in differences(self.shared(), other.shared()) if each[0].startswith(parts))

    def made_by(self) -> dict[str, str]:
        """Code, device, processes and versions of libraries of both stages: these may differ, as seeds are trained in
        turn."""
        return flat(self.provenance.model_dump(include={"code", "device", "versions", "processes", "stage1"}))


@dataclass(frozen=True)
class Numbers:
    """Means over seeds and their standard deviations, fractions; None where there is none."""

    top1: float
    top1_std: float | None
    many: float | None
    medium: float | None
    few: float | None
    ece: float | None
    ece_std: float | None
    nll: float | None
    transductive: bool
    correct: list[str] | None  # of each seed


@dataclass(frozen=True)
class BestNumbers:
    """Means over seeds, each seed at the epoch that is best on the test split, and their standard deviations; and the
    least and the most ECE of any late epoch and seed."""

    top1: float
    top1_std: float | None
    ece: float
    ece_std: float | None
    ece_least: float | None
    ece_most: float | None


@dataclass(frozen=True)
class MeasuredCell:
    """A cell: what was measured of each of its seeds, which were trained and tested in the same way."""

    runs: list[Run]

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self.runs)

    @property
    def one(self) -> Run:
        """The first seed, for what is the same in all."""
        return self.runs[0]

    @property
    def seconds(self) -> float:
        """Training one network, both stages; mean over seeds."""
        return round(float(np.mean([run.cost.seconds for run in self.runs])), 1)

    @property
    def at_once(self) -> str:
        """How many networks were trained side by side."""
        return span({run.cost.at_once for run in self.runs})

    @property
    def stage2(self) -> str | None:
        """How long its stage 2 trains, `5 epochs` say; None where it takes no step."""
        recipe = self.one.provenance.params.classifier.recipe
        return next((f"{recipe[unit]} {unit}" for unit in ("epochs", "iterations") if recipe.get(unit)), None)

    def after(self, rule: str) -> Numbers | None:
        """The numbers after a post-hoc rule, as trained for a rule of PLAIN, None where the rule was not applied."""
        found = self.runs if rule in PLAIN else [run.posthoc.get(rule) for run in self.runs]
        if None in found:
            return None
        means = over_seeds([one.model_dump(include={"top1", "many", "medium", "few", "ece", "nll"}) for one in found])
        return Numbers(
            **{field.name: means[field.name] for field in fields(Numbers) if field.name in means},
            transductive=found[0].transductive,
            correct=None if None in (kept := [one.correct for one in found]) else kept,
        )

    @property
    def made_differently(self) -> list[str]:
        """The keys of `Run.made_by` that are not the same of all seeds."""
        made = [run.made_by() for run in self.runs]
        return sorted(key for key in set().union(*made) if len({one.get(key) for one in made}) > 1)

    @property
    def late_epochs(self) -> int | None:
        """Of how many epochs the best on test were found; None where they were not."""
        return self.one.best_on_test and self.one.best_on_test.epochs

    def best(self, rule: str) -> BestNumbers | None:
        """The numbers at the epoch that is best on test after a rule, as `after` has those of the last epoch."""
        if self.late_epochs is None:
            return None
        every = [run.best_on_test for run in self.runs]
        found = every if rule in PLAIN else [best.posthoc.get(rule) for best in every]
        if None in found:
            return None
        means = over_seeds([one.model_dump(include={"top1", "ece"}) for one in found])
        known = all(one.ece_least is not None for one in found)
        return BestNumbers(
            **means,
            ece_least=min(one.ece_least for one in found) if known else None,
            ece_most=max(one.ece_most for one in found) if known else None,
        )


Cells = dict[CellName, MeasuredCell]


def run_file(folder: Path, cell: CellName, seed: int) -> Path:
    """Where one seed of a cell lies below metrics/published/cells, which is `folder`."""
    return folder.joinpath(*cell, f"seed{seed}.json")


def cell_of(path: Path) -> CellName:
    """The cell of a file of `run_file`."""
    return CellName(*path.parts[-4:-1])


def seed_of(path: Path) -> int | None:
    """The seed in the name of a file of `run_file`, None for any other name."""
    found = re.fullmatch(r"seed(0|[1-9]\d*)\.json", path.name)
    return int(found[1]) if found else None


def how_to_make(cell: CellName, seed: int | str) -> str:
    """How the file of one seed of a cell is made, as an error line ends."""
    return (
        f"run `python -m stages.published --missing {options(cell)} --seed {seed}`, with the --precision and --images "
        "of the other seeds"
    )


def read_measured(folder: Path, plan: Plan) -> Cells:
    """Every cell measured below `folder`.

    Raises UserError naming a file that is damaged, not in its place or not of the plan, a seed that was trained
    otherwise than the first of its cell, and one that is a copy of another. Hidden files are passed over: an
    interrupted write leaves such.
    """
    found: dict[CellName, dict[int, Path]] = {}
    for path in sorted(folder.rglob("*")):
        *cell, _ = path.relative_to(folder).parts
        folder_of_cells = path.is_dir() and not path.is_symlink() and seed_of(path) is None
        if folder_of_cells or path.name.startswith("."):
            continue
        if len(cell) != 3 or (seed := seed_of(path)) is None:
            raise UserError(
                f"{path}: must lie in <dataset>/<representation>/<classifier>/ as seed<k>.json: move it away"
            )
        if not path.is_file():
            raise UserError(f"{path} is a folder, or a link to nothing: move it away")
        if not any(table.trains(*cell) for table in plan.tables.values()):
            raise UserError(f"{path}: no table of {PLAN} trains {cell_of(path)}: move it away")
        if seed not in plan.seeds:
            raise UserError(f"{path}: {PLAN}: seeds are {', '.join(map(str, plan.seeds))}: move it away, or add {seed}")
        found.setdefault(cell_of(path), {})[seed] = path
    return {cell: join(cell, [paths[seed] for seed in sorted(paths)]) for cell, paths in found.items()}


def join(cell: CellName, paths: Iterable[Path]) -> MeasuredCell:
    """The cell whose seeds are in these files. Raises UserError as `read_measured` does."""
    runs = {path: read_run(path) for path in paths}
    _require_own_networks(cell, runs)
    (first, one), *others = runs.items()
    for path, run in others:
        for key, ours, theirs in run.differences(one):
            raise UserError(
                f"{path}: its {key} is {ours}, that of {first.name} {theirs}, and the seeds of a cell must be trained "
                f"and measured in the same way: delete the one that is not as {params.PARAMS}, {PLAN} and your "
                f"options say, and {how_to_make(cell, 'SEED')}"
            )
    return MeasuredCell(list(runs.values()))


def _require_own_networks(cell: CellName, runs: dict[Path, Run]) -> None:
    """Raise UserError naming two seeds that are right on the same images and equally sure of them: one network."""
    seen: dict[tuple[str | None, float | None], Path] = {}
    for path, run in runs.items():
        same = seen.setdefault((run.correct, run.nll), path)
        if run.correct is not None and same != path:
            raise UserError(
                f"{path} has the predictions of {same.name}, image by image, and each seed is a network of its own: "
                f"delete the copy and {how_to_make(cell, 'SEED')}"
            )


def read_run(path: Path) -> Run:
    """One seed of a measured cell. Raises UserError naming the file when it is missing or damaged, or when what is in
    it is of another seed or cell than its name says."""
    advice = how_to_make(cell_of(path), path.stem.removeprefix("seed"))
    content = files.read_json(path, advice)
    try:
        run = Run.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({params.describe(error, '')}): delete it and {advice}") from None
    if path.stem != f"seed{run.seed}":
        raise UserError(f"{path} is of seed {run.seed}: must be called seed{run.seed}.json: rename it, or move it away")
    trained, cell = run.provenance.params, cell_of(path)
    for stage, folder in ((trained.representation, cell.representation), (trained.classifier, cell.classifier)):
        if stage.name not in (None, folder):
            raise UserError(f"{path} is of {stage.name}, and lies in a folder of {folder}: move it away")
    return run


def read_runs(folder: Path, cell: CellName, seeds: Iterable[int]) -> dict[Path, Run]:
    """Those of these seeds of a cell that lie below `folder`, by file. Raises UserError as `read_run` does."""
    files_of_seeds = (run_file(folder, cell, seed) for seed in seeds)
    return {file: read_run(file) for file in files_of_seeds if file.exists()}


def require_alike(cell: CellName, runs: dict[Path, Run], precision: str, official: bool) -> None:
    """Raise UserError naming a file of these seeds of a cell that is in another precision, or of images from elsewhere
    (`official`: see `Data`), than what is about to be trained."""
    for file, run in runs.items():
        if run.precision != precision:
            raise UserError(
                f"{file} is in {run.precision}, and the seeds of a cell must be in one precision: give {options(cell)} "
                f"--precision {run.precision}, or move it away"
            )
        if run.data.official != official:
            raise UserError(
                f"{file} is of images from {'an official archive' if run.data.official else 'a folder'}, and the seeds "
                f"of a cell must be of the same: {'leave --images out' if run.data.official else 'give --images'}, or "
                "move it away"
            )


def unplanned(path: Path, run: Run, params: dict[str, Any], evaluate: dict[str, Any]) -> str | None:
    """In what way one seed of a cell, in this file, was not trained or measured as it would be now, as an error line
    says it: the first parameter, or that the file names none. None where all are the same.

    `params` and `evaluate` are as `lineage.outdated` takes them. Post-hoc rules may have come or gone since: no other
    number depends on them.
    """
    anew = how_to_make(cell_of(path), run.seed)
    record = run.provenance.model_dump(exclude_defaults=True)
    if not {"params", "evaluate"} <= record.keys():
        return f"{path} does not say by which parameters it was trained and measured: move it away and {anew}"
    rules = run.provenance.evaluate.get("posthoc", {}).keys() & evaluate["posthoc"].keys()
    for key, then, now in outdated(record, params, evaluate):
        names = key.split(".")
        if names[:2] != ["evaluate", "posthoc"] or rules.intersection(names[2:3]):
            return f"{unlike(path, key, then, now)}: set it back, or move the file away and {anew}"
    return None


def pack(hits: np.ndarray) -> str:
    """bool [N] as base64 of numpy.packbits, which `unpack` reads."""
    return base64.b64encode(np.packbits(hits).tobytes()).decode()


def unpack(text: str, N: int) -> np.ndarray:
    """bool [N] from base64 of numpy.packbits. Raises ValueError when the text is anything else."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(packed) != -(-N // 8):
        raise ValueError(f"{len(packed)} bytes are not one bit for each of {N} images")
    bits = np.unpackbits(packed).astype(bool)
    if bits[N:].any():
        raise ValueError(f"it says something of more than {N} images")
    return bits[:N]
