"""params.yaml and presets/, typed and strict: a wrong key is one clear line. Imports no torch.

A data set on the grid is a block of `datasets`, or else the file `presets/<name>.yaml`, which holds such a block. The
blocks under `representations` and `classifiers` belong to the methods that their key `method` names, or else to those
of the same name; each method file declares its own Config, which `tailcal.method.configure` applies. The block `source`
of a data set belongs to a module of `tailcal.sources` in the same way.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from tailcal import yaml12
from tailcal.errors import UserError
from tailcal.files import REPRO

PARAMS = Path("params.yaml")
PRESETS = Path("presets")
NAMED_PROBLEMS = 3  # that one line tells
TAGS = ("cosine", "multistep", "pad_crop", "resized_crop", "exponential", "step", "natural")
MANY = 10**9  # images of a class, more than any data set has

T = TypeVar("T")
Model = TypeVar("Model", bound="Strict")


class Strict(BaseModel):
    """Base of every block: no unknown keys, no coercion of types, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, block: Any) -> Any:
        """What `extra` says, but with the keys there are."""
        strict = cls.model_config["extra"] == "forbid" and isinstance(block, dict)
        if strict and (unknown := [str(key) for key in block if key not in cls.model_fields]):
            known = ", ".join(cls.model_fields) or "none"
            raise PydanticCustomError(
                "unknown_key", "unknown key: there are {known}", {"key": unknown[0], "known": known}
            )
        return block


class Recorded(Strict):
    """Base of what is needed of a file that the pipeline has written: there is more in it."""

    model_config = ConfigDict(extra="ignore")


def _word(name: str) -> str:
    # DVC joins names with -, and legends leave out what begins with _.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name):
        raise ValueError("must be letters, digits and _ only, and not begin with _")
    return name


def _distinct(values: list) -> list:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"lists {repeated[0]} more than once")
    return values


Word = Annotated[str, AfterValidator(_word)]
Words = Annotated[list[Word], Field(min_length=1), AfterValidator(_distinct)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), AfterValidator(_distinct)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Grid(Strict):
    """The axes of the experiment grid; dvc.yaml makes its stages from them."""

    datasets: Words
    representations: Words
    classifiers: Words


Precision = Literal["float32", "tf32", "bf16"]
Placement = Literal["auto", "device", "host", "disk"]  # of the images, see `tailcal.store`


class Runtime(Strict):
    """Where and how it runs. No stage tracks this block: changing it reruns nothing."""

    device: Literal["auto", "cpu", "cuda"]
    replicas: Annotated[int, Field(ge=1, le=1024)]
    processes: Annotated[int, Field(ge=1, le=1024)]
    placement: Placement
    cuda_graphs: bool
    checkpoint_seconds: Annotated[float, Field(ge=0)]


