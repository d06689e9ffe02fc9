"""published/params.yaml, typed and strict: what is trained for the published tables. Imports no torch."""

from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tailcal import params, yaml12
from tailcal.cell import CellName
from tailcal.errors import UserError
from tailcal.params import Dataset, Grid, Params, Seeds, Strict, Word, Words
from tailcal.tables import AS_TRAINED

PLAN = Path("published/params.yaml")
PLAIN = ("", AS_TRAINED)  # no post-hoc rule, as the references say it and as the project's own tables do


def cell_name(representation: str, classifier: str, rule: str = AS_TRAINED) -> str:
    """How a table calls the predictions of a cell, after a post-hoc rule or (PLAIN) after none."""
    return f"{representation}/{classifier}" + ("" if rule in PLAIN else f" + {rule}")


class Variant(BaseModel):
    """A preset with changes: further keys take the place of the preset's keys, and those under `recipes` the place of
    the keys of the recipe of that name in params.yaml."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    preset: Word
    recipes: dict[Word, dict[str, Any]] = {}


class Row(Strict):
    """A line of a table of one footing: a cell, and the post-hoc rule that its numbers are taken after."""

    representation: Word
    classifier: Word
    rule: Word = AS_TRAINED

    @property
    def name(self) -> str:
        """How a table calls it."""
        return cell_name(self.representation, self.classifier, self.rule)


class Footing(Strict):
    """Methods that were trained on the same data set in the same way, side by side; `table` is what trains them, and
    `apart` a sentence on what is not the same."""

    title: Annotated[str, Field(min_length=1)]
    apart: Annotated[str, Field(min_length=1)] | None = None
    table: Word
    dataset: Word
    rows: Annotated[list[Row], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> "Footing":
        names = [row.name for row in self.rows]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"rows lists {repeated[0]} more than once")
        return self


class Trainings(Strict):
    """What is trained for a table: grids of cells. `late_epochs` are kept besides, for best on test; 0 are none."""

    late_epochs: Annotated[int, Field(ge=0)]
    grids: Annotated[list[Grid], Field(min_length=1)]

    def cells(self) -> Iterator[tuple[str, str, Words]]:
        """Each (data set, representation) once, with all its classifiers, in the order of training."""
        classifiers: dict[tuple[str, str], list[str]] = {}
        for grid in self.grids:
            for pair in product(grid.datasets, grid.representations):
                classifiers.setdefault(pair, []).extend(grid.classifiers)
        for (dataset, representation), names in classifiers.items():
            yield dataset, representation, list(dict.fromkeys(names))

    def trains(self, dataset: str, representation: str, classifier: str) -> bool:
        """Whether some grid has this cell."""
        return any(
            dataset in grid.datasets and representation in grid.representations and classifier in grid.classifiers
            for grid in self.grids
        )


class Plan(Strict):
    """The whole of published/params.yaml."""

    seeds: Seeds
    tables: dict[Word, Trainings]
    datasets: dict[Word, Variant]
    footing: dict[Word, Footing]

    @model_validator(mode="after")
    def _rows_are_trained(self) -> "Plan":
        for name, footing in self.footing.items():
            if footing.table not in self.tables:
                known = ", ".join(self.tables)
                raise ValueError(f"footing.{name}.table: there is no {footing.table}: use one of {known}")
            for row in footing.rows:
                cell = CellName(footing.dataset, row.representation, row.classifier)
                if not self.tables[footing.table].trains(*cell):
                    raise ValueError(f"footing.{name}.rows: tables.{footing.table} does not train {cell}")
        return self

    @model_validator(mode="after")
    def _one_training_per_network(self) -> "Plan":
        seen: dict[tuple[str, str], tuple[str, int]] = {}
        for name, table in self.tables.items():
            for dataset, representation, _ in table.cells():
                other, late = seen.setdefault((dataset, representation), (name, table.late_epochs))
                if late != table.late_epochs:
                    raise ValueError(
                        f"tables.{name}.late_epochs is {table.late_epochs}: must be {late} as in tables.{other}, which "
                        f"trains {dataset}/{representation} too"
                    )
        return self


def read(path: Path = PLAN) -> Plan:
    """The plan. Raises UserError (one line) naming the key that is wrong."""
    return params.validate(Plan, yaml12.read(path), "", path)


def load(p: Params, path: Path = PLAN) -> tuple[Plan, Params]:
    """The plan, and `p` with the plan's seeds and data sets in place of its own.

    Raises UserError (one line) naming the key that is wrong.
    """
    plan = read(path)
    named = {name for table in plan.tables.values() for grid in table.grids for name in grid.datasets}
    datasets = {name: _dataset(p, plan, name, path) for name in sorted({*named, *plan.datasets})}
    return plan, p.model_copy(update={"seeds": plan.seeds, "datasets": datasets})


def _dataset(p: Params, plan: Plan, name: str, path: Path) -> Dataset:
    """A data set of the plan: a preset, or a variant of one."""
    root = path.parent.parent
    own = root / params.PRESETS / f"{name}.yaml"
    if name not in plan.datasets and name not in p.datasets and not own.exists():
        raise UserError(f"{path}: tables name the data set {name}: there is neither datasets.{name} nor {own}")
    if name not in plan.datasets:
        return params.dataset(p, name, root)
    if own.exists() or name in p.datasets:
        raise UserError(f"{path}: datasets.{name} has the name of another data set: give it one of its own")
    variant = plan.datasets[name]
    preset = root / params.PRESETS / f"{variant.preset}.yaml"
    if not preset.is_file():
        raise UserError(f"{path}: datasets.{name}.preset: there is no {preset}")
    whole = yaml12.read(preset)
    params.validate(Dataset, whole, "", preset)
    recipes = {
        recipe: (p.recipes[recipe].model_dump(exclude_none=True) if recipe in p.recipes else {}) | changes
        for recipe, changes in variant.recipes.items()
    }
    block = whole | variant.model_extra
    block["recipes"] = block.get("recipes", {}) | recipes
    return params.resolve(p, params.validate(Dataset, block, f"datasets.{name}", path), path, f"datasets.{name}.")


def select(
    plan: Plan,
    tables: list[str] | None,
    datasets: list[str] | None,
    representations: list[str] | None,
    classifiers: list[str] | None,
) -> dict[tuple[str, str, int], list[str]]:
    """{(data set, representation, late epochs): classifiers} of what the options of `stages.published` ask for; None
    asks for all of its kind.

    Raises UserError naming the option for a name that is not there, and when nothing is left.
    """
    _require_known("table", tables, plan.tables)
    found = [
        (CellName(*pair, classifier), table.late_epochs)
        for name, table in plan.tables.items()
        if name in (tables or [name])
        for *pair, each in table.cells()
        for classifier in each
    ]
    options = {"dataset": datasets, "representation": representations, "classifier": classifiers}
    for i, (option, names) in enumerate(options.items()):
        _require_known(option, names, [cell[i] for cell, _ in found])
    asked: dict[tuple[str, str, int], list[str]] = {}
    for cell, late_epochs in found:
        if all(name in (names or [name]) for name, names in zip(cell, options.values(), strict=True)):
            asked.setdefault((*cell[:2], late_epochs), []).append(cell.classifier)
    if not asked:
        known = sorted({str(cell) for cell, _ in found if cell.dataset in (datasets or [cell.dataset])})
        raise UserError(
            f"--dataset, --representation, --classifier: these tables have no such cell: there are {', '.join(known)}"
        )
    return {training: list(dict.fromkeys(classifiers)) for training, classifiers in asked.items()}


def _require_known(option: str, names: list[str] | None, known: Iterable[str]) -> None:
    known = list(dict.fromkeys(known))
    for name in names or []:
        if name not in known:
            raise UserError(f"--{option} {name}: there is none of that name: there are {', '.join(known)}")


def narrowed(p: Params, seeds: list[str] | None, precision: str | None) -> Params:
    """The parameters with a part of their seeds, and another precision; None leaves either as it is.

    Raises UserError naming the option for a seed that is not among them or is named twice.
    """
    known = {str(seed): seed for seed in p.seeds}
    for seed in seeds or []:
        if seed not in known or seeds.count(seed) > 1:
            raise UserError(f"--seed {seed}: must be one of {', '.join(known)}, each named once at most")
    return p.model_copy(
        update={"seeds": [known[seed] for seed in seeds or known], "precision": precision or p.precision}
    )
