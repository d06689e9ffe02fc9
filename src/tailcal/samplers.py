"""Which images a step sees: index streams that are pure functions of (labels, seed, position).

A stream is endless, and every batch full. With `last_batch: fill` the last batch of an epoch is filled from the
stream's next pass, where the released codes end an epoch with a smaller batch: the number of steps is the same, and
static shapes are what a fast step needs. With `drop` an epoch has one step fewer, and the images that are left over
come first in the next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tailcal.draws import derive

Sampler = Callable[[np.ndarray, int, int, int], np.ndarray]


def instance(labels: np.ndarray, seed: int, start: int, stop: int) -> np.ndarray:
    """Uniform over images: one random permutation of the data set after the other.

    Returns the image indices at positions `start` to `stop` (exclusive) of the stream, int64 [stop - start].
    """
    n = len(labels)
    passes = range(start // n, -(-stop // n))
    stream = np.concatenate([np.random.default_rng(derive(seed, "instance", p)).permutation(n) for p in passes])
    return stream[start - passes.start * n : stop - passes.start * n]


def _keys(seed: int, purpose: str, items: np.ndarray, passes: np.ndarray) -> np.ndarray:
    """One pseudo-random uint64 per (item, pass), broadcast: SplitMix64's finaliser on a counter."""
    item, lap = items.astype(np.uint64), passes.astype(np.uint64)
    z = item * np.uint64(0x9E3779B97F4A7C15) + lap * np.uint64(0xD1B54A32D192ED03)
    z ^= np.uint64(derive(seed, purpose))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def class_balanced(labels: np.ndarray, seed: int, start: int, stop: int, in_a_row: int = 1) -> np.ndarray:
    """Uniform over classes: cycle through a random permutation of the classes; each gives the next `in_a_row` images of
    its own list, which is reshuffled when it has been used up (Kang et al. 2020; MiSLAS, Zhong et al. 2021).

    Classes without images take no part. Returns indices at positions `start` to `stop` of the stream, int64.
    """
    classes, first, counts = np.unique(np.sort(labels), return_index=True, return_counts=True)
    k = len(classes)
    cycles = np.arange(start // (k * in_a_row), -(-stop // (k * in_a_row)))
    order = _keys(seed, "class order", np.arange(k), cycles[:, None]).argsort(axis=1)
    turn, number = np.divmod(np.arange(start, stop), in_a_row)
    cycle = turn // k
    rank = order[cycle - cycles[0], turn % k]  # which class, as an index into `classes`
    # Of n images that a class has, it gives as its i-th the number i % n of its pass i // n: find each distinct
    # (class, pass) once, shuffle its images by their keys, and look the wanted ones up.
    wanted_pass, offset = np.divmod(cycle * in_a_row + number, counts[rank])
    pairs, which = np.unique(np.stack([rank, wanted_pass]), axis=1, return_inverse=True)
    sizes = counts[pairs[0]]
    begin = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    pair = np.repeat(np.arange(len(sizes)), sizes)
    member = np.arange(sizes.sum()) - begin[pair]
    by_class = np.argsort(labels, kind="stable")
    images = by_class[first[pairs[0]][pair] + member]
    shuffled = images[np.lexsort((_keys(seed, "within class", images, pairs[1][pair]), pair))]
    return shuffled[begin[which.reshape(-1)] + offset]


@dataclass(frozen=True)
class Reweighted:
    """Each image drawn by itself, with replacement, with probability proportional to n_y^(-exponent) (GLMC, Du et al.
    2023): 0 is uniform over images, 1 uniform over classes."""

    exponent: float

    BLOCK: ClassVar[int] = 4096  # positions that share a generator

    def __call__(self, labels: np.ndarray, seed: int, start: int, stop: int) -> np.ndarray:
        """Indices at positions `start` to `stop` of the stream, int64 [stop - start]."""
        weights = np.bincount(labels)[labels] ** -float(self.exponent)
        below = np.cumsum(weights) / weights.sum()
        blocks = range(start // self.BLOCK, -(-stop // self.BLOCK))
        uniform = np.concatenate(
            [np.random.default_rng(derive(seed, "reweighted", b)).random(self.BLOCK) for b in blocks]
        )[start - blocks.start * self.BLOCK : stop - blocks.start * self.BLOCK]
        return np.searchsorted(below, uniform, side="right").clip(max=len(labels) - 1)
