"""Batched augmentation against a loop over images, and the shares of its draws."""

import numpy as np
import torch

from tailcal import augment, autoaugment
from tailcal.draws import Draws, derive
from tailcal.params import Augmentation

CONFIG = Augmentation(pad=2, flip=True, cutout=3, mean=[0.5, 0.4], std=[0.2, 0.3])
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
    config = Augmentation(pad=2, flip=False, cutout=1, mean=[0.0], std=[1.0])
    moved = augment.standard(marker, config, Draws(0, 0, torch.Generator()))
    share = moved.float().mean(0)[0]
    assert (share - 1 / 25).abs().max() < 0.02
    marker = torch.zeros(4000, 1, 1, 2, dtype=torch.uint8)
    marker[..., 0] = 1
    flipped = augment.standard(
        marker, Augmentation(pad=0, flip=True, cutout=1, mean=[0.0], std=[1.0]), Draws(0, 0, torch.Generator())
    )
    assert abs(flipped[..., 1].float().mean().item() - 0.5) < 0.03


def test_the_same_step_gives_the_same_images():
    first, again, other = (augment.standard(IMAGES, CONFIG, Draws(3, step, torch.Generator())) for step in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_augmentation_is_the_identity():
    plain = Augmentation(pad=0, flip=False, cutout=1, mean=[0.0, 0.0], std=[1.0, 1.0])
    assert torch.equal(augment.standard(IMAGES, plain, Draws(0, 0, torch.Generator())), IMAGES)


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
    config = Augmentation(pad=2, flip=True, cutout=4, mean=[0.5] * 3, std=[0.2] * 3)
    draws = Draws(1, 2, torch.Generator())
    expected = augment.standard(images, config, draws)
    expected = autoaugment.autoaugment(expected, autoaugment.draw_policies(16, draws))
    expected = autoaugment.cutout(expected, autoaugment.draw_centres(16, 12, 10, draws), 4)
    strong = augment.AUGMENTATIONS["strong"](images, config, Draws(1, 2, torch.Generator()))
    assert torch.equal(strong, expected)
    assert not torch.equal(strong, augment.standard(images, config, Draws(1, 2, torch.Generator())))
