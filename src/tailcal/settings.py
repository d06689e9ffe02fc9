"""What one training depends on, once the data set's overrides have been applied to the method's block.

The stage `check` writes these settings to one small file per training, with a digest of its code. DVC compares those
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
        "dataset": splits.record(params.dataset(p, dataset_name, root)),
        "representation": training(p, dataset_name, representation, "representations", root).record(p.precision),
        "classifier": training(p, dataset_name, classifier, "classifiers", root).record(p.precision),
    }


def training(p: Params, dataset_name: str, name: str, stage: Stage, root: Path = Path()) -> Training:
    """The settings of one block on one data set; presets lie below `root`. Raises UserError naming the wrong key."""
    dataset = params.dataset(p, dataset_name, root)
    override = dataset.overrides.get(name, Override())
    chosen, own = method.resolve(name, params.chosen(getattr(p, stage), name, stage), stage)
    Method = method.load(chosen)
    config = params.validate(Method.Config, own, f"{stage}.{name}")
    backbone = _backbone(dataset, name, override, stage)
    recipe_name, recipe, recipe_key = _recipe(p, dataset, name, override, stage, Method.trained)
    if override.settings:
        # The block alone was right, so what is wrong with both together is the override's.
        config = dataset.validate_block(Method.Config, own | override.settings, f"overrides.{name}")
    return Training(
        name=name,
        method=chosen,
        settings=config,
        augmentation=dataset.augmentation,
        backbone=backbone,
        recipe_name=recipe_name,
        recipe=recipe,
        pretrained=dataset.pretrained if backbone else None,
        recipe_key=recipe_key,
    )


def _backbone(dataset: params.Dataset, name: str, override: Override, stage: Stage) -> str | None:
    """The backbone that a block trains; None in stage 2. Raises UserError naming the key of one that cannot be."""
    if stage == "classifiers":
        if override.backbone:
            raise UserError(f"{dataset.key(f'overrides.{name}.backbone')}: a classifier has no backbone of its own")
        return None
    key = dataset.key(f"overrides.{name}.backbone" if override.backbone else "backbone")
    backbone = override.backbone or dataset.backbone
    if dataset.pretrained and backbone not in imagenet.BACKBONES:
        raise UserError(f"{key}: {backbone} cannot be pretrained: use one of {', '.join(imagenet.BACKBONES)}")
    if backbone not in models.BACKBONES:
        raise UserError(f"{key}: must be one of {', '.join(models.BACKBONES)}, got {backbone!r}")
    return backbone


def _recipe(
    p: Params, dataset: params.Dataset, name: str, override: Override, stage: Stage, trained: bool
) -> tuple[str | None, Recipe | None, str | None]:
    """Name, recipe, and file and key of it; None of each for a method that takes no step, which may not be given one:
    that raises UserError."""
    if not trained:
        if override.recipe:
            key = dataset.key(f"overrides.{name}.recipe")
            raise UserError(f"{key}: {name} takes no training step, so has no recipe")
        return None, None, None
    chosen = override.recipe or getattr(dataset, RECIPE[stage])
    if chosen in dataset.recipes:
        return chosen, dataset.recipes[chosen], dataset.key(f"recipes.{chosen}")
    return chosen, p.recipes[chosen], f"{PARAMS}: recipes.{chosen}"
