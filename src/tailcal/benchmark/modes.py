"""benchmark/modes.yaml, typed and strict; the rule by which a faster way of training is accepted; the table of it.

Fractions in the measurements, percent in what is read. Imports no torch.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, model_validator
from scipy.stats import nct as noncentral_t

from tailcal import params, plan, sources, yaml12
from tailcal.cell import CellName
from tailcal.errors import UserError
from tailcal.params import Params, Positive, Precision, Seeds, Strict, Word
from tailcal.tables import DASH, Table, signed

FILE = Path("benchmark/modes.yaml")
REFERENCE = "float32"  # without CUDA graphs
FEWEST_SEEDS = 5


def _enough(seeds: list[int]) -> list[int]:
    if len(seeds) < FEWEST_SEEDS:
        raise ValueError(f"must be {FEWEST_SEEDS} or more, got {len(seeds)}: fewer say nothing of their spread")
    return seeds


class Mode(Strict):
    """A way of training. `tolerance`: by which the first epoch's loss may differ from the reference's, relative.

    What computes in float32 has none: it must give the very same bits.
    """

    precision: Precision
    cuda_graphs: bool
    tolerance: Positive | None = None

    @property
    def exact(self) -> bool:
        """Whether it must give the bits of the reference."""
        return self.precision == "float32"

    @model_validator(mode="after")
    def _tolerance_where_bits_differ(self) -> "Mode":
        if self.exact and self.tolerance is not None:
            raise ValueError("tolerance must be left out with precision float32, which must give the same bits")
        if not self.exact and self.tolerance is None:
            raise ValueError(f"tolerance is missing: precision {self.precision} needs one")
        return self


class Cell(Strict):
    """What is trained."""

    dataset: Word
    representation: Word
    classifier: Word

    @property
    def full_name(self) -> CellName:
        """Its three names in one."""
        return CellName(self.dataset, self.representation, self.classifier)

    @property
    def name(self) -> str:
        """How a table calls it."""
        return str(self.full_name)


class Suite(Strict):
    """What is trained on one kind of machine: every cell, in the reference and in every mode, once per seed."""

    seeds: Annotated[Seeds, AfterValidator(_enough)]
    modes: Annotated[dict[Word, Mode], Field(min_length=1)]
    cells: Annotated[list[Cell], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> "Suite":
        names = [cell.name for cell in self.cells]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"cells lists {repeated[0]} more than once")
        return self

    @model_validator(mode="after")
    def _not_the_reference(self) -> "Suite":
        for name, mode in self.modes.items():
            if name == REFERENCE or (mode.exact and not mode.cuda_graphs):
                raise ValueError(f"modes.{name}: {REFERENCE} without cuda_graphs is the reference, trained anyway")
        return self


class Modes(Strict):
    """The whole of benchmark/modes.yaml."""

    cpu: Suite
    cuda: Suite

    @model_validator(mode="after")
    def _on_a_cpu(self) -> "Modes":
        for name, mode in self.cpu.modes.items():
            if mode.cuda_graphs or mode.precision == "tf32":
                raise ValueError(f"cpu.modes.{name}: tf32 and cuda_graphs exist only on a GPU: use bf16 without them")
        return self


def load(p: Params, path: Path = FILE) -> tuple[Modes, Params]:
    """The file, and `p` with the data sets of its cells in place of its own.

    Raises UserError (one line) naming the key that is wrong.
    """
    modes = params.validate(Modes, yaml12.read(path), "", path)
    root = path.parent.parent
    planned = plan.load(p, root / plan.PLAN)[1].datasets
    presets = (preset.stem for preset in (root / params.PRESETS).glob("*.yaml"))
    known = {
        "dataset": sorted({*p.datasets, *presets, *planned}),
        "representation": sorted(p.representations),
        "classifier": sorted(p.classifiers),
    }
    datasets = {}
    for device in ("cpu", "cuda"):
        for i, cell in enumerate(getattr(modes, device).cells):
            for axis, name in cell.model_dump().items():
                if name not in known[axis]:
                    choice = ", ".join(known[axis])
                    raise UserError(f"{path}: {device}.cells.{i}.{axis}: must be one of {choice}, got {name!r}")
            datasets[cell.dataset] = planned.get(cell.dataset) or params.dataset(p, cell.dataset, root)
    return modes, p.model_copy(update={"datasets": datasets})


class Seed(Strict):
    """The network of one seed. `first_epoch_loss`: the mean over stage 1's first epoch. `sha256`: of the weights after
    both stages and of the predictions."""

    top1: float
    ece: float
    first_epoch_loss: float
    sha256: dict[str, str]


class Outcome(Strict):
    """A cell as one mode trained it: means and sample standard deviations over seeds, and each seed."""

    top1: float
    top1_std: float
    ece: float
    ece_std: float
    seconds: float  # training one network, both stages
    seeds: dict[str, Seed]


class Verdict(Strict):
    """A mode beside the reference: differences of the means, how far off the first epoch's loss is at the worst seed,
    relative and in absolute terms, and what the mode is refused for, if anything."""

    top1: float
    ece: float
    first_epoch_loss: float
    first_epoch_absolute: float
    same_bits: bool
    refused_for: list[str]
    accepted: bool


class ModeResult(Strict):
    """What a mode gave in one cell, and the verdict."""

    outcome: Outcome
    verdict: Verdict


class Measured(Cell):
    """A cell in the reference and in each mode. `source`: the kind of place that its images came from."""

    source: str
    reference: Outcome
    modes: dict[str, ModeResult]


class Record(Strict):
    """metrics/modes.json. `at_once`: how many networks were trained side by side."""

    machine: dict[str, Any]
    versions: dict[str, Any]
    code: str
    at_once: int
    seeds: list[int]
    modes: dict[str, Mode]
    cells: list[Measured]


def judge(reference: Outcome, other: Outcome, mode: Mode) -> Verdict:
    """Hold a mode's outcome against the reference's of the same cell and seeds.

    Accepted is a mode of another precision when top-1 and ECE, means over seeds, each differ by at most the reference's
    standard deviation, and every seed's first epoch by at most the tolerance; any other when all bits are the same.
    """
    # The numbers have six digits; a difference that equals a deviation must not fail for its seventeenth.
    top1, ece = round(other.top1 - reference.top1, 6), round(other.ece - reference.ece, 6)
    pairs = [(seed, other.seeds[name]) for name, seed in reference.seeds.items()]
    off = [abs(b.first_epoch_loss - a.first_epoch_loss) for a, b in pairs]
    loss = max(difference / abs(a.first_epoch_loss) for difference, (a, _) in zip(off, pairs, strict=True))
    same_bits = all(a.sha256 == b.sha256 for a, b in pairs)
    if mode.exact:
        failed = {"bits": not same_bits}
    else:
        failed = {
            "top-1": abs(top1) > reference.top1_std,
            "ECE": abs(ece) > reference.ece_std,
            "first epoch": round(loss, 6) > mode.tolerance,
        }
    refused_for = [name for name, fails in failed.items() if fails]
    return Verdict(
        top1=top1,
        ece=ece,
        first_epoch_loss=round(loss, 6),
        first_epoch_absolute=round(max(off), 6),
        same_bits=same_bits,
        refused_for=refused_for,
        accepted=not refused_for,
    )


def passes(seeds: int, shift: float) -> float:
    """How often `judge` accepts, by one number, a mode whose true mean is off by `shift` deviations: a probability.

    Both modes have `seeds` networks of normally distributed numbers of one true deviation, so that the difference of
    means over the reference's deviation, times sqrt(n / 2), follows a non-central t distribution.
    """
    border = (seeds / 2) ** 0.5
    return float(np.diff(noncentral_t.cdf((-border, border), seeds - 1, shift * border))[0])


HEADER = [
    "cell",
    "mode",
    "top-1",
    "ECE",
    "top-1, difference",
    "ECE, difference",
    "first epoch's loss, off by",
    "s per network",
    "accepted",
]


def table(record: Record) -> Table:
    """One row per cell and mode, the reference first; percent and points."""
    rows = []
    for cell in record.cells:
        rows.append([cell.name, REFERENCE, *_numbers(cell.reference), *[DASH] * 3, _seconds(cell.reference), DASH])
        for name, result in cell.modes.items():
            verdict = result.verdict
            loss = f"{100 * verdict.first_epoch_loss:.2f}% ({verdict.first_epoch_absolute:.4f})"
            beside = [signed(100 * verdict.top1), signed(100 * verdict.ece), loss]
            accepted = "yes" if verdict.accepted else f"no: {', '.join(verdict.refused_for)}"
            rows.append([cell.name, name, *_numbers(result.outcome), *beside, _seconds(result.outcome), accepted])
    return Table(HEADER, rows)


def device_name(machine: dict[str, Any]) -> str:
    """What a measurement was made on, of `tailcal.benchmark.measure.machine`: the GPU, or the CPU and its cores."""
    if machine["gpu"]:
        return machine["gpu"]
    return f"{machine['cpu']}, {machine['cores']} core{'s' if machine['cores'] > 1 else ''}"


def markdown(record: Record) -> str:
    """metrics/modes.md: the rule, the table, and each mode in a sentence."""
    where = device_name(record.machine)
    seeds = len(record.seeds)
    tolerances = [f"{name} {100 * mode.tolerance:g}%" for name, mode in record.modes.items() if not mode.exact]
    exact = [name for name, mode in record.modes.items() if mode.exact]
    rules = []
    if tolerances:
        rules.append(
            "A mode is accepted on a cell when the difference of means is, up or down, at most the reference's "
            "standard deviation over seeds, for top-1 and for ECE, and the mean loss of stage 1's first epoch is off "
            f"by at most a tolerance, relative, at every seed: {', '.join(tolerances)}. With {seeds} seeds, for each "
            f"of the two numbers: a mode that changes nothing is refused {1 - passes(seeds, 0):.0%} of the time, and "
            f"one that is off in truth by 0.5, 1 or 2 standard deviations is accepted {passes(seeds, 0.5):.0%}, "
            f"{passes(seeds, 1):.0%} or {passes(seeds, 2):.0%} of the time. In brackets is the largest absolute "
            "difference of that loss: a loss that has terms of both signs may lie near 0, where a small difference is "
            "a large share."
        )
    if exact:
        rules.append(
            f"{', '.join(exact)} must do more: every seed's weights, after both stages, and predictions must be the "
            "reference's bits (equal SHA-256)."
        )
    folders = sorted({cell.dataset for cell in record.cells if not sources.official(cell.source)})
    if folders:
        rules.append(f"The images of {', '.join(folders)} came from a folder, not from the official archive.")
    caption = (
        f"Trained on {where}, torch {record.machine['torch']}, {record.at_once} at a time, by code {record.code}. Mean "
        f"± standard deviation over {seeds} seeds at the last epoch, in %; differences are mode minus reference, in "
        "points; the reference is float32 without CUDA graphs. Seconds are those of training one network, both stages, "
        "beside whatever else ran."
    )
    return "\n".join(
        [
            "# Faster modes of training beside the reference\n",
            "Made by `python -m stages.modes` from `benchmark/modes.yaml`.\n",
            f"{caption}\n",
            *(f"{rule}\n" for rule in rules),
            table(record).markdown(),
            *(f"{_said(name, record.cells)}\n" for name in record.modes),
        ]
    )


def _said(name: str, cells: list[Measured]) -> str:
    """How a mode did over all cells."""
    refused = [cell.name for cell in cells if not cell.modes[name].verdict.accepted]
    accepted = f"{name}: accepted on {len(cells) - len(refused)} of {len(cells)} cells"
    return f"{accepted}, refused on {', '.join(refused)}." if refused else f"{accepted}."


def _numbers(outcome: Outcome) -> list[str]:
    return [
        f"{100 * mean:.2f} ± {100 * deviation:.2f}"
        for mean, deviation in ((outcome.top1, outcome.top1_std), (outcome.ece, outcome.ece_std))
    ]


def _seconds(outcome: Outcome) -> str:
    return f"{outcome.seconds:,.1f}"
