"""joint: the classifier of stage 1, unchanged. The reference row of every table (Kang et al. 2020)."""

from tailcal.method import Classifier, ParameterGroup
from tailcal.models import Network
from tailcal.params import Strict


class Method(Classifier):
    """Nothing to do."""

    trained = False

    class Config(Strict):
        """No settings."""

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        del network
        return []
