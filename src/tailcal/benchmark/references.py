"""Training loops written by hand, to hold tailcal's against: plain PyTorch, and nothing of tailcal's loop.

published: as the papers' codes do it. PIL images, torchvision's transforms, a DataLoader with worker processes, and
           loss and accuracy read back from the device at every step.
resident:  what one writes to be fast. All images on the device, a batch augmented at a time, mixup with Python floats,
           nothing read back but a loss an epoch.

Both train the case's network with its batch size and precision, but as PyTorch comes: torch.optim.SGD, and cuDNN and
cuBLAS free to take whichever kernels are fastest, where tailcal's must be deterministic.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from tailcal import models
from tailcal.benchmark.cases import Workload
from tailcal.losses import generalized_reweight_weights
from tailcal.methods.fsgl import Heads, scaling_factors
from tailcal.params import Precision

Epoch = Callable[[], float]  # trains for an epoch; returns its mean loss


@dataclass(frozen=True)
class Job:
    """What a loop trains and where: images uint8 [N, H, W, C], labels int64 [N]; DataLoader workers (`published`)."""

    workload: Workload
    images: np.ndarray
    labels: np.ndarray
    device: torch.device
    precision: Precision
    workers: int

    def network(self) -> models.Network:
        """The case's network, on the device and in training mode."""
        w = self.workload
        torch.manual_seed(0)
        return models.build(w.backbone, "linear", w.images.channels, w.images.classes).to(self.device).train()

    def sgd(self, network: nn.Module) -> torch.optim.SGD:
        """The optimiser, with the recipe's settings."""
        r = self.workload.recipe(1)
        return torch.optim.SGD(network.parameters(), lr=r.lr, momentum=r.momentum, weight_decay=r.weight_decay)

    def autocast(self) -> torch.autocast:
        """For the forward pass, in bf16 where the case is."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def prepare(precision: Precision, threads: int) -> None:
    """Set torch as these loops want it; `train.prepare` sets it as tailcal does."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


def crop_flip(images: Tensor, pad: int) -> Tensor:
    """Zero-pad, crop back at random and mirror half of the images. uint8 [B, C, H, W] in and out."""
    b, _, h, w = images.shape
    windows = F.pad(images, (pad,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # a view: [B, C, 2 pad + 1, 2 pad + 1, H, W]
    rows, columns = torch.randint(2 * pad + 1, (2, b), device=images.device)
    cropped = windows[torch.arange(b, device=images.device), :, rows, columns]
    mirrored = torch.rand(b, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], cropped.flip(-1), cropped)


def one_view(job: Job, network: nn.Module, optimizer: torch.optim.SGD) -> Callable[[Tensor, Tensor], tuple]:
    """A step of `ce` or `mixup`: images float [B, C, H, W] and labels [B] in, the loss and the logits out."""
    alpha = job.workload.settings.get("alpha")

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with job.autocast():
            if alpha is None:
                logits = network(images)
                loss = F.cross_entropy(logits, labels)
            else:
                lam = np.random.beta(alpha, alpha)
                partner = torch.randperm(len(labels), device=job.device)
                logits = network(lam * images + (1 - lam) * images[partner])
                loss = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, labels[partner])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), logits.detach()

    return step


