"""LWS, learnable weight scaling (Kang et al. 2020, section 4.3): one scale per logit, class-balanced sampling.

z_k <- s_k z_k, z the logits of stage 1, s = 1 at the start; only s learns
"""

from tailcal.method import Classifier, ParameterGroup
from tailcal.models import Network
from tailcal.models.heads import Scaled


class Method(Classifier):
    """Only the scales learn."""

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        network.head = Scaled(network.head)
        return [ParameterGroup([network.head.scale])]
