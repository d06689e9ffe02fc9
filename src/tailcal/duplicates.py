"""Images that a data set has twice, pixel for pixel: told, and not removed, since published data sets have some."""

from hashlib import blake2b

import numpy as np

TWICE = {  # what `count` counts
    "test": "of the test images in the training split too, and so not new to the model",
    "test_holdout": "of the test images in the hold-out too, and so not new to what is fitted on it",
    "holdout": "of the held-out images in the training split too, where the model is surer of them than of new ones",
    "train": "of the training images in another class too",
}


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
    """How many images there are of each kind of TWICE, whatever their labels but for the last.

    `train`, `holdout` and `test` are digests of the splits, uint64 [n]; `train_labels` int64 [n].
    """
    distinct = np.unique(np.stack([train, train_labels.astype(np.uint64)], axis=1), axis=0)
    found, classes = np.unique(distinct[:, 0], return_counts=True)
    again = {
        "test": np.isin(test, train),
        "test_holdout": np.isin(test, holdout),
        "holdout": np.isin(holdout, train),
        "train": np.isin(train, found[classes > 1]),
    }
    return {which: int(images.sum()) for which, images in again.items()}
