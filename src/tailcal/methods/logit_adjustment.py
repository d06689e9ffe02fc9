"""Logit-adjusted softmax cross-entropy (Menon et al. 2021, equation 10): train on logits shifted by the log priors.

L = CE(z + tau log pi, y),  pi_k = n_k / N;  at test: z

tau = 1 is Balanced Softmax, for the two shifts differ by log N, which softmax does not see. The post-hoc form, which
subtracts tau log pi from the logits of a model of plain cross-entropy, is a rule of `tailcal.posthoc`.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tailcal.losses import require_counts
from tailcal.method import Batch, Representation, TrainedConfig


def log_priors(counts: Tensor) -> Tensor:
    """log pi_k, pi_k = n_k / N, float32 [K]. counts [K]; raises ValueError when a class is empty."""
    require_counts(counts)
    n = counts.double()
    return torch.log(n / n.sum()).float()


class Method(Representation):
    """Cross-entropy on the shifted logits; the test logits are not shifted."""

    class Config(TrainedConfig):
        """tau: strength of the shift; 0 is cross-entropy."""

        tau: Annotated[float, Field(ge=0, le=100)]

    def __init__(self, config: Config, counts: Tensor):
        super().__init__(config, counts)
        self.register_buffer("shift", config.tau * log_priors(counts), persistent=False)

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits + self.shift, batch.targets)
