"""Batched augmentation on the device: uint8 images and the random draws in, uint8 images out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tailcal import largeaugment as large
from tailcal.autoaugment import autoaugment, cutout, draw_centres, draw_policies
from tailcal.draws import Draws
from tailcal.largeaugment import draw_chosen
from tailcal.params import Augmentation, PadCrop, ResizedCrop


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


def pad_crop(images: Tensor, config: PadCrop, draws: Draws) -> Tensor:
    """The standard augmentation of small images: pad and random crop, then horizontal flip with probability 1/2."""
    b, device = len(images), images.device
    if config.pad:
        offsets = torch.randint(2 * config.pad + 1, (b, 2), generator=draws.generator, device=device)
        images = crop(images, offsets, config.pad)
    return flip(images, draw_chosen(b, draws, 0.5)) if config.flip else images


def pad_crop_strong(images: Tensor, config: PadCrop, draws: Draws) -> Tensor:
    """The strong one: standard, then AutoAugment's CIFAR-10 policy, then Cutout (MARC, BaGMar)."""
    images = autoaugment(pad_crop(images, config, draws), draw_policies(len(images), draws), config.fill)
    return cutout(images, draw_centres(*images.shape[:1], *images.shape[2:], draws), config.cutout)


def resized_crop(images: Tensor, config: ResizedCrop, draws: Draws) -> Tensor:
    """The standard augmentation of large images: random resized crop, flip with probability 1/2, colour jitter."""
    b, _, height, width = images.shape
    boxes = large.draw_resized_crops(b, height, width, draws, scale=(config.min_area, 1.0))
    images = large.resized_crop(images, boxes, config.size)
    if config.flip:
        images = flip(images, draw_chosen(b, draws, 0.5))
    if config.jitter:
        images = large.colour_jitter(images, large.draw_jitter(b, draws, *[config.jitter] * 3))
    return images


def resized_crop_strong(images: Tensor, config: ResizedCrop, draws: Draws) -> Tensor:
    """The strong one: standard, then sometimes grey, and sometimes blurred (FSGL)."""
    images = resized_crop(images, config, draws)
    images = large.grayscale(images, draw_chosen(len(images), draws, config.grey))
    return large.gaussian_blur(images, *large.draw_blur(len(images), draws, probability=config.blur))


AUGMENTATIONS = {
    ("pad_crop", "standard"): pad_crop,
    ("pad_crop", "strong"): pad_crop_strong,
    ("resized_crop", "standard"): resized_crop,
    ("resized_crop", "strong"): resized_crop_strong,
}


def augment(images: Tensor, config: Augmentation, strength: str, draws: Draws) -> Tensor:
    """Training images with the augmentation of this strength: uint8 [B, C, H, W] in, uint8 [B, C, H', W'] out."""
    return AUGMENTATIONS[config.kind, strength](images, config, draws)


def plain(images: Tensor, config: Augmentation) -> Tensor:
    """Test images as they are evaluated, without any draw: uint8 [B, C, H, W] in, uint8 [B, C, H', W'] out."""
    return large.centre_crop(images, config.size) if isinstance(config, ResizedCrop) else images


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, H, W] to float32 with `mean` and `std` ([C], of pixels in [0, 1]) per channel."""
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
