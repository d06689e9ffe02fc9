"""AutoAugment's CIFAR-10 policy and Cutout, for a whole batch at a time: uint8 images and random draws in, uint8 out.

AutoAugment: Cubuk et al. 2019. Every image gets exactly what torchvision's `AutoAugment(CIFAR10, fill=fill)` (nearest
neighbour) gives for that image in Pillow, bit for bit, on the CPU and on the GPU alike: what does not depend on the
pixels is a table, made on the host in float64; counts and sums are integers; and where Pillow rounds floats, the same
IEEE 754 operations are done here. Each of those must stay a kernel of its own: fused with the next (`torch.compile`,
`addcmul`), a product and a sum may be rounded once instead of twice. The code that the released ones of long-tailed
papers share fills with a grey of 128 (torchvision's default is 0); it also shears bicubically, rotates one way only and
moves an image of 32 pixels by one pixel more, which is not done here.

Each image has one operation a slot, so a slot is three passes over the batch (look up, move, blend), of which two leave
the image as it is. Nothing here waits for the device, and shapes depend on nothing but shapes. The tables of an image
size are made and kept when that size is first met: run one batch before a CUDA graph is captured.

Cutout: DeVries and Taylor 2017.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tailcal.draws import Draws

# (operation, probability, magnitude) of the first and of the second slot; torchvision's order.
CIFAR10_POLICY = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)

# Rows of the tables are settings: (operation, magnitude, sign), in this order, then one row that changes nothing. The
# geometric operations come first, so that the largest table, a map of pixels, needs no rows for the others.
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
WITHOUT_MAGNITUDE = ("AutoContrast", "Equalize", "Invert")
OPERATIONS = (*GEOMETRIC, *BLENDS, "Posterize", "Solarize", *WITHOUT_MAGNITUDE)
MAGNITUDES = 10
STILL = len(GEOMETRIC) * MAGNITUDES * 2
UNCHANGED = len(OPERATIONS) * MAGNITUDES * 2


def _row(operation: str, magnitude: int | None, negative: bool = False) -> int:
    """The tables' row of a setting; an operation without magnitude has it at 0."""
    return (OPERATIONS.index(operation) * MAGNITUDES + (magnitude or 0)) * 2 + negative


@dataclass(frozen=True)
class PolicyDraws:
    """What AutoAugment draws for a batch of B images, all on the device.

    sub_policy int64 [B] in 0..24; applied bool [B, 2], whether the operation of each slot takes place; negative
    bool [B, 2], whether its magnitude is negated (which means nothing to an operation without a sign).
    """

    sub_policy: Tensor
    applied: Tensor
    negative: Tensor


@dataclass(frozen=True)
class _Tables:
    """What each setting does to images of one size, [rows] or [rows, ...] on the device.

    operation int64, the place in OPERATIONS; levels uint8 [rows, 256], the new value of each value; factor float32, the
    weight of the image against what it is blended with; source int64 [STILL + 1, H * W], the flat place of the pixel
    that each pixel is copied from, H * W where that is outside.
    """

    operation: Tensor
    levels: Tensor
    factor: Tensor
    source: Tensor


def _affine(operation: str, magnitude: float, height: int, width: int) -> tuple[float, ...]:
    """The six numbers torchvision hands to Pillow: the place in the input, from the place in the output."""
    if operation == "ShearX":  # about the upper left corner, as in the authors' code
        return 1.0, magnitude, 0.0, 0.0, 1.0, 0.0
    if operation == "ShearY":
        return 1.0, 0.0, 0.0, magnitude, 1.0, 0.0
    if operation == "TranslateX":
        return 1.0, 0.0, -float(int(magnitude)), 0.0, 1.0, 0.0
    if operation == "TranslateY":
        return 1.0, 0.0, 0.0, 0.0, 1.0, -float(int(magnitude))
    angle = -math.radians(magnitude)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y


def _source(operation: str, magnitude: float, height: int, width: int) -> np.ndarray:
    """Flat places [H * W] of the pixels that Pillow's nearest neighbour copies, in its 16.16 fixed point (with which it
    works on sides below 2^15)."""
    a0, a1, a2, a3, a4, a5 = _affine(operation, magnitude, height, width)
    a2, a5 = a2 + a0 * 0.5 + a1 * 0.5, a5 + a3 * 0.5 + a4 * 0.5
    a0, a1, a2, a3, a4, a5 = (math.floor(a * 65536 + 0.5) for a in (a0, a1, a2, a3, a4, a5))
    y, x = np.indices((height, width))
    column, row = (a2 + a1 * y + a0 * x) >> 16, (a5 + a4 * y + a3 * x) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return np.where(inside, row * width + column, height * width).ravel()


