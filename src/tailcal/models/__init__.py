"""Networks: a backbone that makes features, a head that makes logits. Backbones are looked up by name."""

from torch import Tensor, nn

from tailcal.errors import UserError
from tailcal.models import resnet
from tailcal.params import PARAMS

BACKBONES = {**resnet.BACKBONES}


class Network(nn.Module):
    """`head(backbone(images))`: images float [B, C, H, W], features [B, D], logits [B, K]."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def build(name: str, channels: int, num_classes: int, where: str = "backbone") -> Network:
    """A freshly initialised network with a linear head, drawn from torch's global generator.

    Raises UserError when there is no backbone of that name; `where` is the key that named it.
    """
    if name not in BACKBONES:
        raise UserError(f"{PARAMS}: {where}: must be one of {', '.join(BACKBONES)}, got {name!r}")
    backbone = BACKBONES[name](channels)
    return Network(backbone, resnet.linear(backbone.features, num_classes))
