"""tau-norm (Kang et al. 2020, section 4.2): divide each classifier by a power of its norm. No training.

W_k <- W_k / ||W_k||^tau.  The bias stays as it is, so tau = 0 is joint.
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
        """tau: 0 keeps the classifier, 1 makes all norms equal."""

        tau: Annotated[float, Field(ge=0, le=10)]

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        network.head.rescale(network.head.norms() ** -self.config.tau)
        return []
