"""LWS, learnable weight scaling (Kang et al. 2020, section 4.3): one scale a logit, class-balanced sampling.

z_k = s_k (W f + b)_k, s = 1 at the start; only s learns
"""

from tailcal.method import Classifier, ParameterGroup
from tailcal.models import Network
from tailcal.models.heads import ScaledLinear


class Method(Classifier):
    """Only the scales learn."""

    streams = ("class_balanced",)

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        network.head = ScaledLinear(network.head)
        return [ParameterGroup([network.head.scale])]
