"""Networks: a backbone that makes features, a head that makes logits. Backbones are looked up by name."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailcal.errors import UserError
from tailcal.models import heads, imagenet, resnet

BACKBONES = {**resnet.BACKBONES, **imagenet.BACKBONES}


class Network(nn.Module):
    """`head(backbone(images))`: images float [B, C, H, W], features [B, D], logits [B, K]."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def train(self, mode: bool = True) -> "Network":
        """Put all layers into training or evaluation mode, but for those that are pinned to the latter."""
        super().train(mode)
        for layer in self.modules():
            if getattr(layer, "pinned", False):
                layer.eval()
        return self


class BFloat16Backbone(nn.Module):
    """A backbone that computes in bf16, on the same weights, and returns float32 features.

    Heads and losses stay in float32: they cost next to nothing, and bf16's 8 bits cannot hold a small difference of
    logits, a class weight or a cosine near 1.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            return self.inner(images).float()


def build(backbone: str, head: str, channels: int, num_classes: int, trains: str = "all") -> Network:
    """A freshly initialised network, drawn from torch's global generator. Raises KeyError for an unknown name.

    trains: what of the backbone may ever learn, `all` or `last_block`.
    """
    body = BACKBONES[backbone](channels)
    if trains == "last_block":
        imagenet.freeze_but_last_block(body)
    return Network(body, heads.HEADS[head](body.features, num_classes, body.kaiming))


def rebuild(record: dict[str, Any], source: Path) -> Network:
    """`build` by the arguments that a file has recorded. Raises UserError naming `source`, the file, where they make no
    network."""
    try:
        return build(**record)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source}: this version of tailcal has no network {record} ({error})") from None
