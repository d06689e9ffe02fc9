"""CIFAR-10 from its official archive (Krizhevsky 2009): 32x32 colour, 10 classes of 5,000 training images."""

from pathlib import Path
from typing import Literal

from tailcal import cifar_archive
from tailcal.sources import Raw

SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"


class Config(cifar_archive.ArchiveConfig):
    """`url` may name a mirror of the archive."""

    kind: Literal["cifar10"]


def load(config: Config, downloads: Path) -> Raw:
    """All of CIFAR-10. Raises UserError when its archive cannot be had whole."""
    from torchvision.datasets import CIFAR10

    return cifar_archive.load(CIFAR10, SHA256, config, downloads)