class _Imbalance(Strict):
    """`seed` decides which images are held out, and which are kept."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]

    def record(self) -> dict[str, Any]:
        """As plain values, for a JSON file."""
        return self.model_dump(exclude_none=True)


class LongTail(_Imbalance):
    """A long tail that is cut (Cui et al. 2019, Cao et al. 2019), its largest class `factor` times its smallest.

    `largest` is the number of images of the largest class: by default as many as the rarest class of the source has
    beside its hold-out, which of a source whose own classes differ in size may be few.
    """

    profile: Literal["exponential", "step"]
    factor: Annotated[float, Field(ge=1)]
    largest: Annotated[int, Field(ge=1, le=MANY)] | None = None


class Natural(_Imbalance):
    """Every image is kept, as frequent as the classes are."""

    profile: Literal["natural"]

    @model_validator(mode="before")
    @classmethod
    def _keeps_all(cls, block: dict[str, Any]) -> dict[str, Any]:
        for key in ("factor", "largest"):
            if key in block:
                raise ValueError(f"{key} must not be given with profile natural, which keeps every image")
        return block


Imbalance = Annotated[LongTail | Natural, Field(discriminator="profile")]


class _Normalised(Strict):
    """What every augmentation ends with: pixels in [0, 1], less `mean`, by `std`; one value a channel."""

    mean: Annotated[list[Fraction], Field(min_length=1)]
    std: Annotated[list[Annotated[float, Field(ge=1e-3, le=1e3)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _same_channels(self) -> "_Normalised":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}: one a channel each")
        return self


class PadCrop(_Normalised):
    """For small images, which keep their size.

    standard: zero-pad by `pad`, random crop, horizontal flip; strong: then AutoAugment's CIFAR-10 policy, with pixels
    of value `fill` where it looks beyond an image, and one hole of `cutout` pixels' side. Test images are used as they
    are.
    """

    kind: Literal["pad_crop"]
    pad: Annotated[int, Field(ge=0, le=64)]
    flip: bool
    cutout: Annotated[int, Field(ge=1, le=65536)]
    fill: Annotated[int, Field(ge=0, le=255)]


class ResizedCrop(_Normalised):
    """For large images: a random part of at least `min_area` of the image, brought to `size` pixels' side.

    standard: that, horizontal flip, and brightness, contrast and saturation jittered by up to `jitter`; strong: then
    grey with probability `grey` and blurred with probability `blur`. Of test images the central `size` pixels are used.
    """

    kind: Literal["resized_crop"]
    size: Annotated[int, Field(ge=7)]  # the blur is 13 pixels wide and mirrors at the border
    min_area: Annotated[float, Field(gt=0, le=1)]
    flip: bool
    jitter: Annotated[float, Field(ge=0, le=1)]
    grey: Fraction
    blur: Fraction


Augmentation = Annotated[PadCrop | ResizedCrop, Field(discriminator="kind")]


class CosineSchedule(Strict):
    """Linear warm-up, then half a cosine down to 0, stepped once per epoch."""

    shape: Literal["cosine"]
    warmup: Annotated[int, Field(ge=0)]
    warmup_lr: Annotated[float, Field(ge=0, le=1000)]


class MultiStep(Strict):
    """Linear warm-up, then times `gamma` after each milestone, stepped once per epoch."""

    shape: Literal["multistep"]
    warmup: Annotated[int, Field(ge=0)]
    warmup_lr: Annotated[float, Field(ge=0, le=1000)]
    milestones: list[Annotated[int, Field(ge=1)]]
    gamma: Annotated[float, Field(gt=0, le=1)]

    @model_validator(mode="after")
    def _ascending(self) -> "MultiStep":
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise, each above the one before; got {self.milestones}")
        return self


class Recipe(Strict):
    """The budget, optimiser and schedule of one training: SGD with momentum, or SAM around it where `sam_rho` > 0.

    The budget is counted in `epochs` or in `iterations`, and so are the schedule's `warmup` and `milestones`.
    """

    epochs: Annotated[int, Field(ge=1, le=10**6)] | None = None
    iterations: Annotated[int, Field(ge=1, le=10**9)] | None = None
    batch_size: Annotated[int, Field(ge=2)]  # batch norm has no variance over a single image
    last_batch: Literal["fill", "drop"]
    lr: Annotated[float, Field(gt=0, le=1000)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1000)]
    sam_rho: Annotated[float, Field(ge=0, le=1000)]
    schedule: Annotated[CosineSchedule | MultiStep, Field(discriminator="shape")]

    @property
    def budget(self) -> int:
        """Epochs or iterations, whichever the recipe counts in."""
        return self.epochs or self.iterations

    @model_validator(mode="after")
    def _schedule_fits(self) -> "Recipe":
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError("must have a budget: either epochs or iterations, and not both")
        unit = "epochs" if self.epochs else "iterations"
        if isinstance(self.schedule, MultiStep) and max(self.schedule.milestones, default=0) > self.budget:
            last = self.schedule.milestones[-1]
            raise ValueError(f"schedule.milestones names {unit[:-1]} {last}: must not be above {unit} ({self.budget})")
        if self.schedule.warmup >= self.budget:
            raise ValueError(f"schedule.warmup is {self.schedule.warmup}: must be below {unit} ({self.budget})")
        return self


class Pretrained(Strict):
    """A backbone that begins with given weights; `trains` says what of it stage 1 may change."""

    file: str
    trains: Literal["all", "last_block"]


class Override(BaseModel):
    """What differs for one method on one data set; all further keys are settings of the method."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    recipe: Word | None = None
    backbone: Word | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own keys."""
        return self.model_extra


class Dataset(Strict):
    """One data set of the grid: where its images come from, its long tail, and what its trainings use.

    `represent` and `calibrate` name the recipes of the two stages. `overrides` says, a method, what differs on this
    data set: another `recipe`, another `backbone` (of a representation), other settings of the method. `recipes` are
    the data set's own, beside those of params.yaml.
    """

    source: dict[str, Any]
    imbalance: Imbalance
    holdout_per_class: Annotated[int, Field(ge=0, le=MANY)]
    backbone: str
    augmentation: Augmentation
    represent: Word
    calibrate: Word
    overrides: dict[Word, Override]
    recipes: dict[Word, Recipe] = {}
    pretrained: Pretrained | None = None
    _file: Path | None = PrivateAttr(default=None)  # until `resolve` has said where the block stands
    _block: str = PrivateAttr(default="")

    def key(self, name: str) -> str:
        """File and full key of a value of this block, as an error line begins: `params.yaml: datasets.x.source`."""
        return f"{self._file}: {self._block}{name}"

    def validate_block(self, model: type[Model], block: Any, name: str) -> Model:
        """Check a part of this block that another module owns. Raises UserError as `validate` does."""
        return validate(model, block, f"{self._block}{name}", self._file)


class Evaluate(Strict):
    """How predictions are measured: bins of the ECE, and the post-hoc rules with their own settings."""

    bins: Annotated[int, Field(ge=1, le=1000)]
    posthoc: dict[Word, dict[str, Any]]


class Params(Strict):
    """The whole of params.yaml."""

    grid: Grid
    precision: Precision
    seeds: Seeds
    runtime: Runtime
    recipes: dict[Word, Recipe]
    datasets: dict[Word, Dataset]
    representations: dict[Word, dict[str, Any]]
    classifiers: dict[Word, dict[str, Any]]
    evaluate: Evaluate

    @model_validator(mode="after")
    def _names_have_blocks(self) -> "Params":
        for axis in ("representations", "classifiers"):
            for name in getattr(self.grid, axis):
                if name not in getattr(self, axis):
                    other = "classifiers" if axis == "representations" else "representations"
                    wrong = (
                        f"belongs to grid.{other}" if name in getattr(self, other) else f"has no block {axis}.{name}"
                    )
                    known = ", ".join(sorted(getattr(self, axis)))
                    raise ValueError(f"grid.{axis} names {name}, which {wrong}: use one of {known}")
        if both := sorted(self.representations.keys() & self.classifiers.keys()):
            raise ValueError(
                f"classifiers.{both[0]}: representations has a block of that name too, and overrides could not tell "
                "them apart: use another name"
            )
        return self


def describe(error: ValidationError, where: str) -> str:
    """One line for the first problems that pydantic found, with each key's full dotted name.

    `where` is the dotted name of the block that was validated, or "" for the whole file.
    """
    # An unknown key first, as it is what a misspelt one is.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "unknown_key")
    said = [_problem(problem, where) for problem in problems[:NAMED_PROBLEMS]]
    more = len(problems) - len(said)
    return "; ".join(said) + (f" (and {more} more)" if more else "")


def _problem(problem: Any, where: str) -> str:
    """One problem of pydantic's, with the key's full dotted name."""
    # A discriminated union adds the chosen tag to the location, after its own key.
    tagged = [before in ("schedule", "augmentation", "imbalance") for before in (None, *problem["loc"])]
    path = [str(part) for part, is_tag in zip(problem["loc"], tagged, strict=False) if not (is_tag and part in TAGS)]
    unknown = problem["ctx"]["key"] if problem["type"] == "unknown_key" else ""
    key = ".".join([part for part in [where, *path, unknown] if part])
    if unknown:
        return f"{key}: {problem['msg']}"
    if problem["type"] == "missing":
        return f"{key}: this key is missing"
    if problem["type"] == "too_short":
        least = problem["ctx"]["min_length"]
        return f"{key}: must have {least} {'entry' if least == 1 else 'entries'} or more"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.{problem['ctx']['discriminator'].strip(chr(39))}: this key is missing"
    if problem["type"] == "union_tag_invalid":
        chosen = problem["ctx"]
        tag = chosen["discriminator"].strip("'")
        return f"{key}.{tag}: must be one of {chosen['expected_tags'].replace(chr(39), '')}, got {chosen['tag']!r}"
    shown = "" if isinstance(problem["input"], dict | list | BaseModel) else f", got {problem['input']!r}"
    said = f"{key}: " if key else ""
    if problem["type"] in ("model_type", "dict_type"):  # pydantic's own words name our classes
        return f"{said}must be a mapping of keys to values{shown}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{said}{message[0].lower() + message[1:]}{shown}"


def validate(model: type[Model], block: Any, where: str, file: Path = PARAMS) -> Model:
    """Validate one block. Raises UserError with one line naming the file, the key, and what would be right."""
    try:
        return model.model_validate(block)
    except ValidationError as error:
        raise UserError(f"{file}: {describe(error, where)}") from None


def recorded(model: type[Model], content: Any, path: Path, remove: Path | None = None) -> Model:
    """What is needed of `content`, of the JSON file `path` that the pipeline has written.

    Raises UserError naming the file and the key that is missing or wrong; `remove` is what to delete then (by default
    the file itself).
    """
    try:
        return validate(model, content, "", path)
    except UserError as error:
        raise UserError(f"{error}; it is damaged, or of another version: delete {remove or 'it'} and {REPRO}") from None


def dataset(p: Params, name: str, root: Path = Path()) -> Dataset:
    """The data set `name`: its block of `datasets`, or the preset of that name below `root`.

    Raises UserError (one line) when there is neither, when the preset is wrong, or when it uses a name without a block.
    """
    preset = PRESETS / f"{name}.yaml"
    if (found := p.datasets.get(name)) and found._file:
        return found
    if found and (root / preset).exists():
        raise UserError(f"{PARAMS}: datasets.{name} is also the file {preset}: rename one of the two")
    if found:
        return resolve(p, found, PARAMS, f"datasets.{name}.")
    if (root / preset).is_file():
        return resolve(p, validate(Dataset, yaml12.read(root / preset), "", preset), preset, "")
    if (root / preset).exists() or (root / preset).is_symlink():
        raise UserError(f"{preset}: must be a file, or a link to one")
    blocks = sorted({*p.datasets, *(file.stem for file in (root / PRESETS).glob("*.yaml") if file.is_file())})
    raise UserError(
        f"{PARAMS}: there is no data set {name}: add datasets.{name} or {preset}, or use one of {', '.join(blocks)}"
    )


def resolve(p: Params, found: Dataset, file: Path, block: str) -> Dataset:
    """Tell a data set where its block stands, and check the names that it uses: its `file`, and there the key `block`.

    Raises UserError (one line) for a name without a block in `p`.
    """
    found._file, found._block = file, block
    used = {"represent": found.represent, "calibrate": found.calibrate} | {
        f"overrides.{method}.recipe": override.recipe
        for method, override in found.overrides.items()
        if override.recipe is not None
    }
    known = p.recipes | found.recipes
    for key, recipe in used.items():
        if recipe not in known:
            raise UserError(f"{found.key(key)}: there is no recipe {recipe!r}: there are {', '.join(sorted(known))}")
    if chosen := [name for name, override in found.overrides.items() if "method" in override.settings]:
        raise UserError(
            f"{found.key(f'overrides.{chosen[0]}.method')}: a data set cannot choose another method: give it a block "
            f"of its own in {PARAMS}"
        )
    if unknown := sorted(set(found.overrides) - set(p.representations) - set(p.classifiers)):
        blocks = ", ".join(sorted([*p.representations, *p.classifiers]))
        raise UserError(
            f"{found.key('overrides')}.{unknown[0]}: no method of that name has a block in {PARAMS}: there are {blocks}"
        )
    return found


def load(path: Path = PARAMS) -> Params:
    """Read and check params.yaml, and the presets that its grid names. Raises UserError (one line) for any mistake."""
    p = validate(Params, yaml12.read(path), "")
    for name in dict.fromkeys([*p.grid.datasets, *p.datasets]):  # in this order: of several mistakes the first is told
        dataset(p, name, path.parent)
    return p


def chosen(blocks: dict[str, T], name: str, axis: str) -> T:
    """`blocks[name]`, or a UserError that lists the names there are."""
    if name not in blocks:
        raise UserError(f"{PARAMS}: {axis} has no block {name}: there are {', '.join(sorted(blocks))}")
    return blocks[name]
