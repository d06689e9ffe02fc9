"""FSGL (2024), and GLMC (Du et al. 2023), which it extends: two mixed views, two classifiers, a consistency term.

From a uniform batch (x, y) and a re-weighted one (x', y'), each image augmented twice, lambda ~ Beta(1, 1):

    mix = lambda x_1 + (1 - lambda) x_1'             t   = lambda e_y + (1 - lambda) e_y'
    cut = x_2 with a box of x_2'                     t^w = lambda w_y e_y + (1 - lambda) w_y' e_y'
    f  <- f s,  s = sum_k t_k (1 + gamma - gamma rank_k / K)       feature scaling, in training only
    L   = a [CE(plain(mix), t) + CE(plain(cut), t)]
          + (1 - a) [CE(rebalanced(mix), t^w) + CE(rebalanced(cut), t^w)] + c S
    S   = -cos(p_mix, sg z_cut) - cos(p_cut, sg z_mix),  a = 1 - (epoch / epochs)^2

w_k = n_k^(-q), scaled to mean 1; z = projector(f), p = predictor(z), sg stops the gradient. SAM (a recipe's `sam_rho`)
climbs L without c S. The rebalanced classifier is the one used at test. The two linear layers begin as PyTorch has it,
as in the released ResNet-34 (the ResNet-32 of GLMC's code begins them Kaiming-normal). gamma = 0 and no SAM is GLMC,
the block `glmc` of params.yaml. FSGL's released code is github.com/ZY-IMU-CV/FSGL.
"""

from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tailcal.draws import Draws
from tailcal.losses import generalized_reweight_weights
from tailcal.method import Batch, ParameterGroup, Representation, TrainedConfig
from tailcal.mixing import cutmix, draw_box, soft_targets
from tailcal.models import Network
from tailcal.models.heads import Linear
from tailcal.samplers import Reweighted, Sampler, instance


def scaling_factors(counts: Tensor, gamma: float) -> Tensor:
    """1 + gamma - gamma rank_k / K for each class, rounded to two decimals as in the released code; float [K].

    counts: training images per class [K]. Ranks are by decreasing count, 0 the largest class; of equal counts the
    lower label ranks first. An empty class has the last rank.
    """
    ranks = counts.argsort(descending=True, stable=True).argsort()
    factors = 1 + gamma - gamma * ranks.double() / len(counts)
    # Python's round, as in that code: torch's rounds 1.485, which is a little below, the other way.
    return torch.tensor([round(factor, 2) for factor in factors.tolist()])


def feature_scale(features: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
    """f s: features [B, D], soft targets [B, K], factors [K] from `scaling_factors`. Returns [B, D]."""
    return features * (targets @ factors)[:, None]


def consistency(predicted: Tensor, projected: Tensor) -> Tensor:
    """-cos(p, sg z), the batch mean (SimSiam, Chen and He 2021). Both [B, H]."""
    return -F.cosine_similarity(predicted, projected.detach(), dim=1).mean()


class Heads(nn.Module):
    """What the features go into during training; called as a head, it gives the rebalanced classifier's logits."""

    def __init__(self, head: Linear, hidden: int):
        super().__init__()
        self.rebalanced, self.plain = head, Linear(head.in_features, head.out_features, head.kaiming)
        self.projector, self.predictor = nn.Linear(head.in_features, hidden), nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        return self.rebalanced(features)


class Method(Representation):
    """Both views go through the backbone one after the other, so that batch norm sees each by itself."""

    views = 2

    class Config(TrainedConfig):
        """gamma: strength of feature scaling (`fcc` in the released code); label_weighting: q; sampling: the
        exponent r with which the second batch is drawn (0 is uniform); hidden: H; consistency: c."""

        gamma: Annotated[float, Field(ge=0, le=100)]
        label_weighting: Annotated[float, Field(ge=0, le=10)]
        sampling: Annotated[float, Field(ge=0, le=10)]
        hidden: Annotated[int, Field(ge=1, le=65536)]
        consistency: Annotated[float, Field(ge=0, le=1000)]

    def __init__(self, config: Config, counts: Tensor):
        super().__init__(config, counts)
        self.register_buffer("factors", scaling_factors(counts, config.gamma), persistent=False)
        self.register_buffer("weights", generalized_reweight_weights(counts, config.label_weighting), persistent=False)

    def samplers(self) -> tuple[Sampler, ...]:
        return instance, Reweighted(self.config.sampling)

    def setup(self, network: Network) -> list[ParameterGroup]:
        network.head = Heads(network.head, self.config.hidden)
        return super().setup(network)

    def finish(self, network: Network) -> None:
        network.head = network.head.rebalanced

    def mix(self, batches: list[Batch], draws: Draws) -> Batch:
        one, two, other_one, other_two = batches
        height, width = one.images.shape[2:]
        lam, *edges = draws.host(partial(draw_box, height=height, width=width))
        mixed = lam * one.images + (1 - lam) * other_one.images
        cut = cutmix(two.images, other_two.images, edges)
        targets = soft_targets(one.labels, other_one.labels, lam, len(self.counts))
        return Batch(torch.stack([mixed, cut]), one.labels, targets)

    def classification(self, network: Network, batch: Batch, progress: Tensor) -> tuple[Tensor, list[Tensor]]:
        """L without c S, and the scaled features of both views."""
        a = 1 - progress**2
        features = [feature_scale(network.backbone(view), batch.targets, self.factors) for view in batch.images]
        plain = sum(F.cross_entropy(network.head.plain(f), batch.targets) for f in features)
        weighted = batch.targets * self.weights  # of any sum: F.cross_entropy asks for none
        rebalanced = sum(F.cross_entropy(network.head.rebalanced(f), weighted) for f in features)
        return a * plain + (1 - a) * rebalanced, features

    def loss(self, network: Network, batch: Batch, progress: Tensor) -> tuple[Tensor, Tensor]:
        value, features = self.classification(network, batch, progress)
        z_mix, z_cut = (network.head.projector(f) for f in features)
        p_mix, p_cut = network.head.predictor(z_mix), network.head.predictor(z_cut)
        agreement = consistency(p_mix, z_cut) + consistency(p_cut, z_mix)
        # Accuracy is that of the mixup view: its targets are those of every pixel, and not of a box.
        return value + self.config.consistency * agreement, network.head(features[0])

    def ascent_loss(self, network: Network, batch: Batch, progress: Tensor) -> Tensor:
        return self.classification(network, batch, progress)[0]
