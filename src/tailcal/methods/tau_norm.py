"""tau-norm (Kang et al. 2020, section 4.2): divide each classifier by a power of its norm. No training.

W_k <- W_k / ||W_k||^tau.  The bias stays as it is, so tau = 0 is joint.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tailcal.method import Classifier, ParameterGroup
from tailcal.models import Network
from tailcal.params import Strict


def normalise_weights(weight: Tensor, tau: float) -> Tensor:
    """W_k / ||W_k||^tau for each row of weight [K, D]."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau


class Method(Classifier):
    """The head is computed once."""

    trained = False

    class Config(Strict):
        """tau: 0 keeps the classifier, 1 makes all norms equal."""

        tau: Annotated[float, Field(ge=0)]

    @torch.no_grad()
    def setup_head(self, network: Network) -> list[ParameterGroup]:
        network.head.weight.copy_(normalise_weights(network.head.weight, self.config.tau))
        return []
