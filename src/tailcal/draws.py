"""Every random draw of a training, as a pure function of (seed, purpose, step).

Nothing here has a state to save or restore: that is what makes resuming exact, and what makes a replica independent of
who trains beside it.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

HostDraw = Callable[[np.random.Generator], Sequence[float]]


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any parts, for instance `derive(seed, "augment", step)`; other parts, unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """The random numbers of one training step.

    `generator` is torch's, on the `device`, for draws as large as the batch. The few numbers that a step draws on
    the host (mixup's lambda) come as tensors too: a step that reads them from there can be recorded and replayed, and
    never waits for the device.
    """

    def __init__(self, seed: int, step: int, generator: torch.Generator):
        self.seed, self.device, self.generator = seed, generator.device, generator
        self.turn_to(step)

    def turn_to(self, step: int) -> None:
        """Go over to the numbers of another step."""
        self.generator.manual_seed(derive(self.seed, "device", step))
        self._host = np.random.default_rng(derive(self.seed, "host", step))

    def permutation(self, n: int) -> Tensor:
        """A random permutation of 0..n-1, int64 [n], on the device."""
        keys = torch.rand(n, generator=self.generator, device=self.device, dtype=torch.float64)
        return keys.argsort()

    def host(self, draw: HostDraw) -> Tensor:
        """What `draw` takes from a NumPy generator, as a float64 tensor [number of values] on the device.

        A step must call this with the same functions in the same order each time.
        """
        values = torch.tensor(draw(self._host), dtype=torch.float64)
        if self.device.type == "cuda":
            values = values.pin_memory()  # from pageable memory the copy would wait for the device
        return values.to(self.device, non_blocking=True)

    def beta(self, alpha: float) -> Tensor:
        """One draw of Beta(alpha, alpha), a float64 scalar."""
        return self.host(lambda generator: [generator.beta(alpha, alpha)])[0]
