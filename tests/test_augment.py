"""Batched augmentation against a loop over images, and the shares of its draws."""

import numpy as np
import torch

from tailcal import augment, autoaugment, largeaugment
from tailcal.draws import Draws, derive
from tailcal.params import PadCrop, ResizedCrop

CONFIG = PadCrop(kind="pad_crop", pad=2, flip=True, cutout=3, fill=128, mean=[0.5, 0.4], std=[0.2, 0.3])
IMAGES = torch.randint(0, 256, (40, 2, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_crop_is_pad_and_slice():
    offsets = torch.randint(5, (40, 2), generator=torch.Generator().manual_seed(1))
    cropped = augment.crop(IMAGES, offsets, 2)
    for image, (down, right), result in zip(IMAGES.numpy(), offsets.tolist(), cropped.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)))
        assert np.array_equal(result, padded[:, down : down + 7, right : right + 5])
    assert cropped.dtype == torch.uint8


def test_flip_mirrors_the_chosen_images():
    chosen = torch.arange(40) % 3 == 0
    flipped = augment.flip(IMAGES, chosen)
    for i in range(40):
        assert np.array_equal(flipped[i].numpy(), IMAGES[i].numpy()[:, :, ::-1] if chosen[i] else IMAGES[i].numpy())


def test_normalise_by_hand():
    pixel = torch.tensor([[[[255]], [[51]]]], dtype=torch.uint8)
    result = augment.normalise(pixel, torch.tensor(CONFIG.mean), torch.tensor(CONFIG.std))
    torch.testing.assert_close(result.flatten(), torch.tensor([(1 - 0.5) / 0.2, (0.2 - 0.4) / 0.3]))


def test_standard_uses_every_offset_and_flips_half():
    marker = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    marker[:, :, 2, 2] = 1  # a centred dot lands on any of 5 x 5 places
    config = PadCrop(kind="pad_crop", pad=2, flip=False, cutout=1, fill=128, mean=[0.0], std=[1.0])
    moved = augment.pad_crop(marker, config, Draws(0, 0, torch.Generator()))
    share = moved.float().mean(0)[0]
    assert (share - 1 / 25).abs().max() < 0.02
    marker = torch.zeros(4000, 1, 1, 2, dtype=torch.uint8)
    marker[..., 0] = 1
    flipped = augment.pad_crop(
        marker,
        PadCrop(kind="pad_crop", pad=0, flip=True, cutout=1, fill=128, mean=[0.0], std=[1.0]),
        Draws(0, 0, torch.Generator()),
    )
    assert abs(flipped[..., 1].float().mean().item() - 0.5) < 0.03


def test_the_same_step_gives_the_same_images():
    first, again, other = (augment.pad_crop(IMAGES, CONFIG, Draws(3, step, torch.Generator())) for step in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_augmentation_is_the_identity():
    plain = PadCrop(kind="pad_crop", pad=0, flip=False, cutout=1, fill=128, mean=[0.0, 0.0], std=[1.0, 1.0])
    assert torch.equal(augment.pad_crop(IMAGES, plain, Draws(0, 0, torch.Generator())), IMAGES)


def test_derived_seeds_differ_in_every_part():
    parts = [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0), (0, "a"), ("0", "a", 0)]
    assert len({derive(*p) for p in parts}) == len(parts)
    assert all(0 <= derive(*p) < 2**63 for p in parts)


def test_beta_has_the_right_mean_and_spread():
    draws = np.array([Draws(0, step, torch.Generator()).beta(0.2) for step in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.03
    assert abs(draws.var() - 1 / (4 * (2 * 0.2 + 1))) < 0.01


def test_strong_is_standard_then_the_policy_then_a_hole():
    images = torch.randint(0, 256, (16, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    config = PadCrop(kind="pad_crop", pad=2, flip=True, cutout=4, fill=128, mean=[0.5] * 3, std=[0.2] * 3)
    draws = Draws(1, 2, torch.Generator())
    expected = augment.pad_crop(images, config, draws)
    expected = autoaugment.autoaugment(expected, autoaugment.draw_policies(16, draws), 128)
    expected = autoaugment.cutout(expected, autoaugment.draw_centres(16, 12, 10, draws), 4)
    strong = augment.augment(images, config, "strong", Draws(1, 2, torch.Generator()))
    assert torch.equal(strong, expected)
    assert not torch.equal(strong, augment.pad_crop(images, config, Draws(1, 2, torch.Generator())))


LARGE = {"kind": "resized_crop", "size": 8, "min_area": 0.2, "mean": [0.5] * 3, "std": [0.2] * 3}


def test_large_images_are_cropped_to_size_in_training_and_at_the_centre_for_the_test():
    images = torch.randint(0, 256, (8, 3, 12, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    config = ResizedCrop(**LARGE, flip=True, jitter=0.4, grey=1.0, blur=0.0)
    standard = augment.augment(images, config, "standard", Draws(1, 2, torch.Generator()))
    strong = augment.augment(images, config, "strong", Draws(1, 2, torch.Generator()))
    assert standard.shape == strong.shape == (8, 3, 8, 8)
    assert torch.equal(strong[:, 0], strong[:, 1])  # all of them grey
    assert not torch.equal(standard[:, 0], standard[:, 1])
    assert torch.equal(augment.plain(images, config), images[:, :, 2:10, 3:11])


def test_large_augmentation_that_may_change_nothing_is_a_plain_resize():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    config = ResizedCrop(**LARGE | {"min_area": 1.0}, flip=False, jitter=0.0, grey=0.0, blur=0.0)
    assert torch.equal(augment.augment(images, config, "strong", Draws(1, 2, torch.Generator())), images)


def test_the_large_standard_augmentation_is_its_parts_in_their_order():
    config = ResizedCrop(**LARGE, flip=True, jitter=0.4, grey=0.0, blur=0.0)
    images = torch.randint(0, 256, (64, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    draws = Draws(0, 0, torch.Generator())
    boxes = largeaugment.draw_resized_crops(64, 16, 12, draws, scale=(0.2, 1.0))
    expected = largeaugment.resized_crop(images, boxes, 8)
    chosen = largeaugment.draw_chosen(64, draws, 0.5)
    expected = torch.where(chosen[:, None, None, None], expected.flip(3), expected)
    expected = largeaugment.colour_jitter(expected, largeaugment.draw_jitter(64, draws, 0.4, 0.4, 0.4))
    assert torch.equal(augment.augment(images, config, "standard", Draws(0, 0, torch.Generator())), expected)
