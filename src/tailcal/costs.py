"""What trainings took on the machine that ran them: beside the results, and part of none.

A stage writes data/costs/<stage>/<cell>.json, which DVC does not track: times differ from run to run, and results must
not. The stage report makes one page of those that are there. Imports no torch.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tailcal.errors import UserError
from tailcal.files import read_json, write_json

T = TypeVar("T")


@dataclass
class Cost:
    """What one training has taken so far, interruptions left out.

    seconds: wall-clock time of its epochs, beside whatever else ran; waited: how much of it was spent waiting for
    images; images: batch size times steps; machine: what its last epoch ran on, {name, gpu_memory}; placement: where
    the images lay then; at_once: how many networks trained side by side, this one included.
    """

    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0
    machine: dict[str, Any] | None = None
    placement: str | None = None
    at_once: int | None = None

    def add(self, images: int, seconds: float, machine: dict[str, Any], placement: str, at_once: int) -> None:
        """Count an epoch."""
        self.images += images
        self.seconds += seconds
        self.machine, self.placement, self.at_once = machine, placement, at_once

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, with the time taken until each is there."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - began
            yield batch


def write(path: Path, costs: dict[int, Cost]) -> None:
    """Write what the training of each seed took."""
    rounded = {
        str(seed): asdict(replace(cost, seconds=round(cost.seconds, 3), waited=round(cost.waited, 3)))
        for seed, cost in costs.items()
    }
    write_json(path, rounded)


def read(path: Path) -> dict[int, Cost]:
    """What `write` wrote. Raises UserError when the file is missing or damaged."""
    record = read_json(path)
    try:
        return {int(seed): Cost(**cost) for seed, cost in record.items()}
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it") from None


def rows(folder: Path) -> list[dict[str, Any]]:
    """One row per training whose costs lie below `folder`, its seeds together: those that took no step are left out."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        if seeds := [cost for cost in read(path).values() if cost.images]:
            try:
                found.append({"stage": path.parent.name, "cell": path.stem.replace("-", "/")} | _row(seeds))
            except (KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged ({error!r}): delete it") from None
    return found


def _row(seeds: list[Cost]) -> dict[str, Any]:
    images, seconds = sum(cost.images for cost in seeds), sum(cost.seconds for cost in seeds)
    memory = [cost.machine["gpu_memory"] for cost in seeds if cost.machine["gpu_memory"] is not None]
    return {
        "machine": _each(cost.machine["name"] for cost in seeds),
        "networks": len(seeds),
        "at_once": _each(str(cost.at_once) for cost in seeds),
        "images": images,
        "seconds": seconds / len(seeds),
        "rate": images / max(seconds, 1e-9),
        "placement": _each(cost.placement for cost in seeds),
        "waited": sum(cost.waited for cost in seeds) / len(seeds),
        "gpu_memory": max(memory, default=None),
    }


def _each(texts: Iterable[str]) -> str:
    """The different ones of the texts."""
    return ", ".join(dict.fromkeys(texts))
