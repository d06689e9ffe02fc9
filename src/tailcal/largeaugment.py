"""Augmentation for pictures of about 224 pixels, a whole batch at a time: uint8 images and draws in, uint8 out.

Everything gives the same images on the CPU and on the GPU for the same draws: it is integers, and single IEEE 754
operations (and the Gaussian's exponentials, in float64, rounded to 22 bits). What follows which original how closely:

- `resized_crop`: torchvision's RandomResizedCrop on Pillow images, bit for bit, in Pillow's own fixed point. Rows come
  first, as in Pillow before 13; since then columns do if the height shrinks more (python-pillow/Pillow#9549), and some
  pixels differ by 1. On tensors torchvision rounds once instead of twice, and some pixels differ by 1.
- `colour_jitter` and `grayscale`: torchvision's ColorJitter (without hue) and RandomGrayscale on tensors, bit for bit.
- `gaussian_blur`: torchvision's on tensors, within 1 (it rounds once). Not Pillow's ImageFilter.GaussianBlur, which
  stands three box filters in for the Gaussian.

Resampling and blur are two passes, each of one matrix an image. A matrix holds integers, in two parts of 11 bits, so
that every product and every sum is an integer below 2^24: float32 holds it exactly, in whatever order it is summed, in
TF32 and under autocast too. Only torch.set_float32_matmul_precision("medium") may not hold it. In the colour operations
a product and a sum must stay kernels of their own, which `torch.compile` does not promise.

Nothing here waits for the device, and shapes depend on nothing but shapes and sizes. For 256 images of 3 x 256 x 256
pixels, resampling to 224 takes about 0.6 GB for a moment.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tailcal.autoaugment import check_images
from tailcal.draws import Draws

ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it takes the central crop
WEIGHT_BITS = 22  # of a filter's weights in Pillow: 1 is 2^22
PART_BITS = WEIGHT_BITS // 2
BRIGHTNESS, CONTRAST, SATURATION = range(3)  # the columns of Jitter.factors


@dataclass(frozen=True)
class Jitter:
    """What ColorJitter draws for a batch of B images, on the device.

    factors float32 [B, 3] of brightness, contrast and saturation, 0 or more, where 1 changes nothing; order int64
    [B, 3], a permutation of 0, 1 and 2 for each image: the columns of `factors` in the order of their operations.
    """

    factors: Tensor
    order: Tensor


def _matrix(first: Tensor, weights: Tensor, length: int) -> Tensor:
    """Weights over all `length` pixels, from those of the pixels that count.

    first int64 [B, S], the pixel of the first weight; weights int32 [B, S, K]. Returns int32 [B, S, length]; a weight
    of a pixel beyond the last one is dropped.
    """
    taps = weights.shape[2]
    places = (torch.arange(1, length + 1, device=first.device) - first[:, :, None]).clamp_(0, taps + 1)
    return F.pad(weights, (1, 1)).gather(2, places)


def _pass(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Weighted sums along the last dimension, rounded to integers, half up.

    pixels float32 [B, N, L], integers in 0..255; matrix int32 [B, S, L], rows of a sum of about 2^22, none of more than
    32 pixels (or sums may pass 2^24). Returns float32 [B, S, N], integers in 0..255.
    """
    coarse, fine = (matrix >> PART_BITS).float(), (matrix & (2**PART_BITS - 1)).float()
    pixels = pixels.mT
    total = torch.bmm(fine, pixels, out=pixels.new_empty(*matrix.shape[:2], pixels.shape[2]))  # autocast leaves out= be
    total.mul_(2.0**-PART_BITS).floor_().add_(2.0 ** (PART_BITS - 1))  # the carry to the coarse part, and its half
    return total.baddbmm_(coarse, pixels).mul_(2.0**-PART_BITS).floor_()


