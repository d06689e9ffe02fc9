"""Mixing of batches: images and soft targets."""

import torch.nn.functional as F
from torch import Tensor


def soft_targets(labels: Tensor, partner_labels: Tensor, lam: float, num_classes: int) -> Tensor:
    """lambda e_y + (1 - lambda) e_y', float [B, K]. Cross-entropy is linear in its target, so the loss of this target
    is lambda L(z, y) + (1 - lambda) L(z, y')."""
    own, other = F.one_hot(labels, num_classes), F.one_hot(partner_labels, num_classes)
    return lam * own + (1 - lam) * other


def mixup(images: Tensor, labels: Tensor, partner: Tensor, lam: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """mixup (Zhang et al. 2018): x' = lambda x + (1 - lambda) x_r and the soft targets of it.

    images float [B, C, H, W], labels int64 [B], partner int64 [B] (the permutation r), lam in [0, 1].
    """
    mixed = lam * images + (1 - lam) * images[partner]
    return mixed, soft_targets(labels, labels[partner], lam, num_classes)
