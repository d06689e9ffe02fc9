"""Images that a data set has twice, pixel for pixel.

A test image that was trained on says nothing about new ones; a held-out one makes the temperature that is fitted on it
too sure; and one that two classes have is right for one of them only. They are told, and not removed: published numbers
are of data sets that have some.
"""

from hashlib import blake2b

import numpy as np


def digests(images: np.ndarray) -> np.ndarray:
    """A digest of each image's bytes, uint64 [N]; `images` [N, ...], usually memory-mapped, are read once, in order.

    Of a million different images, two have the same digest with a probability of 3e-8.
    """
    each = (int.from_bytes(blake2b(np.ascontiguousarray(image), digest_size=8).digest(), "little") for image in images)
    return np.fromiter(each, np.uint64, len(images))


def first_of_each(digests_N: np.ndarray) -> np.ndarray:
    """The position of the first image with the same pixels, int64 [N]: its own where there is none before it."""
    _, first, group = np.unique(digests_N, return_index=True, return_inverse=True)
    return first[group]


def count(train: np.ndarray, train_labels: np.ndarray, holdout: np.ndarray, test: np.ndarray) -> dict[str, int]:
    """How many images say less than they seem to; `train`, `holdout` and `test` are digests of the splits [n].

    train: training images that another class has too; holdout: held-out images that are trained on as well; test: test
    images that are trained on, or held out, as well. `train_labels` int64 [n].
    """
    distinct = np.unique(np.stack([train, train_labels.astype(np.uint64)], axis=1), axis=0)
    found, classes = np.unique(distinct[:, 0], return_counts=True)
    return {
        "train": int(np.isin(train, found[classes > 1]).sum()),
        "holdout": int(np.isin(holdout, train).sum()),
        "test": int(np.isin(test, np.concatenate([train, holdout])).sum()),
    }