def _filtered(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Filter along rows, then along columns, each time rounded to uint8, as Pillow does.

    images uint8 [B, C, H, W]; down int32 [B, H', H] and across int32 [B, W', W], matrices for `_pass`.
    Returns uint8 [B, C, H', W'].
    """
    b, c, h, w = images.shape
    columns = _pass(images.float().view(b, c * h, w), across)  # [B, W', C H]
    rows = _pass(columns.view(b, -1, h), down)  # [B, H', W' C]
    return rows.view(b, -1, across.shape[1], c).to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def _triangle(first: Tensor, extent: Tensor, size: int, length: int) -> Tensor:
    """Pillow's antialiased bilinear filter from `extent` pixels, from pixel `first` on, to `size` pixels.

    first, extent int64 [B], within 0..length. Returns a matrix for `_pass`, int32 [B, size, length].
    The float64 arithmetic is that of Pillow's Resample.c (precompute_coeffs), in its order. A tensor divides, and no
    number: x / 224 multiplies by the reciprocal of 224 on a GPU.
    """
    device = first.device
    extent = extent.double()[:, None]
    scale = extent / torch.full_like(extent, size)
    reach = scale.clamp(min=1)
    centre = (torch.arange(size, device=device) + 0.5) * scale
    start = (centre - reach + 0.5).clamp(min=0).floor()
    stop = (centre + reach + 0.5).floor().minimum(extent)
    taps = 2 * math.ceil(max(1.0, length / size)) + 1  # enough for any extent
    place = start[:, :, None] + torch.arange(taps, device=device)
    distance = (place - centre[:, :, None] + 0.5) * reach.reciprocal()[:, :, None]
    weights = (1 - distance.abs()).clamp(min=0) * (place < stop[:, :, None])
    share = weights / sum(weights.unbind(2))[:, :, None]
    fixed = (share * 2**WEIGHT_BITS + 0.5).to(torch.int32)
    return _matrix(start.long() + first[:, None], fixed, length)


def _grey(images: Tensor) -> Tensor:
    """torchvision's luminance of images with 3 channels, uint8 [B, 1, H, W]; images with 1 channel as they are."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (channel.float() for channel in images.split(1, dim=1))
    return red.mul_(0.2989).add_(green.mul_(0.587)).add_(blue.mul_(0.114)).to(torch.uint8)


def draw_chosen(batch: int, draws: Draws, probability: float) -> Tensor:
    """Which of `batch` images something happens to, each with this probability. bool [batch], on the device."""
    return torch.rand(batch, generator=draws.generator, device=draws.device) < probability


def draw_resized_crops(
    batch: int,
    height: int,
    width: int,
    draws: Draws,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """The part of each of `batch` images that torchvision's RandomResizedCrop takes.

    Of ten draws of an area (uniform in `scale`, a share of the image) and an aspect ratio (width over height, its
    logarithm uniform in that of `ratio`), the first one counts that fits into `height` x `width` pixels, at a uniformly
    drawn place; if none does, the largest central crop whose ratio is in range. Never empty.
    Returns int64 [batch, 4] (top, left, height, width) on the device.
    ValueError unless 0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1].
    """
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high:
            raise ValueError(f"{name} must be a range of positive numbers, got {(low, high)}")
    device = draws.device
    attempts = torch.empty(2, batch, ATTEMPTS, device=device)
    share = attempts[0].uniform_(*scale, generator=draws.generator).double()
    aspect = attempts[1].uniform_(*map(math.log, ratio), generator=draws.generator).exp_().double()
    place = torch.rand(batch, 2, generator=draws.generator, device=device, dtype=torch.float64)

    area = share * (height * width)
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=2).round().long()  # [B, 10, 2]
    limits = [(sides[:, :, axis] > 0) & (sides[:, :, axis] <= limit) for axis, limit in enumerate((height, width))]
    fits = limits[0] & limits[1]
    first = fits.int().argmax(1)[:, None, None].expand(-1, 1, 2)
    taken = sides.gather(1, first)[:, 0]

    # at most one of them is cut; round() is Python's, half to even, as in torchvision
    tall, wide = max(1, min(height, round(width / ratio[0]))), max(1, min(width, round(height * ratio[1])))
    room = [(side - taken[:, axis] + 1).clamp(min=1) for axis, side in enumerate((height, width))]
    top, left = ((place[:, axis] * room[axis]).long() for axis in range(2))
    drawn = (top, left, *taken.unbind(1))
    central = ((height - tall) // 2, (width - wide) // 2, tall, wide)
    missed = ~fits.any(1)
    return torch.stack([part.masked_fill(missed, value) for part, value in zip(drawn, central, strict=True)], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut one box out of each image and resize it to `size` x `size` pixels, as torchvision does on Pillow images:
    bilinear, antialiased, from the pixels inside the box only.

    images uint8 [B, C, H, W] with C = 1 or 3; boxes int64 [B, 4] (top, left, height, width) on their device, not empty
    and within the images; size >= 1, at least a fifteenth of H and of W. Returns uint8 [B, C, size, size].
    ValueError for other images and sizes, and boxes of another shape.
    """
    check_images(images)
    h, w = images.shape[2:]
    if size < 1 or max(h, w) > 15 * size:
        raise ValueError(f"the size must be at least 1 and a fifteenth of the images' {h} x {w} pixels, got {size}")
    if boxes.shape != (len(images), 4):
        raise ValueError(f"boxes must be [{len(images)}, 4], got {list(boxes.shape)}")
    top, left, height, width = boxes.unbind(1)
    return _filtered(images, _triangle(top, height, size, h), _triangle(left, width, size, w))


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The central `size` x `size` pixels, at the place where torchvision has them.

    images uint8 [B, C, H, W] with C = 1 or 3. Returns a view of them, uint8 [B, C, size, size].
    ValueError for other images, and a size that is not in 1..min(H, W).
    """
    check_images(images)
    h, w = images.shape[2:]
    if not 1 <= size <= min(h, w):
        raise ValueError(f"the size must be in 1..{min(h, w)} for images of {h} x {w} pixels, got {size}")
    top, left = round((h - size) / 2), round((w - size) / 2)  # Python's round, half to even
    return images[:, :, top : top + size, left : left + size]


def draw_jitter(
    batch: int, draws: Draws, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4
) -> Jitter:
    """What torchvision's ColorJitter draws for each of `batch` images: a factor for each operation, uniform in
    [1 - x, 1 + x] (from 0 on) for its strength x; and the order of the operations, uniformly.

    ValueError for a negative strength.
    """
    strengths = (brightness, contrast, saturation)
    if min(strengths) < 0:
        raise ValueError(f"the strengths of the colour jitter must not be negative, got {strengths}")
    device = draws.device
    factors = torch.empty(3, batch, device=device)
    for row, strength in zip(factors, strengths, strict=True):
        row.uniform_(max(0.0, 1 - strength), 1 + strength, generator=draws.generator)
    order = torch.rand(batch, 3, generator=draws.generator, device=device).argsort(1)
    return Jitter(factors.T, order)


def colour_jitter(images: Tensor, jitter: Jitter) -> Tensor:
    """Brightness, contrast and saturation of each image, in its own order; torchvision's ColorJitter on tensors.

    Each is a blend of the image with black, with the mean of its luminance, or with its luminance, cut to uint8. Images
    with 1 channel have no saturation to change. Equal to torchvision for images of up to 2^16 pixels; beyond, it rounds
    the sum to float32, and a pixel may differ by 1.

    images uint8 [B, C, H, W] with C = 1 or 3, on the device of `jitter`. Returns uint8 [B, C, H, W].
    ValueError for other images.
    """
    check_images(images)
    for operation in jitter.order.unbind(1):
        factor = jitter.factors.gather(1, operation[:, None])
        operation = operation[:, None, None, None]
        grey = _grey(images)
        # of integers, and divided by a tensor: see _triangle
        total = grey.sum((1, 2, 3), keepdim=True).float()
        mean = total / torch.full_like(total, images.shape[2] * images.shape[3])
        other = torch.where(operation == CONTRAST, mean, torch.zeros_like(mean))
        if images.shape[1] == 3:
            other = torch.where(operation == SATURATION, grey.float(), other)
        else:
            factor = factor.masked_fill(operation[:, :, 0, 0] == SATURATION, 1)
        weight = factor[:, :, None, None]
        other = other * (1 - weight.double()).float()  # torchvision subtracts in float64
        images = images.float().mul_(weight).add_(other).clamp_(0, 255).to(torch.uint8)
    return images


def grayscale(images: Tensor, chosen: Tensor) -> Tensor:
    """Put the luminance in every channel of the images for which `chosen` (bool [B]) is true, as torchvision's
    RandomGrayscale does on tensors; images with 1 channel stay as they are.

    images uint8 [B, C, H, W] with C = 1 or 3. Returns uint8 [B, C, H, W]. ValueError for other images.
    """
    check_images(images)
    return torch.where(chosen[:, None, None, None], _grey(images), images)


def draw_blur(
    batch: int, draws: Draws, sigma: tuple[float, float] = (0.1, 2.0), probability: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The standard deviation of each image's blur, uniform in `sigma`, and whether it is blurred at all.

    Returns float32 [batch] and bool [batch], on the device. ValueError unless 0 < sigma[0] <= sigma[1].
    """
    if not 0 < sigma[0] <= sigma[1]:
        raise ValueError(f"sigma must be a range of positive numbers, got {sigma}")
    drawn = torch.empty(batch, device=draws.device).uniform_(*sigma, generator=draws.generator)
    return drawn, draw_chosen(batch, draws, probability)


def gaussian_blur(images: Tensor, sigma: Tensor, chosen: Tensor, kernel_size: int = 13) -> Tensor:
    """Convolve the images for which `chosen` (bool [B]) is true with a Gaussian of standard deviation `sigma` (float
    [B], above 0, in pixels), cut off and normalised over kernel_size x kernel_size pixels; mirrored at the border.

    At most 1 grey level away from torchvision's gaussian_blur with the same kernel. 13 pixels hold three standard
    deviations of up to 2 to either side; SimCLR (Chen et al. 2020) has 23, a tenth of its images' 224.

    images uint8 [B, C, H, W] with C = 1 or 3. Returns uint8 [B, C, H, W].
    ValueError for other images, and a kernel size that is even, below 1, above 31, or 2 min(H, W) or more.
    """
    check_images(images)
    h, w = images.shape[2:]
    largest = min(31, 2 * min(h, w) - 1)
    if kernel_size not in range(1, largest + 1, 2):
        raise ValueError(f"the kernel size must be odd and in 1..{largest} for {h} x {w} pixels, got {kernel_size}")
    device = images.device
    radius = kernel_size // 2
    distance = torch.arange(-radius, radius + 1, device=device)
    bell = (-0.5 * (distance / sigma.double()[:, None]).square()).exp()
    weights = (bell / bell.sum(1, keepdim=True) * 2**WEIGHT_BITS + 0.5).to(torch.int32)

    padded, matrices = images, []
    for dimension, length in ((2, h), (3, w)):
        places = torch.arange(-radius, length + radius, device=device)
        mirrored = length - 1 - (length - 1 - places.abs()).abs()
        padded = padded.index_select(dimension, mirrored)
        first = torch.arange(length, device=device).expand(len(images), length)
        matrices.append(_matrix(first, weights[:, None].expand(-1, length, -1), length + 2 * radius))
    return torch.where(chosen[:, None, None, None], _filtered(padded, *matrices), images)
