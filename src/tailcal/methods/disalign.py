"""DisAlign, distribution alignment (Zhang et al. 2021): a scale and an offset a class, gated by the image.

z'_k = s(f) (a_k z_k + b_k) + (1 - s(f)) z_k,  s(f) = sigmoid(v·f + c)
L    = sum_i w_{y_i} CE(z'_i, y_i) / sum_i w_{y_i},  w_k ∝ (1 / pi_k)^rho scaled to sum K   (GRW)

a = 1, b = 0, v = 0, c = 0 at the start: the logits of stage 1, and half a gate for every image. Only a, b, v and c
learn, from images drawn uniformly. The released code for detection and segmentation has this form (with v = 0.1); its
code for classification has (1 + s a_k) z_k + s b_k and a = 1, which is the same family started at a = 2. That code also
leaves the backbone's batch norms in training mode; here they stay as stage 1 left them.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tailcal.losses import generalized_reweight_weights, weighted_cross_entropy
from tailcal.method import Batch, Classifier, ParameterGroup, TrainedConfig
from tailcal.models import Network
from tailcal.samplers import Sampler, instance


def align(logits: Tensor, gate: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """s (a_k z_k + b_k) + (1 - s) z_k: logits [B, K], gate s [B, 1] in [0, 1], scale a and offset b [K].

    Returns [B, K]; where a = 1 and b = 0 it is z to the last bit.
    """
    return torch.lerp(logits, scale * logits + offset, gate)


class Aligned(nn.Module):
    """Another head's logits, aligned as far as the gate lets them."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(inner.out_features))
        self.offset = nn.Parameter(torch.zeros(inner.out_features))
        self.gate = nn.Linear(inner.in_features, 1)
        nn.init.zeros_(self.gate.weight)  # not saturated, however large the features are
        nn.init.zeros_(self.gate.bias)

    def forward(self, features: Tensor) -> Tensor:
        return align(self.inner(features), self.gate(features).sigmoid(), self.scale, self.offset)


class Method(Classifier):
    """The classifier of stage 1 is frozen; what learns is around it."""

    class Config(TrainedConfig):
        """rho: strength of the re-weighting, 0 is none."""

        rho: Annotated[float, Field(ge=0, le=5)]

    def __init__(self, config: Config, counts: Tensor):
        super().__init__(config, counts)
        self.register_buffer("weights", generalized_reweight_weights(counts, config.rho), persistent=False)

    def samplers(self) -> tuple[Sampler, ...]:
        return (instance,)

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        network.head = Aligned(network.head)
        return [ParameterGroup([network.head.scale, network.head.offset, *network.head.gate.parameters()])]

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        return weighted_cross_entropy(logits, batch.labels, self.weights)