def _levels(operation: str, magnitude: float) -> np.ndarray:
    """The new value [256] of each value, for the operations whose table is the same for every image."""
    value = np.arange(256)
    if operation == "Invert":
        return 255 - value
    if operation == "Solarize":
        return np.where(value < magnitude, value, 255 - value)
    if operation == "Posterize":
        return value & ~(2 ** (8 - int(magnitude)) - 1)
    return value


@cache
def _tables(height: int, width: int, device: torch.device) -> _Tables:
    """The tables for images of this size, made once a size and device."""
    # float32 as in torchvision, so that a translation is cut to the same number of pixels
    magnitudes = {
        "ShearX": torch.linspace(0, 0.3, MAGNITUDES),
        "ShearY": torch.linspace(0, 0.3, MAGNITUDES),
        "TranslateX": torch.linspace(0, 150 / 331 * width, MAGNITUDES),
        "TranslateY": torch.linspace(0, 150 / 331 * height, MAGNITUDES),
        "Rotate": torch.linspace(0, 30, MAGNITUDES),
        "Posterize": 8 - (torch.arange(MAGNITUDES) / ((MAGNITUDES - 1) / 4)).round(),
        "Solarize": torch.linspace(255, 0, MAGNITUDES),
        **dict.fromkeys(BLENDS, torch.linspace(0, 0.9, MAGNITUDES)),
        **dict.fromkeys(WITHOUT_MAGNITUDE, torch.zeros(MAGNITUDES)),
    }
    operation = np.full(UNCHANGED + 1, len(OPERATIONS))
    levels = np.tile(np.arange(256, dtype=np.uint8), (UNCHANGED + 1, 1))
    factor = np.ones(UNCHANGED + 1, dtype=np.float32)
    source = np.tile(np.arange(height * width), (STILL + 1, 1))
    for place, name in enumerate(OPERATIONS):
        for index, size in enumerate(magnitudes[name].tolist()):
            for negative in (False, True):
                row = _row(name, index, negative)
                signed = -size if negative else size
                operation[row] = place
                if name in GEOMETRIC:
                    source[row] = _source(name, signed, height, width)
                elif name in BLENDS:
                    factor[row] = 1 + signed
                else:
                    levels[row] = _levels(name, size)
    return _Tables(*(torch.from_numpy(array).to(device) for array in (operation, levels, factor, source)))


@cache
def _policy(device: torch.device) -> tuple[Tensor, Tensor]:
    """CIFAR10_POLICY as tensors [25, 2]: the tables' row of each operation with its positive sign; the probability."""
    rows = [[_row(operation, magnitude) for operation, _, magnitude in sub] for sub in CIFAR10_POLICY]
    probabilities = [[probability for _, probability, _ in sub] for sub in CIFAR10_POLICY]
    return torch.tensor(rows, device=device), torch.tensor(probabilities, device=device)


def check_images(images: Tensor) -> None:
    """Raise ValueError unless images are uint8 [B, C, H, W] with C = 1 or 3."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [B, C, H, W] with 1 or 3 channels, got {list(images.shape)}")
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")


def _look_up(images: Tensor, rows: Tensor, table: _Tables) -> Tensor:
    """AutoContrast, Equalize and the operations with a table of their own; each channel on its own, as in Pillow."""
    b, c, h, w = images.shape
    pixels = images.flatten(2).long()
    low, high = images.flatten(2).aminmax(dim=2, keepdim=True)
    value = torch.arange(256, device=images.device)

    # Pillow's arithmetic, step by step. A tensor divides, and no number: 255.0 / x multiplies by the reciprocal of x.
    span = (high - low).double()
    scale = torch.full_like(span, 255) / span.clamp(min=1)
    stretched = (value * scale + -low.double() * scale).clamp(0, 255).to(torch.uint8)

    # One histogram for all, flat: index_add_ is deterministic on a GPU and never waits for it.
    places = (pixels + torch.arange(0, b * c * 256, 256, device=images.device).view(b, c, 1)).flatten()
    ones = torch.ones((), dtype=torch.int32, device=images.device).expand_as(places)
    counts = torch.zeros(b * c * 256, dtype=torch.int32, device=images.device).index_add_(0, places, ones)
    counts = counts.view(b, c, 256)
    below = counts.cumsum(2, dtype=torch.int32) - counts
    step = below.gather(2, high.long()) // 255
    equalized = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255).to(torch.uint8)

    operation = table.operation[rows][:, None, None]
    is_stretched = (operation == OPERATIONS.index("AutoContrast")) & (high > low)
    is_equalized = (operation == OPERATIONS.index("Equalize")) & (step > 0)
    levels = torch.where(is_stretched, stretched, table.levels[rows][:, None])
    levels = torch.where(is_equalized, equalized, levels)
    return levels.gather(2, pixels).view(b, c, h, w)


def _move(images: Tensor, rows: Tensor, table: _Tables, fill: int) -> Tensor:
    """Shears, translations and rotations: every pixel is a copy of another one, or `fill`."""
    pixels = F.pad(images.flatten(2), (0, 1), value=fill)  # the place H * W is outside
    source = table.source[rows.clamp(max=STILL)][:, None].expand(-1, images.shape[1], -1)
    return pixels.gather(2, source).view_as(images)


def _grey(images: Tensor) -> Tensor:
    """Pillow's luminance of images with 3 channels, uint8 [B, 1, H, W]; images with 1 channel as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (channel.int() for channel in images.split(1, dim=1))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)


