"""What one training goes by, once the data set's overrides have been applied to the method's block.

The stage `check` writes these settings to one small file a training. DVC compares those files, so a change reruns
exactly the trainings whose own settings it changes, however it came about: a recipe, a preset, a method's block.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tailcal import method, models, params
from tailcal.errors import UserError
from tailcal.method import Stage
from tailcal.params import Augmentation, Params, Recipe, Strict

RECIPE = {"representations": "represent", "classifiers": "calibrate"}  # the data set's default recipe of each stage


@dataclass(frozen=True)
class Training:
    """Everything that one training depends on, but for code, data, seed and (stage 2) the representation.

    `backbone` is None in stage 2, where it is the representation's; `recipe` is None for a method that takes no step.
    """

    method: str
    settings: Strict
    augmentation: Augmentation
    backbone: str | None
    recipe_name: str | None
    recipe: Recipe | None

    def record(self) -> dict[str, Any]:
        """As plain values, for a JSON file."""
        return {
            field.name: value.model_dump(exclude_none=True) if isinstance(value, Strict) else value
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }


def training(p: Params, dataset_name: str, name: str, stage: Stage, root: Path = Path()) -> Training:
    """The settings of one method on one data set; presets lie below `root`. Raises UserError naming the wrong key."""
    dataset = params.dataset(p, dataset_name, root)
    override = dict(dataset.overrides.get(name, {}))
    block = params.chosen(getattr(p, stage), name, stage)
    config = method.configure(name, block, stage)
    backbone = recipe_name = None
    if stage == "representations":
        key = f"overrides.{name}.backbone" if "backbone" in override else "backbone"
        backbone = override.pop("backbone", dataset.backbone)
        if backbone not in models.BACKBONES:
            raise UserError(f"{dataset.key(key)}: must be one of {', '.join(models.BACKBONES)}, got {backbone!r}")
    if method.load(name).trained:
        recipe_name = override.pop("recipe", getattr(dataset, RECIPE[stage]))
    if override:
        # The block alone was right, so what is wrong with both together is the override's.
        config = dataset.validate_block(type(config), block | override, f"overrides.{name}")
    return Training(name, config, dataset.augmentation, backbone, recipe_name, p.recipes.get(recipe_name))
