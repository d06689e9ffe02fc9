"""CIFAR-100 from its official archive (Krizhevsky 2009): 32x32 colour, 100 fine classes of 500 training images."""

from pathlib import Path
from typing import Literal

from tailcal import cifar_archive
from tailcal.sources import Raw

SHA256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"


class Config(cifar_archive.ArchiveConfig):
    """`url` may name a mirror of the archive."""

    kind: Literal["cifar100"]


def load(config: Config, downloads: Path) -> Raw:
    """All of CIFAR-100. Raises UserError when its archive cannot be had whole."""
    from torchvision.datasets import CIFAR100

    return cifar_archive.load(CIFAR100, SHA256, config, downloads)
