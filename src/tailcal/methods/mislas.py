"""MiSLAS, stage 2 (Zhong et al. 2021, sections 3.3 and 3.4): label-aware smoothing, learnable scales, shifted BN.

    z = s * (W f + b);  s learns at the recipe's rate, W and b (from stage 1) at lr_factor times it
    L = (1 - e_y) (-log p_y) + e_y mean_k (-log p_k),  e_k from `smoothing_factors`   (equation 3)

Class-balanced sampling. With `shifted_bn` the backbone's batch norms run in training mode, so that their running
statistics follow the class-balanced batches; they take no gradient either way.
"""

import math
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from tailcal.method import Batch, Classifier, ParameterGroup, TrainedConfig
from tailcal.models import Network
from tailcal.models.heads import Scaled
from tailcal.params import Fraction, Positive
from tailcal.samplers import Sampler, class_balanced

# The shapes of equation 4 and, from the released code, the power: from u = (n_k - n_min) / (n_max - n_min), which is 0
# at the rarest class, to the share of the way from the tail's smoothing to the head's.
SHAPES = {
    "concave": lambda u, _: torch.sin(math.pi / 2 * u),
    "linear": lambda u, _: u,
    "convex": lambda u, _: 1 + torch.sin(3 * math.pi / 2 + math.pi / 2 * u),
    "exponential": lambda u, power: u**power,
}


def smoothing_factors(
    counts: Tensor, head: float, tail: float, shape: str = "concave", power: float | None = None
) -> Tensor:
    """e_k for each class (equation 4), float64 [K]: `head` for the most frequent class, `tail` for the rarest.

    counts: training images per class [K]; shape: a name in SHAPES, of which "exponential" alone takes a `power`. When
    all classes are equally frequent, u is 0 / 0; every class is then a most frequent one and gets `head`.
    Raises ValueError for an unknown shape, or when a power is missing or not wanted.
    """
    if shape not in SHAPES:
        raise ValueError(f"smoothing must be one of {', '.join(SHAPES)}, got {shape!r}")
    if (shape == "exponential") != (power is not None):
        raise ValueError(
            f"power belongs to the exponential smoothing and no other, got smoothing {shape}, power {power}"
        )
    n = counts.double()
    span = n.max() - n.min()
    u = torch.where(span > 0, (n - n.min()) / span.clamp(min=1), torch.ones_like(n))
    return tail + (head - tail) * SHAPES[shape](u, power)


def label_aware_smoothing(logits: Tensor, labels: Tensor, factors: Tensor) -> Tensor:
    """Batch-mean label-aware smoothing (equation 3). logits [B, K], labels int64 [B], factors [K] in [0, 1]."""
    log_p = logits.log_softmax(dim=1)
    e = factors.to(logits.dtype)[labels]
    of_label = F.nll_loss(log_p, labels, reduction="none")  # whose gradient, unlike gather's, needs no sort on a GPU
    return ((1 - e) * of_label - e * log_p.mean(dim=1)).mean()


class Method(Classifier):
    """Scales and classifier learn together."""

    class Config(TrainedConfig):
        """smoothing: the shape of e between head and tail; power: of exponential smoothing, and of it alone;
        smooth_head, smooth_tail: e of the most and the least frequent class; lr_factor: learning rate of the
        classifier, as a multiple of the scales'; shifted_bn: see `tailcal.method.Classifier`; in_a_row: images that a
        class gives when its turn comes, 1 unless it is said (copies of the released code take 4)."""

        smoothing: Literal["concave", "linear", "convex", "exponential"]
        power: Positive | None = None
        smooth_head: Fraction
        smooth_tail: Fraction
        lr_factor: Positive
        shifted_bn: bool
        in_a_row: Annotated[int, Field(ge=1, le=1000)] | None = None

        @model_validator(mode="after")
        def _consistent(self) -> "Method.Config":
            if self.smooth_head < self.smooth_tail:
                raise ValueError(f"smooth_head ({self.smooth_head}) must not be below smooth_tail ({self.smooth_tail})")
            if (self.smoothing == "exponential") != (self.power is not None):
                wrong = "needs a power" if self.power is None else "takes no power"
                raise ValueError(f"smoothing {self.smoothing} {wrong}: power belongs to exponential, and to it alone")
            return self

    def __init__(self, config: Config, counts: Tensor):
        super().__init__(config, counts)
        factors = smoothing_factors(counts, config.smooth_head, config.smooth_tail, config.smoothing, config.power)
        self.register_buffer("factors", factors.float(), persistent=False)

    def samplers(self) -> tuple[Sampler, ...]:
        return (partial(class_balanced, in_a_row=self.config.in_a_row or 1),)

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        network.head = Scaled(network.head)
        return [
            ParameterGroup([network.head.scale]),
            ParameterGroup(list(network.head.inner.parameters()), self.config.lr_factor),
        ]

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        return label_aware_smoothing(logits, batch.labels, self.factors)
