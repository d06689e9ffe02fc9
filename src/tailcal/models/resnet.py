"""CIFAR ResNets, for small images: a 3x3 stem, no max-pooling, global average pooling.

resnet8 to resnet56 are those of He et al. 2016, section 4.2: 6n + 2 layers in three stages of 16, 32 and 64 channels,
parameter-free (option A) shortcuts, D = 64. resnet32_x4 is four times as wide, D = 256 (GLMC, Du et al. 2023).
resnet18 and resnet34 have four stages of 64 to 512 channels and convolutions as shortcuts, D = 512 (FSGL).
resnet8 is the small one, for images of 8x8 pixels and tests.

First weights are Kaiming-normal, but those of resnet18 and resnet34 PyTorch's own, as in the codes of GLMC and FSGL.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, kaiming: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    if kaiming:
        nn.init.kaiming_normal_(layer.weight)
    return layer


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d without counting batches: nothing reads the counter, and it costs a kernel launch per layer and
    step. It stays in the weights, as 0, where files of weights have it."""

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)


class PadShortcut(nn.Module):
    """Option A: take every stride-th pixel, pad the channels with zeros evenly on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int, kaiming: bool):
        super().__init__()
        del kaiming  # it has no weights
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class ConvShortcut(nn.Sequential):
    """Option B: a strided 1x1 convolution and batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int, kaiming: bool):
        super().__init__(_conv(inputs, outputs, 1, stride, kaiming), BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is the identity where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: type[nn.Module], kaiming: bool = True):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride, kaiming), BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3, 1, kaiming), BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else shortcut(inputs, outputs, stride, kaiming)

    def forward(self, x: Tensor) -> Tensor:
        # In place: neither batch norm nor a sum needs what it gave for its gradient.
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class CifarResNet(nn.Module):
    """`blocks` basic blocks in each stage, the first stage `width` channels wide, each further one twice as wide at
    half the resolution; features [B, D], D = `features` = the last stage's width.

    kaiming: first weights are Kaiming-normal, and so are a linear head's to be; else they are PyTorch's own.
    """

    def __init__(
        self, channels: int, blocks: tuple[int, ...], width: int, shortcut: type[nn.Module], kaiming: bool = True
    ):
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, width, 3, kaiming=kaiming), BatchNorm2d(width)
        layers, inputs = [], width
        for stage, depth in enumerate(blocks):
            for block in range(depth):
                outputs = width * 2**stage
                layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1, shortcut, kaiming))
                inputs = outputs
        self.stages = nn.Sequential(*layers)
        self.features, self.kaiming = inputs, kaiming

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(F.relu(self.bn1(self.conv1(x)), inplace=True)).mean(dim=(2, 3))


BACKBONES = {
    **{
        f"resnet{6 * n + 2}": partial(CifarResNet, blocks=(n, n, n), width=16, shortcut=PadShortcut)
        for n in (1, 3, 5, 7, 9)
    },
    "resnet32_x4": partial(CifarResNet, blocks=(5, 5, 5), width=64, shortcut=PadShortcut),
    "resnet18": partial(CifarResNet, blocks=(2, 2, 2, 2), width=64, shortcut=ConvShortcut, kaiming=False),
    "resnet34": partial(CifarResNet, blocks=(3, 4, 6, 3), width=64, shortcut=ConvShortcut, kaiming=False),
}
