"""Long-tailed subsets: how many images each class keeps, which ones, and the shot groups. Pure NumPy.

The profiles and the selection are those of Cao et al. 2019 (LDAM-DRW) and Cui et al. 2019 (class-balanced loss), so on
the official CIFAR archives a subset is image for image the one that published results were measured with. The shot
groups are those of Liu et al. 2019 (OLTR).
"""

from collections.abc import Sequence

import numpy as np

from tailcal.errors import UserError


def class_title(k: int, class_names: Sequence[str] | None = None) -> str:
    """How an error calls class `k`: by its number, and by its name where the name says more."""
    named = class_names is not None and class_names[k] != str(k)
    return f"class {k} ({class_names[k]})" if named else f"class {k}"


def class_counts(
    n_max: int, num_classes: int, factor: float, profile: str, class_names: Sequence[str] | None = None
) -> np.ndarray:
    """Training images per class, int64 [K], from the largest class (label 0) to the smallest.

    exponential: floor(n_max * factor^(-k / (K-1))); step: n_max for the first K // 2 classes, floor(n_max / factor) for
    the others. `n_max` counts images, `factor` is n_max / n_min. The profile "natural" keeps what there is and needs no
    counts from here.

    Raises UserError when the factor is below 1, when there are fewer than 2 classes, and when a class would keep no
    image; the error then names the class and the largest factor that works.
    """
    if num_classes < 2:
        raise UserError(f"a long tail needs at least 2 classes, got {num_classes}")
    if not factor >= 1:
        raise UserError(f"the imbalance factor is {factor:g}: must be at least 1 (largest class over smallest)")
    rank = np.arange(num_classes)
    if profile == "exponential":
        exponent = rank / (num_classes - 1)
    elif profile == "step":
        exponent = (rank >= num_classes // 2).astype(float)
    else:
        raise UserError(f"the profile {profile!r} has no counts: must be exponential or step")
    # The nudge is far below one image. It keeps a power that is a whole number from being floored to the one below it.
    counts = np.floor(n_max * float(factor) ** -exponent * (1 + 1e-12)).astype(np.int64)
    if (counts < 1).any():
        k = int(np.argmax(counts < 1))
        raise UserError(
            f"{class_title(k, class_names)} keeps no image: the largest class has {n_max} and the imbalance factor is "
            f"{factor:g}" + (f"; the largest factor that works is {n_max}" if n_max >= 1 else "")
        )
    return counts


def subset_indices(
    labels: np.ndarray,
    counts: np.ndarray,
    seed: int = 0,
    holdout_per_class: int = 0,
    class_names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the held-out images in `labels` (int [N], values 0..K-1).

    `counts` (int [K]) are training images per class. One legacy generator is seeded once; for each class in ascending
    label order its positions, in the data's order, are shuffled in place: the first counts[k] train, the last
    `holdout_per_class` are held out. The shuffles do not depend on the counts, so a smaller count is a prefix of a
    larger one and the hold-out is the same for every factor.

    Returns two int64 arrays, [sum(counts)] and [K * holdout_per_class], both grouped by class in label order and
    shuffled within a class, as the published code leaves them.

    Raises UserError naming the class when it has too few images, or when a label is not one of the K classes.
    """
    if labels.size and not 0 <= labels.min() <= labels.max() < len(counts):
        raise UserError(f"labels run from {labels.min()} to {labels.max()}: must lie in 0..{len(counts) - 1}")
    generator = np.random.RandomState(seed)
    train, holdout = [], []
    for k, count in enumerate(counts):
        positions = np.flatnonzero(labels == k)
        if count + holdout_per_class > len(positions):
            asked = f"{count} + {holdout_per_class} held out" if holdout_per_class else f"{count}"
            raise UserError(f"{class_title(k, class_names)} has {len(positions)} images, too few for {asked}")
        generator.shuffle(positions)
        train.append(positions[:count])
        holdout.append(positions[len(positions) - holdout_per_class :])
    return np.concatenate(train), np.concatenate(holdout)


def balanced_split(
    labels: np.ndarray, num_classes: int, per_class: int, seed: int = 0, class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Set `per_class` images of each class aside: (positions of the rest, positions set aside), each in data order.

    `labels` is int [N]; the results are int64 [N - K * per_class] and [K * per_class]. Raises UserError naming the
    class that has too few images.
    """
    aside, _ = subset_indices(labels, np.full(num_classes, per_class), seed, class_names=class_names)
    return np.setdiff1d(np.arange(len(labels)), aside), np.sort(aside)


def shot_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Which classes are many-, medium- and few-shot, bool [K] each, by training count (int [K]).

    Many: more than 100 images; medium: 20 to 100; few: below 20. A group may be empty.
    """
    counts = np.asarray(counts)
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
