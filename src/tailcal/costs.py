"""What trainings took on the machine that ran them: beside the results, and part of none.

A stage writes data/costs/<stage>/<cell>.json, which DVC does not track: times differ from run to run, and results must
not. The stage report makes one page of those that are there. Imports no torch.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tailcal.errors import UserError
from tailcal.files import read_json, write_json

T = TypeVar("T")


@dataclass
class Cost:
    """What one training has taken so far, interruptions left out. seconds: wall-clock time of its epochs, beside
    whatever else ran; waited: how much of it was spent waiting for images; images: how many it has seen."""

    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0

    def add(self, images: int, seconds: float) -> None:
        """Count an epoch."""
        self.images += images
        self.seconds += seconds

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, with the time taken until each is there."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - began
            yield batch


def write(path: Path, machine: dict[str, Any], placement: str, at_once: int, costs: dict[int, Cost]) -> None:
    """Write what the training of each seed took: on which machine, where its images lay, how many were side by side."""
    seeds = {str(seed): {key: round(value, 3) for key, value in asdict(cost).items()} for seed, cost in costs.items()}
    write_json(path, {"machine": machine, "placement": placement, "at_once": at_once, "seeds": seeds})


def rows(folder: Path) -> list[dict[str, Any]]:
    """One row per training whose costs lie below `folder`, its seeds together: those that took no step are left out."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        record = read_json(path)
        try:
            seeds = [Cost(**cost) for cost in record["seeds"].values()]
            images, seconds = sum(cost.images for cost in seeds), sum(cost.seconds for cost in seeds)
            row = {
                "stage": path.parent.name,
                "cell": path.stem.replace("-", "/"),
                "machine": record["machine"]["name"],
                "networks": len(seeds),
                "at_once": record["at_once"],
                "images": images,
                "seconds": seconds / len(seeds),
                "placement": record["placement"],
                "waited": sum(cost.waited for cost in seeds) / len(seeds),
                "gpu_memory": record["machine"]["gpu_memory"],
            }
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{path} is damaged ({error!r}): delete it") from None
        if images:
            found.append(row | {"rate": images / max(seconds, 1e-9)})
    return found
