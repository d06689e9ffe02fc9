"""Where images come from. One module a kind of source; `source.kind` in params.yaml is the module's name.

A source module declares `Config` (a `params.Strict` with the keys of its block, `kind` included) and
`load(config, downloads) -> Raw`. Heavy libraries are imported inside `load`, so that checking params stays cheap.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailcal.errors import UserError
from tailcal.params import Dataset, Strict


@dataclass(frozen=True)
class Raw:
    """A labelled data set as its source gives it, before any subsampling.

    Images are uint8 [N, H, W, C], labels int64 [N] in 0..K-1, `class_names` has K entries.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]


def kinds() -> list[str]:
    """Names of the sources there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def configure(dataset: Dataset) -> Strict:
    """Check a data set's `source` block with the Config of the module its `kind` names. Raises UserError."""
    kind = dataset.source.get("kind")
    if kind not in kinds():
        raise UserError(f"{dataset.key('source.kind')}: must be one of {', '.join(kinds())}, got {kind!r}")
    return dataset.validate_block(importlib.import_module(f"{__name__}.{kind}").Config, dataset.source, "source")


def load(config: Strict, downloads: Path) -> Raw:
    """Fetch the images. `downloads` keeps archives between runs. Raises UserError when they cannot be had whole."""
    return importlib.import_module(f"{__name__}.{config.kind}").load(config, downloads)
