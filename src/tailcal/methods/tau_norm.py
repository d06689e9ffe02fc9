"""tau-norm (Kang et al. 2020, section 4.2): divide each classifier by a power of its norm. No training.

W_k <- W_k / ||W_k||^tau,  b <- 0

The bias is left out, as in the paper and its code: that of a long-tailed training favours the large classes, and would
outweigh weights of norm 1.
"""

from typing import Annotated

from pydantic import Field

from tailcal.method import Classifier, ParameterGroup
from tailcal.models import Network
from tailcal.params import Strict


class Method(Classifier):
    """The head is computed once."""

    trained = False

    class Config(Strict):
        """tau: 0 keeps the weights, 1 makes all norms equal."""

        tau: Annotated[float, Field(ge=0, le=10)]

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        network.head.rescale(network.head.norms() ** -self.config.tau)
        network.head.drop_bias()
        return []
