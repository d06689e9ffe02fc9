"""Networks: a backbone that makes features, a head that makes logits. Backbones are looked up by name."""

from torch import Tensor, nn

from tailcal.models import heads, resnet

BACKBONES = {**resnet.BACKBONES}


class Network(nn.Module):
    """`head(backbone(images))`: images float [B, C, H, W], features [B, D], logits [B, K]."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def build(backbone: str, head: str, channels: int, num_classes: int) -> Network:
    """A freshly initialised network, drawn from torch's global generator. Raises KeyError for an unknown name."""
    body = BACKBONES[backbone](channels)
    return Network(body, heads.HEADS[head](body.features, num_classes))
