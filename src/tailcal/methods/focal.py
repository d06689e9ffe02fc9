"""Focal loss (Lin et al. 2017, equation 4), over a softmax: images that are already right count for little.

L = (1 - p_y)^gamma (-log p_y);  gamma = 0 is cross-entropy

The paper's detector has a sigmoid a class, and so have Cui et al. 2019; the softmax form is that of LDAM-DRW's code
(Cao et al. 2019), and of the tables that go by it.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tailcal.method import Batch, Representation, TrainedConfig


def focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Batch-mean focal loss. logits [B, K] of two classes or more, labels int64 [B], gamma 0 or more."""
    # 1 - p_y as the sum of the other classes: where p_y rounds to 1 it stays above 0, so that no power of it, and no
    # gradient of such a power, is infinite.
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    log_others = logits.masked_fill(is_label, -torch.inf).logsumexp(dim=1) - logits.logsumexp(dim=1)
    return ((gamma * log_others).exp() * F.cross_entropy(logits, labels, reduction="none")).mean()


class Method(Representation):
    """Only the loss differs from cross-entropy."""

    class Config(TrainedConfig):
        """gamma: the focusing parameter; the larger, the less an image counts that is classified well."""

        gamma: Annotated[float, Field(ge=0, le=100)]

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        return focal(logits, batch.labels, self.config.gamma)
