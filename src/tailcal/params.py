"""params.yaml, typed and strict: an unknown, missing or out-of-range key is one clear line. Imports no torch.

The blocks under `representations` and `classifiers` belong to the methods of the same name; each method file declares
its own Config, which `tailcal.method.configure` applies. The block `datasets.<name>.source` belongs to a module of
`tailcal.sources` in the same way.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tailcal.errors import UserError

PARAMS = Path("params.yaml")


class Strict(BaseModel):
    """Base of every block: no unknown keys, no coercion of types, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _word(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ValueError("must be letters, digits and _ only (DVC joins names with -)")
    return name


def _distinct(values: list) -> list:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"lists {repeated[0]} more than once")
    return values


Word = Annotated[str, AfterValidator(_word)]
Words = Annotated[list[Word], Field(min_length=1), AfterValidator(_distinct)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Grid(Strict):
    """The axes of the experiment grid; dvc.yaml makes its stages from them."""

    datasets: Words
    representations: Words
    classifiers: Words


class Runtime(Strict):
    """Where and how it runs. No stage tracks this block: changing it reruns nothing."""

    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Field(ge=1, le=1024)]
    checkpoint_seconds: Annotated[float, Field(ge=0)]


class Imbalance(Strict):
    """The long-tailed profile (methods: Cui et al. 2019, Cao et al. 2019)."""

    profile: Literal["exponential", "step", "natural"]
    factor: Annotated[float, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]


class Augmentation(Strict):
    """Standard augmentation: zero-pad, random crop, horizontal flip; then normalise per channel (pixels in [0, 1])."""

    pad: Annotated[int, Field(ge=0, le=64)]
    flip: bool
    mean: Annotated[list[float], Field(min_length=1)]
    std: Annotated[list[Positive], Field(min_length=1)]

    @model_validator(mode="after")
    def _same_channels(self) -> "Augmentation":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}: one a channel each")
        return self


class Cosine(Strict):
    """Linear warm-up over `warmup_epochs`, then half a cosine down to 0, stepped once an epoch."""

    shape: Literal["cosine"]
    warmup_epochs: Annotated[int, Field(ge=0)]


class MultiStep(Strict):
    """Linear warm-up over `warmup_epochs`, then times `gamma` after each milestone epoch."""

    shape: Literal["multistep"]
    warmup_epochs: Annotated[int, Field(ge=0)]
    milestones: list[Annotated[int, Field(ge=1)]]
    gamma: Positive

    @model_validator(mode="after")
    def _ascending(self) -> "MultiStep":
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise, each above the one before; got {self.milestones}")
        return self


class Recipe(Strict):
    """The budget and optimiser of one training: SGD with momentum."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    last_batch: Literal["fill", "drop"]
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Annotated[Cosine | MultiStep, Field(discriminator="shape")]

    @model_validator(mode="after")
    def _schedule_fits(self) -> "Recipe":
        if isinstance(self.schedule, MultiStep) and max(self.schedule.milestones, default=0) > self.epochs:
            last = self.schedule.milestones[-1]
            raise ValueError(f"schedule.milestones names epoch {last}: must not be above epochs ({self.epochs})")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs is {self.schedule.warmup_epochs}: must be below epochs ({self.epochs})"
            )
        return self


class Dataset(Strict):
    """One data set of the grid: where its images come from, its long tail, and the training budget scaled to it."""

    source: dict[str, Any]
    imbalance: Imbalance
    holdout_per_class: Annotated[int, Field(ge=0)]
    backbone: str
    augmentation: Augmentation
    represent: Recipe
    calibrate: Recipe


class Evaluate(Strict):
    """How predictions are measured: bins of the ECE, and the post-hoc rules with their own settings."""

    bins: Annotated[int, Field(ge=1, le=1000)]
    posthoc: dict[Word, dict[str, Any]]


class Params(Strict):
    """The whole of params.yaml."""

    grid: Grid
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), AfterValidator(_distinct)]
    runtime: Runtime
    datasets: dict[Word, Dataset]
    representations: dict[Word, dict[str, Any]]
    classifiers: dict[Word, dict[str, Any]]
    evaluate: Evaluate

    @model_validator(mode="after")
    def _grid_has_blocks(self) -> "Params":
        for axis in ("datasets", "representations", "classifiers"):
            blocks = getattr(self, axis)
            for name in getattr(self.grid, axis):
                if name not in blocks:
                    raise ValueError(
                        f"grid.{axis} names {name}, which has no block: add {axis}.{name}, "
                        f"or use one of {', '.join(sorted(blocks))}"
                    )
        return self


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, in which 1e-05 and `on` are a text and a bool; DVC writes and reads YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] not in ("float", "bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def describe(error: ValidationError, where: str) -> str:
    """One line for the first problem that pydantic found, with the key's full dotted name.

    `where` is the dotted name of the block that was validated, or "" for the whole file.
    """
    # An unknown key first: where one is misspelt, the right one is missing too, and the typo is what the user needs.
    first = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")[0]
    # A discriminated union adds the chosen tag to the location; no key of ours is called that.
    path = [str(part) for part in first["loc"] if part not in ("cosine", "multistep")]
    key = ".".join([part for part in [where, *path] if part])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    kind = first["type"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{more}"
    if kind == "missing":
        return f"{key}: this key is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], dict | list | BaseModel) else f", got {first['input']!r}"
    return f"{key + ': ' if key else ''}{message[0].lower() + message[1:]}{shown}{more}"


def validate(model: type[Strict], block: Any, where: str) -> Any:
    """Validate one block. Raises UserError with one line naming params.yaml, the key, and what would be right."""
    try:
        return model.model_validate(block)
    except ValidationError as error:
        raise UserError(f"{PARAMS}: {describe(error, where)}") from None


def load(path: Path = PARAMS) -> Params:
    """Read and check params.yaml. Raises UserError (one line) when anything in it is wrong."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run this from the project's root") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: must be text in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of keys to values")
    return validate(Params, raw, "")


def chosen(blocks: dict[str, Any], name: str, axis: str) -> Any:
    """`blocks[name]`, or a UserError that lists the names there are."""
    if name not in blocks:
        raise UserError(f"{PARAMS}: {axis} has no block {name}: there are {', '.join(sorted(blocks))}")
    return blocks[name]
