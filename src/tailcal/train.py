"""The one training loop, and prediction. It knows the contract of `tailcal.method`, and no method by name."""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tailcal import checkpoint, distributed
from tailcal.draws import Draws, derive
from tailcal.errors import UserError
from tailcal.method import Method
from tailcal.models import Network
from tailcal.optim import learning_rate, optimiser
from tailcal.params import PARAMS, Recipe, Runtime
from tailcal.progress import Progress
from tailcal.store import Images

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
    return distributed.join(torch.device("cuda" if on_gpu else "cpu"))


@dataclass(frozen=True)
class Replica:
    """One network in training: what makes it, where its unfinished state is kept, which key its recipe has."""

    title: str
    seed: int
    make: Callable[[], tuple[Network, Method]]  # from torch's global generator, which `train` seeds
    scratch: Path
    recipe_key: str


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


def train(replica: Replica, data: Images, recipe: Recipe, runtime: Runtime) -> tuple[Network, list[dict[str, Any]]]:
    """Train one network, going on from its checkpoint if there is one.

    Returns the network after the last epoch, and the history: a dict(epoch, seed, lr, loss, train_accuracy) an epoch.
    The result is a function of (code, recipe, data, seed): interruptions leave no trace in it. Where several processes
    train together (`tailcal.distributed`), each calls this and each gets the same network.
    """
    torch.manual_seed(derive(replica.seed, "initialisation"))
    network, method = replica.make()
    groups = method.setup(network)  # before the device, so that every first weight comes from the one generator
    device = data.device
    network, method = network.to(device), method.to(device)
    if not method.trained:
        if method.fitted:
            method.fit(network, over_batches(network.backbone, data), data.labels)
        return network, []

    optimise = optimiser(groups, recipe, partial(distributed.sum_gradients, network.backbone))
    generator = torch.Generator(device)
    labels = data.labels.cpu().numpy()
    steps, size = steps_per_epoch(len(labels), recipe), recipe.batch_size
    if size > len(labels):
        raise UserError(
            f"{replica.recipe_key}.batch_size is {size}, but the training split has {len(labels)} images "
            f"({replica.title}): use {len(labels)} or fewer"
        )
    if size % distributed.size():
        raise UserError(
            f"{replica.recipe_key}.batch_size is {size}, which {distributed.size()} processes cannot share evenly "
            f"({replica.title}): use a multiple of {distributed.size()}"
        )
    total = total_steps(len(labels), recipe)
    epochs = math.ceil(total / steps)  # a budget of iterations may end within an epoch
    start, history = 0, []
    if saved := checkpoint.load(replica.scratch, device):
        network.load_state_dict(saved["network"])
        method.load_state_dict(saved["method"])
        optimise.load_state(saved["optimiser"])
        start, history = saved["epoch"], saved["history"]

    shared = distributed.share(network, runtime.sync_bn)
    bar = Progress(replica.title, epochs, start, steps * size, silent=not distributed.is_first())
    last_saved = time.monotonic()
    for epoch in range(start, epochs):
        method.set_mode(network)
        first, stop = epoch * steps, min((epoch + 1) * steps, total)
        lr = learning_rate(recipe, epoch if recipe.epochs else first)
        progress = epoch / epochs
        drawn = [
            sampler(labels, derive(replica.seed, "sampler", i), first * size, stop * size).reshape(-1, size)
            for i, sampler in enumerate(method.samplers())
        ]
        sums = torch.zeros(2, device=device)  # of losses, of training accuracies
        for step, pairs in enumerate(data.steps(drawn), start=first):
            draws = Draws(replica.seed, step, generator)
            views = [
                data.prepare(*pair, method.config.augmentation, draws) for pair in pairs for _ in range(method.views)
            ]
            batch = method.mix(views, draws)
            loss, logits = optimise.step(
                lr,
                partial(method.loss, shared, batch, progress),
                partial(method.ascent_loss, shared, batch, progress),
            )
            method.observe(logits, batch)
            sums += torch.stack([loss, agreement(logits, batch.targets)])

        mean_loss, accuracy = (sums / (stop - first)).tolist()
        checkpoint.require_finite(mean_loss, replica.title, epoch, replica.scratch)
        history.append(
            {"epoch": epoch + 1, "seed": replica.seed, "lr": lr, "loss": mean_loss, "train_accuracy": accuracy}
        )
        bar.epoch(epoch + 1, mean_loss)
        if distributed.is_first() and (
            epoch + 1 == epochs or time.monotonic() - last_saved >= runtime.checkpoint_seconds
        ):
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
    if data.placement != "device" and distributed.is_first():
        waited = f"steps waited {data.waited:.1f} s for them"
        print(f"{replica.title}: images on the {data.placement}, {waited}", file=sys.stderr)
    method.finish(network)
    # The last step's loss was measured before its update, so the weights are looked at as well.
    finite = torch.stack([value.isfinite().all() for value in network.state_dict().values()]).all()
    checkpoint.require_finite(0.0 if finite else math.nan, replica.title, epochs - 1, replica.scratch)
    return network, history


@torch.no_grad()
def over_batches(module: nn.Module, data: Images) -> Tensor:
    """What a module makes of all images of a split, unaugmented and in evaluation mode: [N, ...]."""
    module.eval()
    return torch.cat([module(images) for images in data.whole(EVALUATION_BATCH)])


def predict(network: Network, data: Images) -> np.ndarray:
    """Logits of a whole split, unaugmented, with the network in evaluation mode: float32 [N, K]."""
    return over_batches(network, data).float().cpu().numpy()
