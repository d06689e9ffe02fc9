"""Classifier heads that a second stage puts in place of the plain linear one."""

import torch
from torch import Tensor, nn


class ScaledLinear(nn.Module):
    """A linear classifier with one learnable scale a logit: z = s * (W f + b) (LWS, Kang et al. 2020)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(torch.ones_like(linear.bias))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * self.linear(features)
