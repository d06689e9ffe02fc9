"""CIFAR ResNets (He et al. 2016, section 4.2): 6n + 2 layers, option-A shortcuts, 16-32-64 channels, D = 64.

resnet8 (n = 1) is the small one, for images of 8x8 pixels and tests.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


def linear(features: int, num_classes: int) -> nn.Linear:
    """A linear classifier with Kaiming-normal weights."""
    layer = nn.Linear(features, num_classes)
    nn.init.kaiming_normal_(layer.weight)
    return layer


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    return layer


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free (option A) shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: take every stride-th pixel, pad the channels with zeros evenly on both sides."""
        if self.extra == 0:
            return x
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class CifarResNet(nn.Module):
    """Stem of 16 channels, three stages of `blocks` basic blocks, global average pooling; features [B, 64]."""

    def __init__(self, channels: int, blocks: int):
        super().__init__()
        self.features = 64
        self.conv1, self.bn1 = _conv3x3(channels, 16), nn.BatchNorm2d(16)
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        inputs = [16, *widths[:-1]]
        self.stages = nn.Sequential(
            *[
                BasicBlock(before, after, 1 if before == after else 2)
                for before, after in zip(inputs, widths, strict=True)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(F.relu(self.bn1(self.conv1(x)))).mean(dim=(2, 3))


BACKBONES = {f"resnet{6 * n + 2}": partial(CifarResNet, blocks=n) for n in (1, 3, 5, 7, 9)}
