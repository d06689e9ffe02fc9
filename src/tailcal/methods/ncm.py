"""NCM, nearest class mean (Kang et al. 2020, section 4.2): a class is the mean of its training features. No training.

mu_k = mean of f_i over y_i = k
z_k  = scale cos(f, mu_k)   or   z_k = -scale ||f - mu_k||^2

The paper takes the largest z_k and defines no probabilities: they are ours, and follow from `scale`, the inverse of a
temperature, which moves calibration and never accuracy. Its Euclidean distance is to mean features scaled to unit
norm, which ranks the classes as the cosine does; here it is to the means themselves.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tailcal.method import Classifier, ParameterGroup
from tailcal.models import Network
from tailcal.params import Strict


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean feature of each class, float [K, D]. features float [N, D], labels int64 [N] in 0..K-1.

    Raises ValueError naming the first class without an image, which has no mean.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"class {int((counts == 0).int().argmax())} has no image, so it has no mean feature")
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts[:, None]


def cosine(features: Tensor, means: Tensor) -> Tensor:
    """cos(f, mu_k): features [B, D], means [K, D]. Returns [B, K]; a feature of zeros has cosine 0 with every mean."""
    return F.linear(F.normalize(features), F.normalize(means))


def euclidean(features: Tensor, means: Tensor) -> Tensor:
    """-||f - mu_k||^2: features [B, D], means [K, D]. Returns [B, K]."""
    # Differences are taken first: the faster form |f|^2 - 2 f·mu + |mu|^2 cancels where a feature is near a mean.
    if torch.compiler.is_exporting():  # ONNX has no cdist; this takes B K D numbers of memory
        return -(features[:, None] - means).square().sum(dim=2)
    return -torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist").square()


SIMILARITIES = {"cosine": cosine, "euclidean": euclidean}


class NearestMean(nn.Module):
    """z = scale * similarity(f, means); the means are state."""

    def __init__(self, means: Tensor, distance: str, scale: float):
        super().__init__()
        self.register_buffer("means", means)
        self.similarity, self.scale = SIMILARITIES[distance], scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * self.similarity(features, self.means)


class Method(Classifier):
    """The head is computed once, from the features of all training images; the classifier of stage 1 is not used."""

    trained = False

    class Config(Strict):
        """distance: what is nearest; scale: the inverse temperature of the softmax over it."""

        distance: Literal["cosine", "euclidean"]
        scale: Annotated[float, Field(gt=0, le=1e6)]

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        means = torch.zeros(len(self.counts), network.head.in_features)
        network.head = NearestMean(means, self.config.distance, self.config.scale)
        return []

    def fit(self, network: Network, features: Callable[[], Tensor], labels: Tensor) -> None:
        network.head.means = class_means(features(), labels, len(self.counts))
