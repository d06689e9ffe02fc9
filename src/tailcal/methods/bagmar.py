"""BaGMar / GALA (Zhang et al. 2024): margins that follow the gradient which each classifier has received.

    g_ij = |dL/dz_ij| = |p_ij - 1[j = y_i]| / B         the batch-mean loss's gradient at the adjusted logits
    C_j <- C_j + sum over i with y_i = j of g_ij         positive gradient of classifier j, after every step
    M_j <- M_j + C_j
    L    = CE(z + lambda1 log(G + 1e-3), y);  at test: z

G is M (`accumulation: total`, as released: early gradients weigh more) or C (`gradient`, as in the paper), from the
steps before this one; all zero at the start. Only the diagonal of the papers' K x K table enters, so only it is kept.
The released code also subtracts lambda2 log(G_neg of the label's classifier): one number for all K logits of a sample,
which softmax does not see. It is left out.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tailcal.method import Batch, Representation, TrainedConfig


def adjust(logits: Tensor, positive: Tensor, strength: float) -> Tensor:
    """z + lambda1 log(G + 1e-3): logits [B, K], positive gradients G [K] (0 or more), strength lambda1."""
    return logits + strength * torch.log(positive + 1e-3)


def accumulate(gradient: Tensor, total: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add one step to the accumulators, in place: C += the batch's positive gradients, then M += C.

    gradient (C) and total (M): float [K]; logits [B, K], as the loss saw them (adjusted); labels int64 [B].
    """
    of_label = logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    gradient.index_add_(0, labels, (1 - of_label) / len(labels))
    total.add_(gradient)


class Method(Representation):
    """Cross-entropy on logits adjusted by the gradients so far, which are state of the training."""

    class Config(TrainedConfig):
        """lambda1: strength of the margin; accumulation: what G is."""

        lambda1: Annotated[float, Field(ge=0, le=100)]
        accumulation: Literal["total", "gradient"]

    def __init__(self, config: Config, counts: Tensor):
        super().__init__(config, counts)
        self.register_buffer("gradient", torch.zeros(len(counts)))
        self.register_buffer("total", torch.zeros(len(counts)))

    def adjusted(self, logits: Tensor) -> Tensor:
        """The logits that the loss sees."""
        return adjust(logits, getattr(self, self.config.accumulation), self.config.lambda1)

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(self.adjusted(logits), batch.labels)

    def observe(self, logits: Tensor, batch: Batch) -> None:
        accumulate(self.gradient, self.total, self.adjusted(logits), batch.labels)