def cut(images: Tensor, others: Tensor, lam: float) -> Tensor:
    """CutMix: paste a box of 1 - lam of the area, at a random place. [B, C, H, W] each."""
    h, w = images.shape[2:]
    height, width = math.ceil(h * math.sqrt(1 - lam)), math.ceil(w * math.sqrt(1 - lam))
    y, x = np.random.randint(h), np.random.randint(w)
    top, bottom = max(y - height // 2, 0), min(y + height // 2, h)
    left, right = max(x - width // 2, 0), min(x + width // 2, w)
    pasted = images.clone()
    pasted[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return pasted


def fsgl(job: Job, network: models.Network, counts: Tensor) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    """A step of `fsgl` with SAM, for an epoch in the middle of a training.

    Takes four batches of images [B, C, H, W] (both views of one batch, then of the other) and two of labels [B];
    returns the loss.
    """
    settings, rho = job.workload.settings, job.workload.sam_rho
    network.head = Heads(network.head, settings["hidden"]).to(job.device)
    optimizer = job.sgd(network)
    factors = scaling_factors(counts, settings["gamma"]).to(job.device)
    weights = generalized_reweight_weights(counts, settings["label_weighting"]).to(job.device)

    def losses(views: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of the classifiers, and of the consistency."""
        heads, scale = network.head, (targets @ factors)[:, None]
        features = [network.backbone(view) * scale for view in views]
        plain = sum(F.cross_entropy(heads.plain(f), targets) for f in features)
        rebalanced = sum(F.cross_entropy(heads.rebalanced(f), targets * weights) for f in features)
        projected = [heads.projector(f) for f in features]
        predicted = [heads.predictor(z) for z in projected]
        agreement = sum(
            -F.cosine_similarity(p, z.detach()).mean() for p, z in zip(predicted, projected[::-1], strict=True)
        )
        return 0.75 * plain + 0.25 * rebalanced, settings["consistency"] * agreement

    def step(images: list[Tensor], labels: list[Tensor]) -> Tensor:
        lam = np.random.beta(1.0, 1.0)
        views = [lam * images[0] + (1 - lam) * images[2], cut(images[1], images[3], lam)]
        own, other = (F.one_hot(label, len(counts)).float() for label in labels)
        targets = lam * own + (1 - lam) * other
        optimizer.zero_grad()
        with job.autocast():
            ascent, _ = losses(views, targets)
        ascent.backward()
        climbing = [p for p in network.parameters() if p.grad is not None]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in climbing]).norm() + 1e-12
            steps_up = [rho / norm * p.grad for p in climbing]
            for p, up in zip(climbing, steps_up, strict=True):
                p.add_(up)
        optimizer.zero_grad()
        with job.autocast():
            loss = sum(losses(views, targets))
        loss.backward()
        with torch.no_grad():
            for p, up in zip(climbing, steps_up, strict=True):
                p.sub_(up)
        optimizer.step()
        return loss.detach()

    return step


def resident(job: Job) -> Epoch:
    """The loop on images that lie on the device."""
    augmentation, device, size = job.workload.images.augmentation, job.device, job.workload.batch_size
    pixels = torch.from_numpy(job.images).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.from_numpy(job.labels).to(device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (augmentation.mean, augmentation.std))
    network = job.network()

    def view(rows: Tensor) -> Tensor:
        return (crop_flip(pixels[rows], augmentation.pad).float() / 255 - mean) / std

    def batches() -> list[Tensor]:
        return torch.randperm(len(labels), device=device).split(size)[: job.workload.steps]

    if job.workload.method == "fsgl":
        step = fsgl(job, network, torch.from_numpy(job.workload.images.counts))

        def losses() -> list[Tensor]:
            return [
                step([view(rows), view(rows), view(others), view(others)], [labels[rows], labels[others]])
                for rows, others in zip(batches(), batches(), strict=True)
            ]
    else:
        step = one_view(job, network, job.sgd(network))

        def losses() -> list[Tensor]:
            return [step(view(rows), labels[rows])[0] for rows in batches()]

    return lambda: torch.stack(losses()).mean().item()


class Pictures(Dataset):
    """Arrays uint8 [N, H, W, C] as a torchvision data set has them: a PIL image at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels = self.images[i]
        return self.transform(Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])), int(self.labels[i])


def published(job: Job) -> Epoch:
    """The loop of the papers' codes."""
    noise = job.workload.images
    transform = transforms.Compose(
        [
            transforms.RandomCrop(noise.side, padding=noise.augmentation.pad),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(noise.augmentation.mean, noise.augmentation.std),
        ]
    )
    loader = DataLoader(
        Pictures(job.images, job.labels, transform),
        job.workload.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=job.workers,
        pin_memory=job.device.type == "cuda",
        persistent_workers=job.workers > 0,
    )
    network = job.network()
    step = one_view(job, network, job.sgd(network))

    def epoch() -> float:
        losses, right = [], []
        for images, labels in loader:
            images, labels = images.to(job.device, non_blocking=True), labels.to(job.device, non_blocking=True)
            loss, logits = step(images, labels)
            losses.append(loss.item())
            right.append((logits.argmax(1) == labels).float().mean().item())
        return float(np.mean(losses))

    return epoch


LOOPS = {"published": published, "resident": resident}
