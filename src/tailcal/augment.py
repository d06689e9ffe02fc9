"""Batched augmentation on the device: uint8 images and the random draws in, uint8 images out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tailcal.autoaugment import autoaugment, cutout, draw_centres, draw_policies
from tailcal.draws import Draws
from tailcal.params import Augmentation


def crop(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Zero-pad by `pad` on all sides and crop back to the old size, at its own offset for each image.

    images uint8 [B, C, H, W]; offsets int64 [B, 2] (down, right) in 0..2*pad. Returns uint8 [B, C, H, W].
    """
    b, c, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = offsets[:, 0, None] + torch.arange(h, device=images.device)
    columns = offsets[:, 1, None] + torch.arange(w, device=images.device)
    batch = torch.arange(b, device=images.device)[:, None, None, None]
    channel = torch.arange(c, device=images.device)[None, :, None, None]
    return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror left to right the images for which `flipped` (bool [B]) is true. images [B, C, H, W]."""
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def standard(images: Tensor, config: Augmentation, draws: Draws) -> Tensor:
    """The field's standard augmentation: pad and random crop, then horizontal flip with probability 1/2."""
    b, device = len(images), images.device
    if config.pad:
        offsets = torch.randint(2 * config.pad + 1, (b, 2), generator=draws.device, device=device)
        images = crop(images, offsets, config.pad)
    if config.flip:
        images = flip(images, torch.rand(b, generator=draws.device, device=device) < 0.5)
    return images


def strong(images: Tensor, config: Augmentation, draws: Draws) -> Tensor:
    """Standard augmentation, then AutoAugment's CIFAR-10 policy, then Cutout (MARC, BaGMar)."""
    images = autoaugment(standard(images, config, draws), draw_policies(len(images), draws))
    return cutout(images, draw_centres(*images.shape[:1], *images.shape[2:], draws), config.cutout)


AUGMENTATIONS = {"standard": standard, "strong": strong}


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, H, W] to float32 with `mean` and `std` ([C], of pixels in [0, 1]) per channel."""
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
