"""LDAM-DRW (Cao et al. 2019): margins that grow as a class gets rarer, and re-weighting deferred to the end.

z_k = s cos(W_k, f)
m_k ∝ n_k^(-1/4), the largest max_margin
L   = sum_i w_{y_i} CE(z_i - s m_{y_i} e_{y_i}, y_i) / sum_i w_{y_i};  at test: z

w = 1 for the share `drw_start` of the epochs, and from then on the weights of the effective number (Cui et al. 2019).
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tailcal.losses import effective_number_weights, require_counts, weighted_cross_entropy
from tailcal.method import Batch, ParameterGroup, Representation, TrainedConfig
from tailcal.models import Network
from tailcal.models.heads import CosineClassifier
from tailcal.params import Fraction


def margins(counts: Tensor, max_margin: float) -> Tensor:
    """m_k ∝ n_k^(-1/4), `max_margin` for the rarest class; float32 [K].

    counts: training images per class [K], each 1 or more; max_margin: 0 or more, in units of the cosine.
    Raises ValueError for other counts or a negative max_margin.
    """
    require_counts(counts)
    if not max_margin >= 0:
        raise ValueError(f"max_margin must be 0 or more, got {max_margin}")
    n = counts.double()
    return (max_margin * (n.min() / n) ** 0.25).float()


def subtract_margins(logits: Tensor, labels: Tensor, class_margins: Tensor) -> Tensor:
    """z - m_y e_y: the label's logit alone less the margin of its class.

    logits [B, K], labels int64 [B], class_margins [K] (in units of the logits). Returns [B, K].
    """
    return logits - F.one_hot(labels, logits.shape[1]) * class_margins


class Method(Representation):
    """The scale is the head's, so test logits have it too."""

    head = "cosine"

    class Config(TrainedConfig):
        """max_margin: of the rarest class, in cosines; scale: s; beta: of the class-balanced weights (Cui et al. 2019);
        drw_start: the share of the epochs without re-weighting."""

        max_margin: Annotated[float, Field(ge=0, le=2)]
        scale: Annotated[float, Field(gt=0, le=1e6)]
        beta: Annotated[float, Field(ge=0, lt=1)]
        drw_start: Fraction

    def __init__(self, config: Config, counts: Tensor):
        super().__init__(config, counts)
        self.register_buffer("margins", config.scale * margins(counts, config.max_margin), persistent=False)
        self.register_buffer("weights", effective_number_weights(counts, config.beta), persistent=False)

    def setup(self, network: Network) -> list[ParameterGroup]:
        network.head = CosineClassifier(network.head.in_features, network.head.out_features)
        network.head.rescale(torch.full((network.head.out_features,), self.config.scale))
        return super().setup(network)

    def loss(self, network: Network, batch: Batch, progress: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(batch.images)
        weights = torch.where(progress >= self.config.drw_start, self.weights, 1.0)
        adjusted = subtract_margins(logits, batch.labels, self.margins)
        return weighted_cross_entropy(adjusted, batch.labels, weights), logits
