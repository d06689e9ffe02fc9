"""The one training loop, and prediction. It knows the contract of `tailcal.method`, and no method by name."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tailcal import checkpoint
from tailcal.augment import AUGMENTATIONS, normalise
from tailcal.draws import Draws, derive
from tailcal.errors import UserError
from tailcal.method import Batch, Method
from tailcal.models import Network
from tailcal.optim import learning_rate, optimiser
from tailcal.params import PARAMS, Augmentation, Recipe, Runtime
from tailcal.progress import Progress

EVALUATION_BATCH = 1024


def prepare(runtime: Runtime) -> torch.device:
    """Choose the device and make torch deterministic there. Raises UserError when there is no such device."""
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{PARAMS}: runtime.device: is cuda, but torch sees no CUDA device here; use auto or cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.set_num_threads(runtime.threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    on_gpu = runtime.device == "cuda" or (runtime.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


@dataclass(frozen=True)
class Images:
    """A split resident on the device: images uint8 [N, C, H, W], labels int64 [N], and how to prepare a batch."""

    images: Tensor
    labels: Tensor
    augmentation: Augmentation
    mean: Tensor
    std: Tensor

    @classmethod
    def place(
        cls, images: np.ndarray, labels: np.ndarray, augmentation: Augmentation, device: torch.device
    ) -> "Images":
        """Move uint8 [N, H, W, C] images and their labels to the device."""
        channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return cls(
            torch.from_numpy(channels_first).to(device),
            torch.from_numpy(np.array(labels)).to(device),
            augmentation,
            torch.tensor(augmentation.mean, device=device),
            torch.tensor(augmentation.std, device=device),
        )

    def batch(self, indices: Tensor, augmentation: str, draws: Draws) -> Batch:
        """The images at `indices`, augmented (a name in augment.AUGMENTATIONS) and normalised."""
        images = AUGMENTATIONS[augmentation](self.images[indices], self.augmentation, draws)
        labels = self.labels[indices]
        return Batch(normalise(images, self.mean, self.std), labels, labels)


@dataclass(frozen=True)
class Replica:
    """One network in training: what makes it, and where its unfinished state is kept."""

    title: str
    seed: int
    make: Callable[[], tuple[Network, Method]]  # from torch's global generator, which `train` seeds
    scratch: Path


def steps_per_epoch(n: int, recipe: Recipe) -> int:
    """ceil(N / B), or floor(N / B) for recipes that drop the last partial batch; at least 1."""
    return max(1, n // recipe.batch_size) if recipe.last_batch == "drop" else math.ceil(n / recipe.batch_size)


def total_steps(n: int, recipe: Recipe) -> int:
    """Steps of a whole training on n images."""
    return recipe.iterations or recipe.epochs * steps_per_epoch(n, recipe)


def agreement(logits: Tensor, targets: Tensor) -> Tensor:
    """Training accuracy of a batch: the mean share of the target that the predicted class has.

    logits [B, K]; targets int64 [B], or soft [B, K], where a prediction that hits one of two mixed labels counts with
    that label's lambda (as in the released mixup code).
    """
    predicted = logits.argmax(1)
    if targets.ndim == 1:
        return (predicted == targets).float().mean()
    return targets.gather(1, predicted[:, None]).mean()


def train(
    replica: Replica, data: Images, recipe: Recipe, device: torch.device, checkpoint_seconds: float
) -> tuple[Network, list[dict[str, Any]]]:
    """Train one network, going on from its checkpoint if there is one.

    Returns the network after the last epoch, and the history: a dict(epoch, seed, lr, loss, train_accuracy) an epoch.
    The result is a function of (code, recipe, data, seed): interruptions leave no trace in it.
    """
    torch.manual_seed(derive(replica.seed, "initialisation"))
    network, method = replica.make()
    groups = method.setup(network)  # before the device, so that every first weight comes from the one generator
    network, method = network.to(device), method.to(device)
    if not method.trained:
        if method.fitted:
            method.fit(network, over_batches(network.backbone, data), data.labels)
        return network, []

    optimise = optimiser(groups, recipe)
    generator = torch.Generator(device)
    labels = data.labels.cpu().numpy()
    steps, size = steps_per_epoch(len(labels), recipe), recipe.batch_size
    if size > len(labels):
        raise UserError(
            f"{PARAMS}: batch_size is {size}, but the training split has {len(labels)} images ({replica.title}): "
            f"use {len(labels)} or fewer"
        )
    total = total_steps(len(labels), recipe)
    epochs = math.ceil(total / steps)  # a budget of iterations may end within an epoch
    start, history = 0, []
    if saved := checkpoint.load(replica.scratch, device):
        network.load_state_dict(saved["network"])
        method.load_state_dict(saved["method"])
        optimise.load_state(saved["optimiser"])
        start, history = saved["epoch"], saved["history"]

    bar = Progress(replica.title, epochs, start, steps * size)
    last_saved = time.monotonic()
    for epoch in range(start, epochs):
        method.set_mode(network)
        first, stop = epoch * steps, min((epoch + 1) * steps, total)
        lr = learning_rate(recipe, epoch if recipe.epochs else first)
        progress = epoch / epochs
        streams = [
            torch.from_numpy(sampler(labels, derive(replica.seed, "sampler", i), first * size, stop * size))
            .view(-1, size)
            .to(device)
            for i, sampler in enumerate(method.samplers())
        ]
        sums = torch.zeros(2, device=device)  # of losses, of training accuracies
        for step in range(stop - first):
            draws = Draws(replica.seed, first + step, generator)
            batch = method.mix(
                [
                    data.batch(stream[step], method.config.augmentation, draws)
                    for stream in streams
                    for _ in range(method.views)
                ],
                draws,
            )
            loss, logits = optimise.step(
                lr,
                partial(method.loss, network, batch, progress),
                partial(method.ascent_loss, network, batch, progress),
            )
            method.observe(logits, batch)
            sums += torch.stack([loss, agreement(logits, batch.targets)])

        mean_loss, accuracy = (sums / (stop - first)).tolist()
        checkpoint.require_finite(mean_loss, replica.title, epoch, replica.scratch)
        history.append(
            {"epoch": epoch + 1, "seed": replica.seed, "lr": lr, "loss": mean_loss, "train_accuracy": accuracy}
        )
        bar.epoch(epoch + 1, mean_loss)
        if epoch + 1 == epochs or time.monotonic() - last_saved >= checkpoint_seconds:
            checkpoint.save(
                replica.scratch,
                {
                    "network": network.state_dict(),
                    "method": method.state_dict(),
                    "optimiser": optimise.state(),
                    "epoch": epoch + 1,
                    "history": history,
                },
            )
            last_saved = time.monotonic()
    method.finish(network)
    return network, history


@torch.no_grad()
def over_batches(module: nn.Module, data: Images) -> Tensor:
    """What a module makes of all images of a split, unaugmented and in evaluation mode: [N, ...]."""
    module.eval()
    chunks = [module(normalise(images, data.mean, data.std)) for images in data.images.split(EVALUATION_BATCH)]
    return torch.cat(chunks)


def predict(network: Network, data: Images) -> np.ndarray:
    """Logits of a whole split, unaugmented, with the network in evaluation mode: float32 [N, K]."""
    return over_batches(network, data).float().cpu().numpy()
