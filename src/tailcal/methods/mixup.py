"""mixup (Zhang et al. 2018), the stage 1 of MiSLAS (Zhong et al. 2021, section 3.2).

lambda ~ Beta(alpha, alpha), one a batch;  r a random permutation of the batch
x' = lambda x + (1 - lambda) x_r
L  = lambda CE(z, y) + (1 - lambda) CE(z, y_r)
"""

from typing import Annotated

from pydantic import Field

from tailcal.draws import Draws
from tailcal.method import Batch, Representation, TrainedConfig
from tailcal.mixing import mixup


class Method(Representation):
    """The mixed batch goes through plain cross-entropy."""

    class Config(TrainedConfig):
        """alpha: both parameters of the Beta distribution."""

        alpha: Annotated[float, Field(gt=0, le=1e6)]

    def mix(self, batches: list[Batch], draws: Draws) -> Batch:
        (batch,) = batches
        lam, partner = draws.beta(self.config.alpha), draws.permutation(len(batch.labels))
        images, targets = mixup(batch.images, batch.labels, partner, lam, len(self.counts))
        return Batch(images, batch.labels, targets)
