"""MARC, margin calibration (Wang et al. 2022): a scale and a shift per class, on top of the classifier of stage 1.

z'_k = a_k z_k + b_k ||W_k||,  a = 1 and b = 0 at the start; only a and b learn
L    = sum_i w_{y_i} CE(z'_i, y_i) / sum_i w_{y_i},  w_k ∝ (1 / pi_k)^rho scaled to sum K   (GRW, Zhang et al. 2021)

z_k / ||W_k|| is a distance to a hyperplane, its margin; a and b calibrate that, and ||W_k|| turns it back into a logit.
Images are drawn uniformly, not class-balanced: the weights do the balancing. With `shifted_bn` the backbone's batch
norms run in training mode, as in the released code, so that their running statistics follow this stage's images.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tailcal.losses import generalized_reweight_weights, weighted_cross_entropy
from tailcal.method import Batch, Classifier, ParameterGroup, TrainedConfig
from tailcal.models import Network
from tailcal.samplers import Sampler, instance


def calibrate_margins(logits: Tensor, scale: Tensor, shift: Tensor, norms: Tensor) -> Tensor:
    """a_k z_k + b_k ||W_k||: logits [B, K]; scale (a), shift (b) and norms (||W_k||) [K]. Returns [B, K]."""
    return scale * logits + shift * norms


class CalibratedMargins(nn.Module):
    """Another head's logits, scaled and shifted; `norms` are those of its class weights, float [K]."""

    def __init__(self, inner: nn.Module, norms: Tensor):
        super().__init__()
        self.inner = inner
        self.scale, self.shift = nn.Parameter(torch.ones_like(norms)), nn.Parameter(torch.zeros_like(norms))
        self.register_buffer("norms", norms)

    def forward(self, features: Tensor) -> Tensor:
        return calibrate_margins(self.inner(features), self.scale, self.shift, self.norms)


class Method(Classifier):
    """Two numbers per class learn."""

    class Config(TrainedConfig):
        """rho: strength of the re-weighting, 0 is none; shifted_bn: see `tailcal.method.Classifier`."""

        rho: Annotated[float, Field(ge=0, le=5)]
        shifted_bn: bool

    def __init__(self, config: Config, counts: Tensor):
        super().__init__(config, counts)
        self.register_buffer("weights", generalized_reweight_weights(counts, config.rho), persistent=False)

    def samplers(self) -> tuple[Sampler, ...]:
        return (instance,)

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        network.head = CalibratedMargins(network.head, network.head.norms())
        return [ParameterGroup([network.head.scale, network.head.shift])]

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        return weighted_cross_entropy(logits, batch.labels, self.weights)
