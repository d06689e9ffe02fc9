"""One network per seed: how both stages train them, and what they write of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch

from stages import paths
from tailcal import costs, files, method, models, params, settings, splits, store, train, weights

HISTORY = ["epoch", "seed", "lr", "loss", "train_accuracy"]


def read_images(
    folder: Path,
    split: Literal["train", "holdout", "test"],
    dataset: params.Dataset,
    device: torch.device,
    placement: store.Placement,
) -> store.Images:
    """A split of the long-tailed data set in `folder`, placed. Raises UserError for one that is damaged, that the data
    set's augmentation does not fit, or for which there is no room."""
    images, labels = splits.read_split(folder, split)
    splits.check_augmentation(dataset, *images.shape[1:])
    with train.enough_memory("set runtime.placement to auto or disk"):
        return store.Images(images, labels, dataset.augmentation, device, placement)


@dataclass(frozen=True)
class Opened:
    """What a training begins with. counts: training images of each class, int64 [K]; data: the training split."""

    dataset: params.Dataset
    training: settings.Training
    device: torch.device
    longtail: Path
    meta: splits.Meta
    counts: torch.Tensor
    data: store.Images


def open_training(p: params.Params, dataset_name: str, name: str, stage: settings.Stage) -> Opened:
    """The training split for the method `name` of a stage, on the device. Raises UserError for what does not fit."""
    dataset = params.dataset(p, dataset_name)
    training = settings.training(p, dataset_name, name, stage)
    device = train.prepare(p.runtime, p.precision)
    longtail = paths.longtail(dataset_name)
    meta = splits.read_meta(longtail)
    splits.require_cut(longtail, meta, dataset, paths.raw(dataset_name))
    data = read_images(longtail, "train", dataset, device, p.runtime.placement)
    return Opened(dataset, training, device, longtail, meta, torch.tensor(meta.train_counts), data)


def train_seeds(
    p: params.Params,
    training: settings.Training,
    title: str,
    make: Callable[[int], tuple[models.Network, method.Method]],
    data: store.Images,
    scratch: Path,
    late_epochs: int,
    streams: Callable[[int], int] = int,
    begins: dict[str, str] | None = None,
) -> dict[int, train.TrainedNetwork]:
    """Train what `make` makes of each seed; checkpoints, and the networks of the last `late_epochs`, go to `scratch`.

    `streams` makes of a seed that of the training's random numbers. begins: SHA-256, by seed<k>, of the weights that
    `make` loads. Raises UserError as `train.train` does.
    """
    replicas = [
        train.Replica(
            f"{title} seed {seed}",
            streams(seed),
            partial(make, seed),
            scratch / f"seed{seed}.pt",
            training.recipe_key,
            train.Late(scratch / f"late/seed{seed}", late_epochs) if late_epochs else None,
            begins and begins.get(f"seed{seed}"),
        )
        for seed in p.seeds
    ]
    return dict(zip(p.seeds, train.train(replicas, data, training.recipe, p.runtime, p.precision), strict=True))


def write_seeds(trained: dict[int, train.TrainedNetwork], out: Path) -> dict[int, str]:
    """Write the weights and history.csv to `out`; returns the SHA-256 of each seed's weights."""
    written = {
        seed: weights.save_weights(one.network, out / f"seed{seed}.safetensors") for seed, one in trained.items()
    }
    epochs = [epoch | {"seed": seed} for seed, one in trained.items() for epoch in one.history]
    history = pd.DataFrame(epochs, columns=HISTORY)
    files.write_text(out / "history.csv", history.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return written


def write_costs(stage: str, cell: tuple[str, ...], trained: dict[int, train.TrainedNetwork]) -> None:
    """Write what the training took, as `tailcal.costs` has it."""
    costs.write(paths.costs(stage, *cell), {seed: one.cost for seed, one in trained.items()})
