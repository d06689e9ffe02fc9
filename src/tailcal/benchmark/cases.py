"""benchmark/params.yaml, typed and strict: which trainings are timed, and against what."""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from tailcal import method, models, params, yaml12
from tailcal.engine import WARM_UP
from tailcal.errors import UserError
from tailcal.longtail import class_counts
from tailcal.params import PadCrop, Precision, Recipe, Strict, Word

FILE = Path("benchmark/params.yaml")
WRITTEN_BY_HAND = {"published": ("ce", "mixup"), "resident": ("ce", "mixup", "fsgl")}  # a reference, its methods


class Noise(Strict):
    """Images that are made up: uint8 noise with a long tail, so that nothing has to be downloaded.

    `largest` counts the images of the largest class, `factor` times as many as the smallest class has.
    """

    side: Annotated[int, Field(ge=8, le=4096)]
    channels: Literal[1, 3]
    classes: Annotated[int, Field(ge=2)]
    largest: Annotated[int, Field(ge=1)]
    factor: Annotated[float, Field(ge=1)]

    @model_validator(mode="after")
    def _every_class_has_an_image(self) -> "Noise":
        if self.factor > self.largest:
            raise ValueError(f"factor is {self.factor:g}: must not be above largest ({self.largest})")
        return self

    @property
    def counts(self) -> np.ndarray:
        """Images a class, int64 [K]."""
        return class_counts(self.largest, self.classes, self.factor, "exponential")

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [N, H, W, C] and labels int64 [N]."""
        labels = np.repeat(np.arange(self.classes), self.counts)
        shape = (len(labels), self.side, self.side, self.channels)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), labels

    @property
    def augmentation(self) -> PadCrop:
        """As the presets have it for images of 32 pixels, in proportion."""
        return PadCrop(
            kind="pad_crop",
            pad=self.side // 8,
            flip=True,
            cutout=self.side // 2,
            fill=128,
            mean=[0.5] * self.channels,
            std=[0.25] * self.channels,
        )


class Workload(Strict):
    """What is trained. `epochs` are those of a whole training."""

    method: str
    settings: dict[str, Any]
    backbone: str
    batch_size: Annotated[int, Field(ge=2)]
    sam_rho: Annotated[float, Field(ge=0)]
    epochs: Annotated[int, Field(ge=1)]
    images: Noise

    @model_validator(mode="after")
    def _a_whole_batch(self) -> "Workload":
        if not self.steps:
            images = self.images.counts.sum()
            raise ValueError(f"batch_size is {self.batch_size}, but there are {images} images: use {images} or fewer")
        return self

    @property
    def steps(self) -> int:
        """Steps of an epoch, whole batches only."""
        return int(self.images.counts.sum()) // self.batch_size

    def recipe(self, iterations: int) -> Recipe:
        """So many steps of this workload. Rate, momentum and decay are ordinary ones: they do not change the speed."""
        return Recipe(
            iterations=iterations,
            batch_size=self.batch_size,
            last_batch="drop",
            lr=0.01,
            momentum=0.9,
            weight_decay=0.0005,
            sam_rho=self.sam_rho,
            schedule={"shape": "cosine", "warmup": 0, "warmup_lr": 0.0},
        )


class Case(Strict):
    """How a workload is run, and what it is held against. `epochs` are those measured in one round."""

    workload: Word
    replicas: Annotated[int, Field(ge=1, le=1024)]
    precision: Precision
    cuda_graphs: bool
    epochs: Annotated[int, Field(ge=1)]
    against: list[Word]


class Suite(Strict):
    """The cases of one kind of machine, and the one whose start-up is timed."""

    start_up: Word
    cases: Annotated[dict[Word, Case], Field(min_length=1)]


class Benchmark(Strict):
    """The whole of benchmark/params.yaml."""

    repeats: Annotated[int, Field(ge=1, le=1000)]
    workers: Annotated[int, Field(ge=0, le=1024)]
    workloads: dict[Word, Workload]
    cpu: Suite
    cuda: Suite

    @model_validator(mode="after")
    def _on_a_cpu(self) -> "Benchmark":
        for name, case in self.cpu.cases.items():
            if case.cuda_graphs or case.precision == "tf32":
                raise ValueError(f"cpu.cases.{name}: tf32 and cuda_graphs exist only on a GPU: use neither")
        return self

    def workload(self, case: Case) -> Workload:
        """What a case trains."""
        return self.workloads[case.workload]


def load(path: Path = FILE) -> Benchmark:
    """Read and check the file, everything that it names included. Raises UserError (one line) for any mistake."""
    benchmark = params.validate(Benchmark, yaml12.read(path), "", path)
    for name, workload in benchmark.workloads.items():
        _check_workload(workload, f"workloads.{name}", path)
    for device in ("cpu", "cuda"):
        suite = getattr(benchmark, device)
        require(suite.start_up, suite.cases, f"{path}: {device}.start_up")
        for name, case in suite.cases.items():
            _check_case(case, benchmark, suite, f"{path}: {device}.cases.{name}")
    return benchmark


def require(name: str, there_are: Any, key: str) -> None:
    """Raise UserError when `name`, the value of this key, is none of the names there are."""
    if name not in there_are:
        raise UserError(f"{key}: must be one of {', '.join(there_are)}, got {name!r}")


def _check_workload(workload: Workload, key: str, path: Path) -> None:
    takes_steps = [name for name in method.names() if method.load(name).trained]
    require(workload.method, takes_steps, f"{path}: {key}.method")
    require(workload.backbone, models.BACKBONES, f"{path}: {key}.backbone")
    params.validate(method.load(workload.method).Config, workload.settings, f"{key}.settings", path)


def _check_case(case: Case, benchmark: Benchmark, suite: Suite, key: str) -> None:
    require(case.workload, benchmark.workloads, f"{key}.workload")
    workload = benchmark.workload(case)
    if case.cuda_graphs and workload.steps <= WARM_UP:
        raise UserError(
            f"{key}.cuda_graphs: is true, but an epoch of {case.workload} has {workload.steps} steps: "
            f"it must have more than {WARM_UP} for the recording to fall into the one that does not count"
        )
    for rival in case.against:
        require(rival, [*WRITTEN_BY_HAND, *suite.cases], f"{key}.against")
        if workload.method not in WRITTEN_BY_HAND.get(rival, [workload.method]):
            known = ", ".join(WRITTEN_BY_HAND[rival])
            raise UserError(f"{key}.against: there is no loop {rival} of {workload.method}: there are {known}")