def _smooth(images: Tensor) -> Tensor:
    """Pillow's ImageFilter.SMOOTH: 3 x 3 ones with a 5 in the middle, over 13, rounded; the border as it is."""
    pixels = images.short()
    across = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    total = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + pixels[..., 1:-1, 1:-1] * 4
    smooth = images.clone()
    # total / 13 + 1/2 is never nearer than 1/26 to an integer, so how floats are rounded does not matter
    smooth[..., 1:-1, 1:-1] = (total / 13 + 0.5).to(torch.uint8)
    return smooth


def _blend(images: Tensor, rows: Tensor, table: _Tables) -> Tensor:
    """Brightness, Color, Contrast and Sharpness: from black, the grey image, its mean, the smoothed image, through the
    image and beyond. A factor of 1 is the image itself, whatever it is blended with."""
    grey = _grey(images)
    pixels = images.shape[2] * images.shape[3]
    mean = ((2 * grey.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)).to(torch.uint8)

    operation = table.operation[rows][:, None, None, None]
    other = torch.where(operation == OPERATIONS.index("Color"), grey, torch.zeros_like(mean))
    other = torch.where(operation == OPERATIONS.index("Contrast"), mean, other)
    other = torch.where(operation == OPERATIONS.index("Sharpness"), _smooth(images), other).float()
    factor = table.factor[rows][:, None, None, None]
    return (images.float() - other).mul_(factor).add_(other).clamp_(0, 255).to(torch.uint8)


def _transformed(images: Tensor, rows: Tensor, fill: int) -> Tensor:
    """Apply to each image the setting of its row, rows int64 [B]."""
    table = _tables(images.shape[2], images.shape[3], images.device)
    return _blend(_move(_look_up(images, rows, table), rows, table, fill), rows, table)


def draw_policies(batch: int, draws: Draws) -> PolicyDraws:
    """One sub-policy for each of `batch` images, uniformly; whether each of its operations takes place, with the
    operation's own probability; and the signs, either with probability 1/2."""
    device = draws.device
    sub_policy = torch.randint(len(CIFAR10_POLICY), (batch,), generator=draws.generator, device=device)
    applied = torch.rand(batch, 2, generator=draws.generator, device=device) < _policy(device)[1][sub_policy]
    negative = torch.rand(batch, 2, generator=draws.generator, device=device) < 0.5
    return PolicyDraws(sub_policy, applied, negative)


def autoaugment(images: Tensor, drawn: PolicyDraws, fill: int) -> Tensor:
    """AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019), for these draws; equal to torchvision on Pillow images.

    images uint8 [B, C, H, W] with C = 1 or 3, on the device of `drawn`; fill 0..255, the value of what is brought in
    from outside an image. Returns uint8 [B, C, H, W].
    ValueError for another dtype, or another number of dimensions or channels.
    """
    check_images(images)
    rows = _policy(images.device)[0][drawn.sub_policy] + drawn.negative
    rows = rows.masked_fill(~drawn.applied, UNCHANGED)
    return _transformed(_transformed(images, rows[:, 0], fill), rows[:, 1], fill)


def draw_centres(batch: int, height: int, width: int, draws: Draws) -> Tensor:
    """The pixel (row, column) on which each image's hole is centred, uniformly over its pixels. int64 [batch, 2]."""
    device = draws.device
    rows = torch.randint(height, (batch,), generator=draws.generator, device=device)
    columns = torch.randint(width, (batch,), generator=draws.generator, device=device)
    return torch.stack([rows, columns], dim=1)


def cutout(images: Tensor, centres: Tensor, size: int) -> Tensor:
    """Cutout (DeVries and Taylor 2017): zeros in one square hole an image, clipped at the border.

    images uint8 [B, C, H, W] with C = 1 or 3; centres int64 [B, 2] (row, column), on their device; size >= 1, the side
    of the hole, which takes the rows and columns from centre - size // 2 on. Returns uint8 [B, C, H, W].
    ValueError for other images and sizes.
    """
    check_images(images)
    if size < 1:
        raise ValueError(f"the side of the hole must be 1 pixel or more, got {size}")
    first = centres - size // 2
    rows = torch.arange(images.shape[2], device=images.device) - first[:, :1]
    columns = torch.arange(images.shape[3], device=images.device) - first[:, 1:]
    rows, columns = ((place >= 0) & (place < size) for place in (rows, columns))
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)
