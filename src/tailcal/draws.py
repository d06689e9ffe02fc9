"""Every random draw of a training, as a pure function of (seed, purpose, step).

Nothing here has a state to save or restore: that is what makes resuming exact, and what makes a replica independent of
who trains beside it.
"""

import hashlib

import numpy as np
import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any parts, for instance `derive(seed, "augment", step)`; other parts, unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """The random numbers of one training step.

    `device` is a torch.Generator on the device, for draws as large as the batch. `host` is a NumPy generator, for the
    few scalars a step needs (mixup's lambda); it never waits for the device.
    """

    def __init__(self, seed: int, step: int, generator: torch.Generator):
        self.device = generator.manual_seed(derive(seed, "device", step))
        self.host = np.random.default_rng(derive(seed, "host", step))

    def permutation(self, n: int) -> torch.Tensor:
        """A random permutation of 0..n-1, int64 [n], on the device."""
        return torch.randperm(n, generator=self.device, device=self.device.device)

    def beta(self, alpha: float) -> float:
        """One draw of Beta(alpha, alpha)."""
        return float(self.host.beta(alpha, alpha))
