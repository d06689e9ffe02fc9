"""published/params.yaml, typed and strict: what is trained for the published tables. Imports no torch."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tailcal import params
from tailcal.errors import UserError
from tailcal.params import Dataset, Grid, Params, Seeds, Strict, Word, Words

PLAN = Path("published/params.yaml")


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
    rule: Word = "none"


class Footing(Strict):
    """A table of one footing: methods on one data set that share all that is not the method."""

    title: str
    dataset: Word
    rows: Annotated[list[Row], Field(min_length=1)]


class Plan(Strict):
    """The whole of published/params.yaml."""

    seeds: Seeds
    late_epochs: Annotated[int, Field(ge=0)]
    tables: dict[Word, Annotated[list[Grid], Field(min_length=1)]]
    datasets: dict[Word, Variant]
    footing: dict[Word, Footing]

    def trainings(self, table: str) -> Iterator[tuple[str, str, Words]]:
        """Each (data set, representation) of a table once, with all its classifiers, in the order of training."""
        classifiers: dict[tuple[str, str], list[str]] = {}
        for grid in self.tables[table]:
            for pair in product(grid.datasets, grid.representations):
                classifiers.setdefault(pair, []).extend(grid.classifiers)
        for (dataset, representation), names in classifiers.items():
            yield dataset, representation, list(dict.fromkeys(names))


def load(p: Params, path: Path = PLAN) -> tuple[Plan, Params]:
    """The plan, and `p` with the plan's seeds and data sets in place of its own.

    Raises UserError (one line) naming the key that is wrong.
    """
    plan = params.validate(Plan, params.read(path), "", path)
    named = {name for grids in plan.tables.values() for grid in grids for name in grid.datasets}
    datasets = {name: _dataset(p, plan, name, path) for name in sorted(named)}
    return plan, p.model_copy(update={"seeds": plan.seeds, "datasets": datasets})


def _dataset(p: Params, plan: Plan, name: str, path: Path) -> Dataset:
    """A data set of the plan: a preset, or a variant of one."""
    root = path.parent.parent
    if name not in plan.datasets:
        return params.dataset(p, name, root)
    variant = plan.datasets[name]
    preset = root / params.PRESETS / f"{variant.preset}.yaml"
    if not preset.is_file():
        raise UserError(f"{path}: datasets.{name}.preset: there is no {preset}")
    recipes = {
        recipe: (p.recipes[recipe].model_dump(exclude_none=True) if recipe in p.recipes else {}) | changes
        for recipe, changes in variant.recipes.items()
    }
    block = params.read(preset) | variant.model_extra
    block["recipes"] = block.get("recipes", {}) | recipes
    return params.resolve(p, params.validate(Dataset, block, f"datasets.{name}", path), path, f"datasets.{name}.")
