"""cRT, classifier re-training (Kang et al. 2020, section 4.1): a fresh linear classifier, class-balanced sampling.

L = CE(W' f + b', y), f from the frozen backbone, W' and b' drawn anew
"""

from tailcal.method import Classifier, ParameterGroup
from tailcal.models import Network
from tailcal.models.heads import Linear


class Method(Classifier):
    """Only the fresh classifier learns."""

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        network.head = Linear(network.head.in_features, network.head.out_features, network.head.kaiming)
        return [ParameterGroup(list(network.head.parameters()))]
