"""Mixing of batches: images and soft targets."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(labels: Tensor, partner_labels: Tensor, lam: Tensor | float, num_classes: int) -> Tensor:
    """lambda e_y + (1 - lambda) e_y', float [B, K]. Cross-entropy is linear in its target, so the loss of this target
    is lambda L(z, y) + (1 - lambda) L(z, y')."""
    own, other = F.one_hot(labels, num_classes).float(), F.one_hot(partner_labels, num_classes).float()
    return lam * own + (1 - lam) * other


def box(lam: float, centre: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """CutMix's box (Yun et al. 2019): sides sqrt(1 - lambda) of the image's, rounded up to whole pixels as in the codes
    of GLMC and FSGL, half of them on each side of `centre` (row, column), clipped at the border; the labels keep lambda
    all the same, as in these codes, where CutMix's own takes it from the clipped box. Returns (top, bottom, left,
    right), ends exclusive. Rounded down, boxes that lie within an image of 32 pixels would on average be 8 %
    smaller than the 1 - lambda of the labels.
    """
    sides = math.ceil(height * math.sqrt(1 - lam)), math.ceil(width * math.sqrt(1 - lam))
    (top, bottom), (left, right) = (
        (max(middle - side // 2, 0), min(middle + side // 2, size))
        for middle, side, size in zip(centre, sides, (height, width), strict=True)
    )
    return top, bottom, left, right


def draw_box(generator: np.random.Generator, height: int, width: int) -> tuple[float, int, int, int, int]:
    """lambda ~ Beta(1, 1) and the edges of a box for it around a uniform pixel: (lambda, top, bottom, left, right)."""
    lam = float(generator.beta(1.0, 1.0))
    centre = int(generator.integers(height)), int(generator.integers(width))
    return lam, *box(lam, centre, height, width)


def cutmix(images: Tensor, others: Tensor, edges: Sequence[Tensor | int]) -> Tensor:
    """Replace the same box of every image by that of its partner in `others`. Both float [B, C, H, W]; edges: (top,
    bottom, left, right), ends exclusive."""
    top, bottom, left, right = edges
    rows = torch.arange(images.shape[2], device=images.device)[:, None]
    columns = torch.arange(images.shape[3], device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(inside, others, images)


def mixup(
    images: Tensor, labels: Tensor, partner: Tensor, lam: Tensor | float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """mixup (Zhang et al. 2018): x' = lambda x + (1 - lambda) x_r and the soft targets of it.

    images float [B, C, H, W], labels int64 [B], partner int64 [B] (the permutation r), lam in [0, 1].
    """
    mixed = lam * images + (1 - lam) * images[partner]
    return mixed, soft_targets(labels, labels[partner], lam, num_classes)
