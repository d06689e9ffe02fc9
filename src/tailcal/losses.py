"""Losses that several methods share: class weights from the training counts, and the cross-entropy that takes them.

    weighted cross-entropy    L = sum_i w_{y_i} (-log p_{i, y_i}) / sum_i w_{y_i}
    effective number          w_k ∝ (1 - beta) / (1 - beta^{n_k})       (Cui et al. 2019, section 4)
    generalised re-weighting  w_k ∝ (1 / pi_k)^rho,  pi_k = n_k / N     (DisAlign, Zhang et al. 2021)

Weights are scaled to sum K. A loss used by one method only is in that method's file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def require_counts(counts: Tensor) -> None:
    """Check training images per class [K], for what has no finite value where a class is empty.

    Raises ValueError when a class has no image (naming the first such class), or when there are fewer than two classes.
    """
    if counts.ndim != 1 or len(counts) < 2:
        raise ValueError(f"counts must be one number per class, of two classes or more, got {tuple(counts.shape)}")
    if (counts < 1).any():
        empty = int((counts < 1).int().argmax())
        raise ValueError(f"class {empty} has {counts[empty]:g} training images: every class must have 1 or more")


def _sum_to_classes(weights: Tensor) -> Tensor:
    return (weights * (len(weights) / weights.sum())).float()


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """w_k ∝ (1 - beta) / (1 - beta^{n_k}), the inverse effective number of images, scaled to sum K (Cui et al. 2019).

    counts: training images per class [K], each 1 or more; beta in [0, 1): at 0 all weights are 1, towards 1 they are
    proportional to 1 / n_k. Returns float32 [K]. Raises ValueError for other counts or another beta.
    """
    require_counts(counts)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    return _sum_to_classes((1 - beta) / (1 - beta ** counts.double()))


def generalized_reweight_weights(counts: Tensor, rho: float) -> Tensor:
    """w_k ∝ (1 / pi_k)^rho, scaled to sum K (GRW, Zhang et al. 2021).

    counts: training images per class [K], each 1 or more; rho: 0 or more, at 0 all weights are 1.
    Returns float32 [K], all above 0 while rho is 5 or less and no class has ten million times the images of another.
    Raises ValueError for other counts or a negative rho.
    """
    require_counts(counts)
    if not rho >= 0:
        raise ValueError(f"rho must be 0 or more, got {rho}")
    # Relative to the rarest class: the same after scaling, and no power of it overflows.
    n = counts.double()
    return _sum_to_classes((n.min() / n) ** rho)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the cross-entropies: divided by the sum of the batch's weights, not by B.

    logits [B, K], labels int64 [B], weights [K], above 0. So a batch of one image has its plain cross-entropy.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)  # bf16 would round the weights to 8 bits
    return F.cross_entropy(logits.to(precise), labels, weight=weights.to(precise))
