"""What one training goes by, once the data set's overrides have been applied to the method's block.

The stage `check` writes these settings to one small file a training, with a digest of its code. DVC compares those
files, so a change reruns exactly the trainings whose own settings it changes, however it came about: a recipe, a
preset, a method's block, a method's file.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tailcal import method, models, params, splits
from tailcal.errors import UserError
from tailcal.method import Stage
from tailcal.models import imagenet
from tailcal.params import PARAMS, Augmentation, Override, Params, Pretrained, Recipe, Strict

RECIPE = {"representations": "represent", "classifiers": "calibrate"}  # the data set's default recipe of each stage


@dataclass(frozen=True)
class Training:
    """Everything that one training depends on, but for code, data, seed and (stage 2) the representation.

    `name` is the block's, as on the grid; `method` is the file's. `backbone` is None in stage 2, where it is the
    representation's; `recipe` is None for a method that takes no step; `pretrained` is None for a backbone that begins
    at random.
    """

    name: str
    method: str
    settings: Strict
    augmentation: Augmentation
    backbone: str | None
    recipe_name: str | None
    recipe: Recipe | None
    pretrained: Pretrained | None
    recipe_key: str | None  # file and key of the recipe, for an error line

    def record(self, precision: str) -> dict[str, Any]:
        """As plain values, for a JSON file, with the precision that it trains in."""
        own = {
            field.name: value.model_dump(exclude_none=True) if isinstance(value, Strict) else value
            for field in fields(self)
            if field.name != "recipe_key" and (value := getattr(self, field.name)) is not None
        }
        return own | {"precision": precision}


def of_cell(p: Params, dataset_name: str, representation: str, classifier: str, root: Path = Path()) -> dict[str, Any]:
    """All that a cell's training depends on of the parameters, as its provenance has it; presets lie below `root`.
    Raises UserError."""
    return {
        "dataset": splits.cut(params.dataset(p, dataset_name, root)),
        "representation": training(p, dataset_name, representation, "representations", root).record(p.precision),
        "classifier": training(p, dataset_name, classifier, "classifiers", root).record(p.precision),
    }


def training(p: Params, dataset_name: str, name: str, stage: Stage, root: Path = Path()) -> Training:
    """The settings of one block on one data set; presets lie below `root`. Raises UserError naming the wrong key."""
    dataset = params.dataset(p, dataset_name, root)
    override = dataset.overrides.get(name, Override())
    block = params.chosen(getattr(p, stage), name, stage)
    chosen, own = method.resolve(name, block, stage)
    Method = method.load(chosen)
    config = params.validate(Method.Config, own, f"{stage}.{name}")
    backbone = recipe_name = pretrained = None
    if stage == "representations":
        key = f"overrides.{name}.backbone" if override.backbone else "backbone"
        backbone = override.backbone or dataset.backbone
        pretrained = dataset.pretrained
        if pretrained and backbone not in imagenet.BACKBONES:
            known = ", ".join(imagenet.BACKBONES)
            raise UserError(f"{dataset.key(key)}: {backbone} cannot be pretrained: use one of {known}")
        if backbone not in models.BACKBONES:
            raise UserError(f"{dataset.key(key)}: must be one of {', '.join(models.BACKBONES)}, got {backbone!r}")
    elif override.backbone:
        raise UserError(f"{dataset.key(f'overrides.{name}.backbone')}: a classifier has no backbone of its own")
    if override.recipe and not Method.trained:
        raise UserError(f"{dataset.key(f'overrides.{name}.recipe')}: {name} takes no training step, so has no recipe")
    if Method.trained:
        recipe_name = override.recipe or getattr(dataset, RECIPE[stage])
    if override.settings:
        # The block alone was right, so what is wrong with both together is the override's.
        config = dataset.validate_block(Method.Config, own | override.settings, f"overrides.{name}")
    recipe = recipe_key = None
    if recipe_name in dataset.recipes:
        recipe, recipe_key = dataset.recipes[recipe_name], dataset.key(f"recipes.{recipe_name}")
    elif recipe_name:
        recipe, recipe_key = p.recipes[recipe_name], f"{PARAMS}: recipes.{recipe_name}"
    return Training(
        name=name,
        method=chosen,
        settings=config,
        augmentation=dataset.augmentation,
        backbone=backbone,
        recipe_name=recipe_name,
        recipe=recipe,
        pretrained=pretrained,
        recipe_key=recipe_key,
    )
