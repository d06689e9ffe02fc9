"""Balanced Softmax (Ren et al. 2020, equation 3): train on logits shifted by the log of the class counts.

L = CE(z + log n, y);  at test: z
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tailcal.method import Batch, Representation


def balanced_softmax(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Batch-mean Balanced Softmax loss.

    logits [B, K], targets int64 [B] or soft [B, K], counts [K] (training images per class, all above 0).
    """
    precise = torch.promote_types(logits.dtype, torch.float32)  # bf16 has no room for a count above 256
    return F.cross_entropy(logits + torch.log(counts.to(precise)), targets)


class Method(Representation):
    """Cross-entropy on the shifted logits; the test logits are not shifted."""

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        return balanced_softmax(logits, batch.targets, self.counts)
