"""Handwritten digits, 8x8 grey: the 1,797 images that ship inside scikit-learn. Nothing is downloaded."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from tailcal import longtail
from tailcal.errors import UserError
from tailcal.sources import Raw, Source


class Config(Source):
    """The digits have no test split of their own: `test_per_class` images of each class are set aside by `seed`."""

    kind: Literal["digits"]
    test_per_class: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]


def load(config: Config, downloads: Path) -> Raw:  # noqa: ARG001 (every source has this signature)
    """All digits as uint8 [N, 8, 8, 1]. Raises UserError when a class would be left without a training image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    names = [str(digit) for digit in digits.target_names]
    available = np.bincount(labels, minlength=len(names))
    if config.test_per_class >= available.min():
        raise UserError(
            f"{config.key('test_per_class')} is {config.test_per_class}: class {available.argmin()} has "
            f"{available.min()} images, so must be at most {available.min() - 1} to leave one to train on"
        )
    # Grey levels 0..16 become 0..255: whole numbers, and no two levels fall together.
    images = (digits.images.astype(np.uint16) * 255 // 16).astype(np.uint8)[..., np.newaxis]
    train, test = longtail.balanced_split(labels, len(names), config.test_per_class, config.seed)
    return Raw(images[train], labels[train], images[test], labels[test], names)
