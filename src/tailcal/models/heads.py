"""Classifier heads: features [B, D] to logits [B, K].

A head of stage 1 (one of HEADS) also tells what stage 2 wants of it: `in_features`, `out_features`, whether a fresh
linear classifier in its place begins Kaiming-normal (`kaiming`), the norms of its class weights, `rescale` for those
weights, and `drop_bias`. Stage 2 puts such a head inside another, or another in its place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """z = W f + b, with Kaiming-normal W, or with PyTorch's own first weights."""

    def __init__(self, in_features: int, out_features: int, kaiming: bool = True):
        super().__init__(in_features, out_features)
        self.kaiming = kaiming
        if kaiming:
            nn.init.kaiming_normal_(self.weight)

    def norms(self) -> Tensor:
        """||W_k||, float [K]."""
        return self.weight.detach().norm(dim=1)

    @torch.no_grad()
    def rescale(self, factors: Tensor) -> None:
        """W_k <- factors_k W_k, in place; the bias stays. factors: float [K]."""
        self.weight.mul_(factors[:, None])

    @torch.no_grad()
    def drop_bias(self) -> None:
        """b <- 0, in place."""
        self.bias.zero_()


class CosineClassifier(nn.Module):
    """z_k = s_k cos(W_k, f), without a bias. The scales s (1 at first) are state, not learnt."""

    def __init__(self, in_features: int, out_features: int, kaiming: bool = True):
        super().__init__()
        # Of a linear classifier in its place: the logits of this one do not depend on the length of W_k.
        self.kaiming = kaiming
        self.in_features, self.out_features = in_features, out_features
        self.direction = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_normal_(self.direction)
        self.register_buffer("scale", torch.ones(out_features))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.direction))

    def norms(self) -> Tensor:
        """||W_k||, which is 1 for a direction: what is larger in one class than in another is no norm. float [K]."""
        return torch.ones_like(self.scale)

    @torch.no_grad()
    def rescale(self, factors: Tensor) -> None:
        """s_k <- factors_k s_k, in place. factors: float [K]."""
        self.scale.mul_(factors)

    def drop_bias(self) -> None:
        """It has none."""


class Scaled(nn.Module):
    """One learnable scale per logit on top of another head: z_k = s_k head(f)_k (LWS, Kang et al. 2020)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(inner.out_features))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * self.inner(features)


HEADS = {"linear": Linear, "cosine": CosineClassifier}
